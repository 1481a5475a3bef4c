"""How a decision report reads: sections, as Markdown and as one page of HTML."""

import html as escape
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

# A `report.Report` renders itself by this file, which so cannot import it.
Report = Any

# Okabe and Ito's colours, told apart with any colour vision.
COLOURS = {
    "isolated": "#E69F00",
    "federated": "#009E73",
    "pooled": "#0072B2",
    "tuned": "#CC79A7",
    "lost": "#D55E00",
}


class Section(NamedTuple):
    """A heading, and under it text, a table and a figure, each of which may be none."""

    heading: str
    text: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()  # the first row has the names of the columns
    draw: Callable[[Report, Any], None] | None = None
    about: str = ""  # the figure, for who cannot see it


def value(x: float, score: str) -> str:
    """A score in its unit: accuracies in percent.

    >>> value(0.9231, "accuracy"), value(12.345, "loss")
    ('92.3 %', '12.3')
    """
    if not math.isfinite(x):
        return "-"
    return f"{100 * x:.1f} %" if score == "accuracy" else f"{x:.3g}"


def difference(x: float, score: str) -> str:
    """A difference of scores in its unit: of accuracies in points of percent.

    >>> difference(0.021, "accuracy"), difference(-1.5, "loss")
    ('+2.1 points', '-1.5')
    """
    return signed(x, score) + " points" * (score == "accuracy" and math.isfinite(x))


def signed(x: float, score: str) -> str:
    """The same without the unit, as in the ends of an interval."""
    if not math.isfinite(x):
        return "unknown"
    return f"{100 * x:+.1f}" if score == "accuracy" else f"{x:+.3g}"


def sections(r: Report) -> list[Section]:
    """The report, part by part."""
    s, own = r.score, r.judged == "own"
    judged = "each node's own examples" if own else "the common examples"
    set_up = r.setting
    found = [
        Section(
            f"Verdict: {r.verdict.answer}",
            [r.verdict.because, *_evidence(r)],
        )
    ]
    if r.caveats:
        found.append(Section("What to keep in mind", [f"- {c}" for c in r.caveats]))
    names = {
        "isolated": "each node alone",
        "federated": "federated",
        "tuned": "federated, fine-tuned at home",
        "pooled": "all data in one place",
        "dropout": f"federated, {set_up['dropout']:.0%} vanish each round",
        "private": "federated, with noise",
    }
    rows = [
        (names[name], value(m["overall"], s), value(m["own"], s))
        for name, m in r.means.items()
    ]
    changes = [
        (name, *(_interval(each[on], s) for on in ("overall", "own")))
        for name, each in r.effects.items()
    ]
    found += [
        Section(
            "What each way scores",
            [
                f"{s}, {'more' if r.higher else 'less'} is better; the mean of "
                f"{set_up['seeds']} seeds. The verdict is on {judged}."
            ],
            [("", "on common examples", "on each node's own"), *rows],
        ),
        Section(
            "Differences, for the better",
            [
                f"With intervals at {r.confidence:.0%}, of seeds and of test examples "
                f"together. What is worth it: {difference(r.worth, s)}."
            ],
            [("", "on common examples", "on each node's own"), *changes],
        ),
        Section(
            "More data, or more nodes",
            _growth(r),
            draw=draw_growth,
            about="the score over examples a node, and over the number of nodes",
        ),
        Section(
            "What each node gains",
            _who(r),
            draw=draw_nodes,
            about="the gain of every node on its own examples, with intervals",
        ),
        Section("What it costs", *_costs(r)),
        Section(
            "What was run",
            [
                *(f"- {k}: {v}" for k, v in set_up.items()),
                "- the pooled model takes as many steps, in a row, as all nodes "
                "together",
            ],
        ),
        Section("The rules", [f"- {rule}" for rule in RULES]),
    ]
    return found


RULES = (
    "Federate, if the gain over isolated nodes is at least what is worth it and its "
    "interval is above 0.",
    "Federate with personalisation, if so and some nodes lose on their own examples "
    "(by as much, and beyond chance in the worst of N nodes) of which fewer do after "
    "fine-tuning; or if only the fine-tuned model gains.",
    "Not worth it, if the whole interval is below what is worth it, fine-tuned or not.",
    "Not shown, otherwise: whether there is such a gain is within the noise of seeds "
    "and test size.",
)


def _evidence(r: Report) -> list[str]:
    """Two or three sentences under the verdict."""
    text = []
    s, isolated = r.score, r.means["isolated"][r.judged]
    text.append(
        f"On the judged examples: alone {value(isolated, s)}, federated "
        f"{value(r.means['federated'][r.judged], s)}, pooled "
        f"{value(r.means['pooled'][r.judged], s)}."
    )
    text.append(_times(r))
    return text


def _times(r: Report) -> str:
    """Federation against collecting more data, in one sentence."""
    best, low, high = r.as_good_as
    if not r.alone.identifiable:
        return (
            "What more data at each node would bring instead cannot be told from its "
            f"learning curve: {r.alone.why}."
        )
    if not math.isfinite(best):
        least = ""
        if math.isfinite(low):
            least = f"; the interval begins at {_factor(low)} as much"
        return (
            "By its learning curve no amount of data of its own would make a node "
            f"alone as good{least}."
        )
    return (
        f"A node alone would need {_factor(best)} its data to do as well "
        f"({_factor(low)} to {_factor(high)})."
    )


def _factor(x: float) -> str:
    if not math.isfinite(x):
        return "any number of times"
    return f"{x:.2g} times" if x < 100 else "more than 100 times"


def _growth(r: Report) -> list[str]:
    s = r.score
    text = [
        "All points have as many steps of training, so that the curves are of data "
        "alone; more steps might move all of them. Bands are from the least to the "
        "most of the seeds, and of a fitted curve its interval.",
        _times(r),
    ]
    for name, law in (("isolated nodes", r.alone), ("the federation", r.together)):
        if law.identifiable:
            text.append(
                f"Learning curve of {name}: {value(law.limit, s)} "
                f"{'-' if (law.left < 0) else '+'} "
                f"{_plain_value(abs(law.left), s)} (n / {law.now:.0f})^-"
                f"{law.steepness:.2f}."
            )
        else:
            text.append(f"Learning curve of {name}: not identifiable, {law.why}.")
    if r.alone.identifiable:
        text.append(
            "With more examples at each node, alone: "
            + "; ".join(
                f"{k} times, {value(x, s)} ({value(low, s)} to {value(high, s)})"
                for k, (x, low, high) in zip((2, 4, 10), r.more.T, strict=True)
            )
            + "."
        )
    return text


def _plain_value(x: float, score: str) -> str:
    return f"{100 * x:.1f} %" if score == "accuracy" else f"{x:.3g}"


def _who(r: Report) -> list[str]:
    gain, s = r.nodes.gain, r.score
    at = np.nanquantile(gain, (0, 0.1, 0.5, 0.9, 1))
    names = ("least", "10 %", "median", "90 %", "most")
    spread = ", ".join(
        f"{n} {difference(x, s)}" for n, x in zip(names, at, strict=True)
    )
    lose, after = r.nodes.loses, r.nodes.loses & r.nodes_tuned.loses
    text = [
        "By the federated model instead of its own, on the node's own held-out "
        f"examples: {spread}; {(gain > 0).mean():.0%} of the nodes are better off.",
        "No node that is counted loses for certain and by as much as matters.",
    ]
    if lose.any():
        text[-1] = (
            f"{lose.sum()} lose for certain and by as much as matters, {after.sum()} "
            "of them also after fine-tuning at home."
        )
        first = np.flatnonzero(lose)
        listed = ", ".join(map(str, first[:20])) + (" ..." if len(first) > 20 else "")
        text.append(f"Nodes that lose: {listed}.")
    return text


def _costs(r: Report) -> tuple[list[str], list[tuple[str, str]]]:
    c = r.costs
    rows = [
        ("", "in the whole run"),
        ("a client sends", f"{c['bytes up'] / 1e6:.3g} MB"),
        ("a client is sent", f"{c['bytes down'] / 1e6:.3g} MB"),
        ("a client computes", f"{c['FLOP'] / 1e9:.3g} GFLOP"),
    ]
    if "epsilon" in c:
        rows.append(
            ("epsilon, of a client", f"{c['epsilon']:.3g} at delta {c['delta']:g}")
        )
    text = [
        "Of the mean client. Energy goes with what is computed and, on mobile "
        "networks more so, with what is sent."
    ]
    return text, rows


def _interval(e, score: str) -> str:
    ends = f"{signed(e.low, score)} to {signed(e.high, score)}"
    return f"{difference(e.mean, score)} ({ends})"


# --------------------------------------------------------------------------- figures


def draw_growth(r: Report, figure: Any) -> None:
    """Curves over examples a node, with the power law beyond, and over nodes."""
    left, right = figure.subplots(1, 2, sharey=True)
    unit = 100 if r.score == "accuracy" else 1
    suffix = ", own" if r.judged == "own" else ""
    for name in ("isolated", "federated", "pooled"):
        for axes, x, curves in (
            (left, r.sizes, r.by_fraction),
            (right, r.counts, r.by_count),
        ):
            y = curves.get(name + suffix)
            if y is None:  # who is alone does not know how many others there are
                y = curves["federated"][:, :1] * 0 + r.means["isolated"][r.judged]
                y = np.broadcast_to(y, (len(y), len(x)))
            y = unit * y
            axes.plot(x, y.mean(0), "o-", ms=4, color=COLOURS[name], label=name)
            low, high = y.min(0), y.max(0)
            axes.fill_between(x, low, high, color=COLOURS[name], alpha=0.15, lw=0)
    if r.alone.identifiable:
        x = np.geomspace(r.sizes[0], 4 * r.sizes[-1], 60)
        y, low, high = unit * r.alone.at(x, r.confidence)
        style = {"color": COLOURS["isolated"], "ls": "--", "lw": 1.2}
        left.plot(x, y, label="isolated, power law", **style)
        left.fill_between(x, low, high, color=COLOURS["isolated"], alpha=0.08, lw=0)
    unit_name = f"{r.score} (%)" if r.score == "accuracy" else r.score
    left.set(xscale="log", xlabel="training examples a node", ylabel=unit_name)
    left.set_xticks(r.sizes, [f"{n:.0f}" for n in r.sizes])
    left.set_xticks([], minor=True)
    right.set(xlabel="nodes that take part")
    right.xaxis.get_major_locator().set_params(integer=True)
    left.legend(frameon=False, fontsize=8)
    _tidy(left, right)


def draw_nodes(r: Report, figure: Any) -> None:
    """Every node's gain, sorted, with its interval; and after fine-tuning."""
    axes = figure.subplots()
    unit = 100 if r.score == "accuracy" else 1
    order = np.argsort(r.nodes.gain)
    x = np.arange(len(order))
    gain = unit * r.nodes.gain[order]
    low, high = (unit * np.asarray(v)[order] for v in (r.nodes.low, r.nodes.high))
    sure = np.isfinite(low)
    ends = np.where(sure, [gain - low, high - gain], 0)
    ms = 5 if len(order) <= 30 else 2.5
    style = {"fmt": "o", "ms": ms, "lw": 0.8}
    lost, label = r.nodes.loses[order], "federated"
    for of, colour, name in (
        (~lost, COLOURS["federated"], label),
        (lost, COLOURS["lost"], f"{label}, loses"),
    ):
        if of.any():
            axes.errorbar(
                *(x[of], gain[of], ends[:, of]), color=colour, label=name, **style
            )
    tuned = unit * r.nodes_tuned.gain[order]
    axes.plot(
        *(x, tuned, "D"),
        ms=ms,
        color=COLOURS["tuned"],
        mfc="none",
        label="and fine-tuned at home",
    )
    axes.axhline(0, color="black", lw=0.8)
    # Few seeds make intervals that are far longer than there is to see.
    seen = np.concatenate([gain, tuned, [0]])
    room = 0.1 * np.ptp(seen) + min(np.median(high - low), 0.3 * np.ptp(seen)) + 1e-9
    axes.set_ylim(seen.min() - room, seen.max() + room)
    more = "gain" if r.higher else "reduction"
    unit_name = " (points)" if unit == 100 else ""
    axes.set(
        xlabel="nodes, sorted by what they gain",
        ylabel=f"{more} of {r.score}{unit_name}",
    )
    if len(order) <= 30:
        axes.set_xticks(x, map(str, order))
        axes.set_xlabel("node, sorted by what it gains")
    # Above the axes: intervals may be anywhere inside.
    axes.legend(
        frameon=False,
        fontsize=8,
        ncols=3,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderaxespad=0,
    )
    _tidy(axes)


def _tidy(*all_axes: Any) -> None:
    for axes in all_axes:
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)


def svg(draw: Callable[..., None], r: Report) -> str:
    """A figure as an element of HTML; it names no address."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("html needs matplotlib: pip install 'jaxfl[plot]'") from error
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    draw(r, figure)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": draw.__name__}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = text[text.index("<svg") :]
    # In HTML an element of SVG needs no namespace, and a prefix is an attribute's name.
    text = re.sub(r'\s(xmlns(:\w+)?)="[^"]*"', "", text)
    return text.replace("xlink:href", "href")


# ----------------------------------------------------------------------- the writers


def markdown(r: Report) -> str:
    """The sections as Markdown, without figures."""
    parts = [f"# {r.title}"]
    for part in sections(r):
        parts.append(f"## {part.heading}")
        is_list = all(line.startswith("- ") for line in part.text)
        parts.append(("\n" if is_list else "\n\n").join(part.text))
        if part.table:
            head, *rows = ("| " + " | ".join(row) + " |" for row in part.table)
            rule = "| " + " | ".join("---" for _ in part.table[0]) + " |"
            parts.append("\n".join([head, rule, *rows]))
    return "\n\n".join(p for p in parts if p) + "\n"


def html(r: Report) -> str:
    """The sections as one page."""
    body = [f"<h1>{escape.escape(r.title)}</h1>"]
    for i, part in enumerate(sections(r)):
        kind = ' class="verdict"' if i == 0 else ""
        body.append(f"<section{kind}><h2>{escape.escape(part.heading)}</h2>")
        items = [escape.escape(line.removeprefix("- ")) for line in part.text]
        if part.text and part.text[0].startswith("- "):
            body.append("<ul>" + "".join(f"<li>{x}</li>" for x in items) + "</ul>")
        else:
            body += [f"<p>{x}</p>" for x in items]
        if part.table:
            body.append(_table(part.table))
        if part.draw:
            about = escape.escape(part.about)
            drawn = svg(part.draw, r)
            body.append(f'<figure role="img" aria-label="{about}">{drawn}</figure>')
        body.append("</section>")
    return PAGE.format(title=escape.escape(r.title), style=STYLE, body="\n".join(body))


def _table(table: Sequence[Sequence[str]]) -> str:
    def row(cells, tag):
        first, *rest = (escape.escape(c) for c in cells)
        return (
            f'<tr><th scope="row">{first}</th>'
            + "".join(f"<{tag}>{c}</{tag}>" for c in rest)
            + "</tr>"
        )

    head, *rows = table
    lines = [row(head, "th"), *(row(cells, "td") for cells in rows)]
    return "<table>" + "".join(lines) + "</table>"


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin: 1.8rem 0 .4rem; }
p, ul { margin: .4rem 0; max-width: 46rem; }
.verdict { border-left: .4rem solid #0072B2; background: #f2f7fb; padding: .6rem 1rem; }
.verdict h2 { font-size: 1.4rem; margin-top: 0; }
table { border-collapse: collapse; font-size: .92rem; margin: .6rem 0; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; }
tr { border-bottom: 1px solid #ddd; }
th[scope=row] { font-weight: normal; } tr:first-child th { font-weight: 600; }
figure { margin: .6rem 0; } figure svg { width: 100%; height: auto; }
"""
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
