"""GALLERY.md: every experiment in small, and what the whole ones found.

`make gallery` runs the preset `ci` of every experiment, one after another, each in a
process of its own, and writes GALLERY.md from what they left in `results/gallery/`.
What was run and is newer than the code is not run again, so that a gallery that was
interrupted goes on; an experiment that fails is named on the page, and by the exit
code, and loses nothing else.

`--take results/NAME` shows what a run of another preset left there, from now on, before
the small one. What the page is made of is committed, so that it can be written again
without running anything (`--skip-run`): `experiments/figures/` has the record and the
figure of the runs that were taken, `experiments/figures/ci/` those of the small ones.
"""

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich
import rich.progress
import tyro

from experiments import common

ROOT = Path(__file__).parent.parent
FIGURES = Path("experiments", "figures")
SMALL = FIGURES / "ci"
RUNS = Path("results", "gallery")
TIMEOUT = 900
"""Seconds; an experiment that takes longer in small has failed."""

HEAD = """\
# Gallery

Every experiment with its figure and its numbers, the paper's beside them where it has
such. `make gallery` runs the preset `ci` of each and writes this page: small enough to
test that it runs, too small to say much about a method. Where the whole experiment was
run, that stands first. Each says what was run, on what, and the command that makes
figure and numbers again, in `results/NAME/`. [README](README.md#what-we-measured) says
what the numbers of the whole ones mean, and where they fall short of a paper's.
"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The page of all experiments."""

    only: tuple[str, ...] = ()
    """Run these alone; the page has all."""
    skip_run: bool = False
    """Run none, and write the page from the records that are there."""
    take: tuple[Path, ...] = ()
    """Folders of results, such as `results/dp_fedavg`, to show from now on."""


def experiments(root: Path = ROOT) -> dict[str, str]:
    """What each experiment is about, by its name.

    Args:
      root: of the repository, whose modules in `experiments/` are read, not imported.

    Returns:
      The first line of the docstring of every module with a `main` and a preset `ci`.
    """
    sources = {p.stem: p.read_text("utf-8") for p in root.glob("experiments/*.py")}
    return {
        name: (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
        for name, source in sorted(sources.items())
        if re.search(r'^PRESETS\b.*"ci"', source, re.MULTILINE | re.DOTALL)
        and re.search(r"^def main\(", source, re.MULTILINE)
    }


def run(name: str, root: Path = ROOT) -> str | None:
    """Runs the preset `ci`, unless that was done since the code has changed.

    Its results are in `results/gallery/results/NAME`, those of other presets elsewhere.

    Returns:
      What went wrong, or None.
    """
    folder = root / RUNS
    log = folder / f"{name}.log"
    code = {*root.glob("jaxfl/**/*.py"), *root.glob("experiments/*.py")}
    newest = max(path.stat().st_mtime for path in code - {Path(__file__)})
    if log.exists() and log.stat().st_mtime > newest:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(root), "MPLBACKEND": "agg"}
    environment["PYTHONIOENCODING"] = "utf-8"
    if data := os.environ.get("JAXFL_DATA_DIR"):
        environment["JAXFL_DATA_DIR"] = str(Path(data).absolute())
    partial = log.with_suffix(".log.partial")
    with open(partial, "w", encoding="utf-8") as out:
        try:
            subprocess.run(
                [sys.executable, "-m", f"experiments.{name}", "--preset", "ci"],
                check=True,
                cwd=folder,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            return f"not done after {TIMEOUT} s"
        except subprocess.CalledProcessError:
            out.flush()
            lines = partial.read_text("utf-8").split("\n")
            return next((x.strip() for x in reversed(lines) if x.strip()), "failed")
    os.replace(partial, log)  # which says that all of it is there
    return None


def take(results: Path, into: Path) -> None:
    """Makes what an experiment left in its folder a record and a figure for the page.

    Args:
      results: with a `summary.json`, and figures if it draws.
      into: gets `NAME.json` and `NAME.png`, NAME being the folder's.
    """
    name = results.name
    summary = json.loads((results / "summary.json").read_text("utf-8"))
    record = {key: summary[key] for key in ("run", "settings", "tables")}
    into.mkdir(parents=True, exist_ok=True)
    common.write_json(into / f"{name}.json", record)
    figures = sorted(results.glob("*.png"))
    if figures:
        own = results / f"{name}.png"
        _shrink(own if own in figures else figures[0], into / f"{name}.png")


def _shrink(picture: Path, into: Path) -> None:
    """The same picture of a palette of 128 colours, a third as many bytes."""
    from PIL import Image

    with Image.open(picture) as image:
        few = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
        few.save(into, optimize=True)


def records(root: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """What was taken into a folder: records, with the path of the figure, if any."""
    found = {}
    for path in sorted((root / folder).glob("*.json")):
        found[path.stem] = json.loads(path.read_text("utf-8"))
        figure = folder / f"{path.stem}.png"
        if (root / figure).exists():
            found[path.stem]["figure"] = figure.as_posix()
    return found


def page(
    purposes: Mapping[str, str],
    whole: Mapping[str, Mapping[str, Any]],
    small: Mapping[str, Mapping[str, Any]],
    failed: Mapping[str, str],
) -> str:
    """GALLERY.md.

    Args:
      purposes: a line on every experiment, see `experiments`.
      whole: records of those that were run in whole, see `records`.
      small: records of their presets `ci`.
      failed: what went wrong with those that could not be run just now.
    """
    seconds = [record["run"]["seconds"] for record in small.values()]
    parts = [HEAD]
    if failed:
        what = (f"- [{name}](#{name}): {_plain(why)}" for name, why in failed.items())
        parts.append(
            "**Failed, when this page was made:**\n\n" + "\n".join(what) + "\n"
        )
    rows = [
        (
            f"[{name}](#{name})",
            _plain(purpose),
            f"`{_preset(whole[name])}`" if name in whole else "",
            f"{small[name]['run']['seconds']:.0f}" if name in small else "",
        )
        for name, purpose in purposes.items()
    ]
    total = f"All presets `ci` together: {sum(seconds) / 60:.0f} minutes.\n"
    columns = ("experiment", "", "run in whole", "seconds of `ci`")
    parts += [_markdown(columns, rows), total]
    for name, purpose in purposes.items():
        parts.append(f"## {name}\n")
        parts.append(f"{_plain(purpose)} ([source](experiments/{name}.py))\n")
        if name in failed:
            parts.append(f"**Failed**: {_plain(failed[name])}\n")
        shown = [each[name] for each in (whole, small) if name in each]
        if not shown:
            parts.append("Not run yet.\n")
        drawn = next((record for record in shown if "figure" in record), None)
        if drawn:
            parts.append(f"![{_plain(purpose)}]({drawn['figure']})\n")
            on = drawn["run"]["device"]
            parts.append(f"*Figure: preset `{_preset(drawn)}`, {on}.*\n")
        for record in shown:
            parts += _section(record, folded=len(shown) > 1 and record is shown[-1])
    return "\n".join(parts)


def _section(record: Mapping[str, Any], folded: bool) -> list[str]:
    """A run: what, on what, the numbers, and the settings."""
    made = record["run"]
    took = "" if made["seconds"] is None else f", {made['seconds']:.0f} seconds"
    tables = []
    for table in record["tables"]:
        if table["title"]:
            tables.append(f"{_plain(table['title'])}:\n")
        rows = [map(_plain, row) for row in table["rows"]]
        tables.append(_markdown(list(map(_plain, table["columns"])), rows))
    if folded and tables:
        tables = _details("numbers", tables)
    settings = "; ".join(f"{k} {json.dumps(v)}" for k, v in record["settings"].items())
    return [
        f"Preset `{_preset(record)}` on {made['device']}{took}:\n",
        f"```sh\n{made['command']}\n```\n",
        *tables,
        *_details("settings", [f"`{settings}`\n"]),
    ]


def _preset(record: Mapping[str, Any]) -> str:
    return record["settings"]["preset"]


def _details(summary: str, parts: Sequence[str]) -> list[str]:
    return [f"<details><summary>{summary}</summary>\n", *parts, "</details>\n"]


def _plain(text: Any) -> str:
    """Text that Markdown shows as it is, in a cell of a table too."""
    text = " ".join(str(text).split())
    return re.sub(r"([|*_`<\[\]\\])", r"\\\1", text)


def _markdown(columns: Sequence[str], rows: Any) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    config = tyro.cli(Settings, prog=common.program(), description=__doc__)
    purposes = experiments()
    taken = [folder.resolve() for folder in config.take]
    common.check_known((config.only, purposes), ((p.name for p in taken), purposes))
    for results in taken:
        take(results, ROOT / FIGURES)

    failed = {}
    names = [] if config.skip_run else config.only or list(purposes)
    for name in rich.progress.track(names, "experiments"):
        why = run(name)
        if why is None:
            try:
                take(ROOT / RUNS / "results" / name, ROOT / SMALL)
            except (OSError, KeyError) as error:
                why = f"left no record: {error!r}"
        if why is None:
            rich.print(name)
        else:
            failed[name] = why
            rich.print(f"{name} failed: {why} (see {RUNS / name}.log*)")
    for whole in (ROOT / FIGURES).glob("*.png"):  # whose small figure nobody sees
        (ROOT / SMALL / whole.name).unlink(missing_ok=True)

    whole, small = records(ROOT, FIGURES), records(ROOT, SMALL)
    common.write_text(ROOT / "GALLERY.md", page(purposes, whole, small, failed))
    rich.print("GALLERY.md")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
