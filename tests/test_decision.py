"""Whether to federate: the fit, the intervals, the rules, the runs and the report."""

import dataclasses
import json
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxfl
from jaxfl import decision, local, models
from jaxfl.decision import study as runs
from jaxfl.decision.verdict import FEWEST_HELDOUT

SIZES = np.array([25, 50, 100, 200, 400])


# ------------------------------------------------------------------- the learning curve


@pytest.mark.parametrize(
    ("limit", "left", "steepness"),
    [(0.1, 0.2, 0.5), (0.98, -0.05, 1.3), (3.0, 7.0, 0.2)],
)
def test_power_law_is_found(limit, left, steepness):
    y = limit + left * (SIZES / 400) ** -steepness
    law = decision.fit_power_law(SIZES, y + 1e-5 * np.array([[-1.0], [1.0]]))
    np.testing.assert_allclose(
        [law.limit, law.left, law.steepness], [limit, left, steepness], rtol=2e-3
    )
    assert law.identifiable and law.why == ""
    assert law.at(1600)[0] == pytest.approx(limit + left * 4**-steepness, rel=1e-3)
    reached = limit + left * 3**-steepness
    assert law.times(reached)[0] == pytest.approx(3, rel=2e-2)
    assert math.isinf(law.times(limit - 0.1 * left)[0])  # beyond the limit


def test_intervals_of_the_power_law_cover_and_are_no_wider_than_they_need():
    rng, covered, halves, errors = np.random.default_rng(0), [], [], []
    true = 0.1 + 0.15 * 4**-0.6
    for i in range(80):
        y = 0.1 + 0.15 * (SIZES / 400) ** -0.6
        law = decision.fit_power_law(
            SIZES, y + 0.01 * rng.standard_normal((3, 5)), seed=i
        )
        fit, low, high = law.at(1600)
        covered.append(low <= true <= high)
        halves.append((high - low) / 2)
        errors.append(fit - true)
    assert np.mean(covered) > 0.88
    assert 1.2 < np.median(halves) / np.std(errors) < 4  # about 2, if it is normal


def test_curves_that_tell_no_limit_say_so():
    noise = 0.01 * np.random.default_rng(0).standard_normal((4, 5))
    flat = decision.fit_power_law(SIZES, 0.5 + noise)
    assert not flat.identifiable and "flat" in flat.why
    straight = decision.fit_power_law(SIZES, 1 - 0.1 * np.log(SIZES) + noise / 100)
    assert not straight.identifiable and "where it ends" in straight.why
    falling = 1 / np.sqrt(SIZES)[None] + noise / 100
    assert decision.fit_power_law(SIZES, falling).identifiable
    for few in (falling[:1], falling[:, :3]):
        law = decision.fit_power_law(SIZES[: few.shape[1]], few)
        assert not law.identifiable and "4 sizes and 2 runs" in law.why
        assert np.isinf(law.times(law.limit + 1)).all()  # not reached by a flat curve


def test_power_law_refuses():
    with pytest.raises(ValueError, match=r"scores must be \[S, F\]"):
        decision.fit_power_law(SIZES, np.ones(5))
    with pytest.raises(ValueError, match="increasing"):
        decision.fit_power_law([1, 1, 2, 3], np.ones((2, 4)))


# ------------------------------------------------------------------------- the interval


def test_effect_by_hand():
    d = np.full((2, 2, 3), np.nan)
    d[:, 0] = [[1, 2, 3], [2, 3, 4]]
    d[:, 1, :2] = [[0, 4], [2, 6]]
    found = decision.effect(d)
    of_seed = np.array([(2 + 2) / 2, (3 + 4) / 2])
    assert found.mean == of_seed.mean()
    assert found.of_seeds == pytest.approx(of_seed.std(ddof=1) / math.sqrt(2))
    of_nodes = [np.var([1.5, 2.5, 3.5], ddof=1) / 3, np.var([1, 5], ddof=1) / 2]
    assert found.of_examples == pytest.approx(math.sqrt(sum(of_nodes)) / 2)
    assert found.error == pytest.approx(math.hypot(*found[1:3]))
    assert found.low < found.mean < found.high
    assert found.high - found.mean == pytest.approx(found.mean - found.low)


def test_effect_of_little():
    one = decision.effect(np.array([[[1.0, 2.0, 3.0]]]))  # a single seed
    assert one.of_seeds == 0 and one.high == pytest.approx(2 + 4.30265 / math.sqrt(3))
    single = decision.effect(np.array([[[1.0]], [[1.0]]]))  # a single example
    assert single.mean == 1 and single.low == -math.inf
    assert math.isnan(decision.effect(np.full((2, 1, 3), np.nan)).mean)


@pytest.mark.parametrize(
    ("of_seeds", "of_examples"), [(0.1, 0.3), (0.01, 1.0), (0.2, 0.1)]
)
def test_effect_covers(of_seeds, of_examples):
    """Three seeds and forty examples in a two-way layout with noise of its own."""
    rng = np.random.default_rng(1)
    covered, squares, errors = [], [], []
    for _ in range(300):
        d = (
            of_seeds * rng.standard_normal((3, 1, 1))
            + of_examples * rng.standard_normal((1, 1, 40))
            + 0.1 * rng.standard_normal((3, 1, 40))
        )
        found = decision.effect(d)
        covered.append(found.low <= 0 <= found.high)
        squares.append(found.error**2)
        errors.append(found.mean)
    assert 0.91 < np.mean(covered) <= 1
    # A standard error that forgets a root or a direction is off by far more.
    assert 0.8 < np.mean(squares) / np.var(errors) < 1.3


def test_nodes_lose_for_certain_or_not_at_all():
    rng = np.random.default_rng(0)
    d = 0.1 * rng.standard_normal((3, 6, 50))
    d[:, 0] -= 0.5  # loses
    d[:, 1] -= 0.5
    d[:, 1, FEWEST_HELDOUT - 1 :] = np.nan  # on too few examples
    d[:, 2] -= 0.5  # not counted
    d[:, 3] -= 0.05  # for certain, but by little
    d[:, 4] += 0.5
    d[:, 5] -= np.array([0.0, 0.3, 0.6])[:, None]  # not for certain
    counted = np.arange(6) != 2
    found = decision.node_effects(d, worth=0.1, confidence=0.95, counted=counted)
    assert found.loses.tolist() == [True, *[False] * 5]
    assert found.high[3] < 0 and found.gain[3] > -0.1
    assert found.gain[5] < -0.1 and found.high[5] > 0
    # All nodes at once: wider than each by itself.
    alone = decision.effect(d[:, [4]])
    assert found.low[4] < alone.low


# ---------------------------------------------------------------------------- the rules


def known(low, high):
    middle = (low + high) / 2
    return decision.Effect(middle, (high - low) / 4, 0.0, low, high)


FEW_TESTS = decision.Effect(0.0, 0.0, 0.01, -0.02, 0.02)
CLEAR, NONE, WIDE = known(0.2, 0.3), known(-0.01, 0.01), known(-0.1, 0.2)


@pytest.mark.parametrize(
    ("gain", "tuned", "pooled", "losers", "left", "answer", "says"),
    [
        (CLEAR, CLEAR, CLEAR, 0, 0, "federate", "gains"),
        (CLEAR, CLEAR, CLEAR, 3, 1, "federate with personalisation", "3 nodes lose"),
        (CLEAR, CLEAR, CLEAR, 1, 0, "federate with personalisation", "1 node loses"),
        (CLEAR, CLEAR, CLEAR, 2, 2, "federate", "opt out"),
        (NONE, CLEAR, CLEAR, 0, 0, "federate with personalisation", "fine-tuned"),
        (NONE, NONE, NONE, 0, 0, "not worth it", "enough of their own"),
        (NONE, NONE, CLEAR, 0, 0, "not worth it", "does not get it"),
        (NONE, NONE, WIDE, 0, 0, "not worth it", "All data in one place"),
        (known(-0.3, -0.2), NONE, CLEAR, 0, 0, "not worth it", "-0.25"),
        (WIDE, WIDE, CLEAR, 0, 0, "not shown", "that of seeds"),
        # That there is a gain is certain, but not that it is worth it.
        (known(0.01, 0.08), NONE, CLEAR, 0, 0, "not shown", "whether it is that much"),
        # The noise is that of what is in doubt.
        (FEW_TESTS, WIDE, CLEAR, 0, 0, "not shown", "that of seeds"),
        (WIDE, FEW_TESTS, CLEAR, 0, 0, "not shown", "that of seeds"),
    ],
)
def test_every_rule(gain, tuned, pooled, losers, left, answer, says):
    found = decision.judge(
        *(gain, tuned, pooled), worth=0.05, losers=losers, losers_tuned=left
    )
    assert found.answer == answer and says in found.because


# ----------------------------------------------------------------------------- the runs


def linear():
    return models.from_function(
        init=lambda key: 0.1 * jax.random.normal(key, (3,)),
        apply=lambda w, x, key: x @ w,
        loss=lambda out, y: (out - y) ** 2,
        metrics=lambda out, y: {"error": jnp.abs(out - y)},
    )


def population(n=3, rows=20):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n * rows, 3)).astype(np.float32)
    y = (x @ [1, 2, 3] + 0.1 * rng.standard_normal(n * rows)).astype(np.float32)
    # Ragged: the last client has half as many.
    ids = np.repeat(np.arange(n), rows)[: n * rows - rows // 2]
    return jaxfl.from_arrays(x[: len(ids)], y[: len(ids)], ids, n)


def sized(*sizes):
    """As many rows of as many clients."""
    ids = np.repeat(np.arange(len(sizes)), sizes)
    x = np.zeros((len(ids), 3), np.float32)
    return jaxfl.from_arrays(x, x[:, 0], ids, len(sizes))


OPTIONS: dict[str, Any] = {
    "rounds": 3,
    "key": jax.random.key(3),
    "batch_size": 4,
    "seeds": 2,
    "score": "error",
    "higher": False,
    "counts": (1, 3),
    "fractions": (0.25, 1),
}


@pytest.fixture(scope="module")
def found():
    """One study, which all that follows looks at, and what it was given."""
    kept = {}

    def report_of(study, **options):
        kept["study"] = study
        return decision.report_of(study, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxfl.decision.report.report_of", report_of)
        kept["report"] = jaxfl.should_i_federate(
            *(linear(), optax.sgd(0.05), population()),
            **OPTIONS,
            at_once=2,
            mesh=jaxfl.client_mesh(jax.devices()[:2]),
            private=jaxfl.chain(
                jaxfl.clip(1.0), jaxfl.mean(denominator=3), jaxfl.privacy.gaussian(1.0)
            ),
            bytes_allowed=1.0,
        )
    return kept


def alone(algorithm, channel, data, seed, schedule=None):
    """One run by itself, and what its models score on all held-out examples."""
    key = jax.random.fold_in(OPTIONS["key"], seed)
    init_key, run_key, _ = jax.random.split(key, 3)
    state, _ = jaxfl.simulate(
        *(jaxfl.federate(algorithm, channel), linear().init(init_key), data),
        rounds=3,
        key=run_key,
        cohort_size=schedule,
        progress=False,
    )
    return state


def test_points_of_the_program_are_runs_by_themselves(found):
    """Of a part of the rows, of some of the nodes, and pooled: each run alone."""
    data, study = population(), found["study"]
    train, heldout = runs.split(data, 0.2, seed=0)
    assert study.train.tolist() == [len(own) for own in train] == [16, 16, 8]
    assert study.local_steps == 3  # 13.3 rows in fours
    common = np.sort(np.concatenate(jaxfl.data.client_rows(heldout)))
    test = {k: v[common] for k, v in data.examples.items()}
    plan = runs.plan_of(
        *(data.examples, train),
        rounds=3,
        seeds=2,
        fractions=(0.25, 1),
        counts=(1, 3),
        dropout=0.3,
    )
    work = local.Work(batch_size=4, steps=3)
    loss, sgd = linear().loss, optax.sgd(0.05)

    def error(params):
        return linear().metrics(params, test)["error"].mean()

    def partition(points, p):
        d = points.data
        return dataclasses.replace(
            d, index=d.index[p], start=d.start[p], size=d.size[p]
        )

    averaged = jaxfl.fedavg(loss, sgd, **work)
    # In the order of plan_of: a quarter, all, one node, dropouts; then the next seed.
    for p, expected in (
        (0, study.by_fraction["federated"][0, 0]),
        (1, study.by_fraction["federated"][0, 1]),
        (2, study.by_count["federated"][0, 0]),
        (4, study.by_fraction["federated"][1, 0]),
        (3, study.scores["dropout"].overall[0].mean()),
    ):
        schedule = jaxfl.faults.Schedule(
            np.tile(np.arange(3), (3, 1)), alive=plan.federated.alive[p]
        )
        seed = int(plan.federated.seed[p])
        state = alone(
            averaged, jaxfl.mean(), partition(plan.federated, p), seed, schedule
        )
        np.testing.assert_allclose(error(state.params), expected, rtol=1e-4)
    lone = alone(
        *(jaxfl.isolated(loss, sgd, **work), jaxfl.identity()),
        *(partition(plan.isolated, 0), 0),
    )
    each = [error(w) for w in lone.clients.algorithm]
    np.testing.assert_allclose(
        np.mean(each), study.by_fraction["isolated"][0, 0], rtol=1e-4
    )
    pooled = alone(
        *(jaxfl.fedavg(loss, sgd, batch_size=4, steps=9), jaxfl.mean()),
        *(partition(plan.pooled, 2), 0),
    )
    np.testing.assert_allclose(
        error(pooled.params), study.by_count["pooled"][0, 0], rtol=1e-4
    )


def test_subsets_are_nested_and_of_the_sizes_asked_for():
    train = [np.arange(10), 10 + np.arange(7)]
    examples = {"x": np.arange(17.0)}
    plan = runs.plan_of(
        *(examples, train),
        rounds=2,
        seeds=1,
        fractions=(1, 0.5),
        counts=(2, 1),
        dropout=0.5,
    )
    rows = [
        [set(own.tolist()) for own in jaxfl.data.client_rows(each)]
        for each in (
            dataclasses.replace(
                plan.federated.data,
                **{
                    k: getattr(plan.federated.data, k)[p]
                    for k in ("index", "start", "size")
                },
            )
            for p in range(4)
        )
    ]
    assert [len(own) for own in rows[0]] == [5, 4]
    assert all(a < b for a, b in zip(rows[0], rows[1], strict=True))
    assert rows[1] == rows[2] == rows[3] == [set(range(10)), set(range(10, 17))]
    alive = plan.federated.alive
    assert alive[:2].all() and alive[2].sum(1).tolist() == [1, 1]
    assert plan.pooled.data.size[:, 0].tolist() in ([9, 17, 10], [9, 17, 7])


def test_curves_of_small_nodes_are_over_the_rows_that_they_have():
    """No node trains on fewer than two, and as many rows are one point."""
    train = [np.arange(6), 6 + np.arange(10)]
    plan = runs.plan_of(
        *({"x": np.arange(16.0)}, train),
        rounds=1,
        seeds=1,
        fractions=(1 / 10, 1 / 8, 1 / 2, 1),
        counts=(2,),
        dropout=0.5,
    )
    assert plan.fractions.tolist() == [1 / 8, 1 / 2, 1]
    rows = runs.rows_at([6, 10], plan.fractions)
    assert rows.tolist() == [[2, 2], [3, 5], [6, 10]]
    np.testing.assert_array_equal(plan.federated.data.size[:3], rows)
    assert made_up(0.5, 0.8, train=20).sizes.tolist() == [3, 5, 10, 20]


def test_what_it_costs_is_counted(found):
    costs = found["report"].costs
    assert costs["bytes down"] == 3 * 3 * 4  # rounds, parameters, float32
    assert costs["bytes up"] == 3 * (3 * 4 + 4)  # and the weight beside them
    assert costs["FLOP"] > 3 * 3 * 4 * 3 * 2  # rounds, steps, batch, products
    expected = jaxfl_epsilon(rounds=3)
    assert costs["epsilon"] == pytest.approx(expected)
    assert any("Over budget" in c for c in found["report"].caveats)


def jaxfl_epsilon(rounds):
    from jaxfl import accounting

    channel = jaxfl.chain(
        jaxfl.clip(1.0), jaxfl.mean(denominator=3), jaxfl.privacy.gaussian(1.0)
    )
    return accounting.epsilon(
        channel, population=3, cohort=None, rounds=rounds, delta=1e-5
    )


# --------------------------------------------------------------------------- the report


def made_up(
    isolated, federated, tuned=None, pooled=None, n=4, held=60, constant=(), train=80
):
    """A study whose regimes are right with these probabilities, `[N]` or one."""
    rng = np.random.default_rng(0)

    def scores(p):
        p = np.broadcast_to(p, n)[:, None]
        own = (rng.random((3, n, held)) < p).astype(float)
        overall = (rng.random((3, 900)) < p.mean()).astype(float) + 0 * p.mean()
        return decision.Scores(own, overall)

    pooled = federated if pooled is None else pooled
    p = {"isolated": isolated, "federated": federated, "pooled": pooled}
    p |= {"tuned": federated if tuned is None else tuned, "dropout": federated}
    fractions = np.array([0.125, 0.25, 0.5, 1])
    gap = 0.2 * ((8 * fractions) ** -0.5 - 8**-0.5)
    noise = 0.001 * rng.standard_normal((3, 4))
    curves = {k: np.mean(v) - gap + noise for k, v in p.items()}
    curves |= {f"{k}, own": v for k, v in curves.items()}
    study = decision.Study(
        train=np.full(n, train),
        fractions=fractions,
        counts=np.array([1, 2, 3, 4]),
        scores={k: scores(v) for k, v in p.items()},
        by_fraction=curves,
        by_count={k: v for k, v in curves.items() if "isolated" not in k},
        bytes_up=1e6,
        bytes_down=2e6,
        flops=1e9,
        local_steps=4,
    )
    return decision.report_of(
        study,
        constant=np.isin(np.arange(n), constant),
        score="accuracy",
        higher=True,
        judged="overall",
        worth=None,
        confidence=0.95,
        costs={"bytes up": 1e6, "bytes down": 2e6, "FLOP": 1e9},
        setting={"nodes": n, "seeds": 3, "dropout": 0.3},
    )


def test_verdicts_of_cases_that_are_known():
    assert made_up(0.1, 0.9).verdict.answer == "federate"
    even = made_up(0.95, 0.952)
    assert even.verdict.answer == "not worth it"
    assert "enough of their own" in even.verdict.because
    assert made_up(0.5, 0.51).verdict.answer == "not shown"
    # One node in four loses at home, and no longer once it has fine-tuned.
    at_home, after = np.array([0.4, 0.4, 0.4, 0.95]), np.array([0.9, 0.9, 0.9, 0.4])
    some = made_up(at_home, after, tuned=0.95)
    assert some.verdict.answer == "federate with personalisation"
    assert some.nodes.loses.tolist() == [False, False, False, True]
    # Not if it has one label only, which a constant answers.
    trivial = made_up(at_home, after, tuned=0.95, constant=[3])
    assert trivial.verdict.answer == "federate"
    assert any("only one label" in c for c in trivial.caveats)


def test_federating_against_more_data():
    """1 / sqrt(n): from 0.9 to 0.95 it takes (0.0707 / 0.0207)^2 times the rows."""
    r = made_up(0.9, 0.95)
    assert r.alone.identifiable
    assert r.alone.limit == pytest.approx(0.9 + 0.2 * 8**-0.5, abs=0.01)
    best, low, high = r.as_good_as
    assert low < (0.0707 / 0.0207) ** 2 < high and 4 < best < 30
    np.testing.assert_allclose(
        r.more[0], 0.9 + 0.0707 * (1 - 1 / np.sqrt([2, 4, 10])), atol=0.01
    )
    assert "times its data" in r.markdown()


def test_json_and_back(found):
    for report in (found["report"], made_up(0.5, 0.8)):
        text = report.json()
        json.loads(text, parse_constant=pytest.fail)  # neither NaN nor Infinity
        again = decision.Report.from_json(text)
        a, b = dataclasses.asdict(report), dataclasses.asdict(again)
        assert jax.tree.structure(a) == jax.tree.structure(b)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_array_equal(x, y)
        assert again.json() == text and again.markdown() == report.markdown()


def test_files(found, tmp_path):
    report = found["report"]
    report.write(tmp_path / "new" / "folder")
    files = {f.name: f.read_text() for f in (tmp_path / "new" / "folder").iterdir()}
    assert set(files) == {"report.html", "report.md", "report.json"}
    page = files["report.html"]
    assert page.count("<svg") == page.count("</svg>") == 2
    # It loads nothing: all that is referred to is inside.
    assert not re.search(r"https?:|//[a-z]|<script|<link|@import|src=", page)
    assert set(re.findall(r'href="(.)', page)) <= {"#"}
    assert report.verdict.because in files["report.md"].replace("\n", " ")
    for text in (page, files["report.md"]):
        assert f"Verdict: {report.verdict.answer}" in text
        assert "federated, with noise" in text and "epsilon" in text


def test_titles_are_escaped():
    report = dataclasses.replace(made_up(0.5, 0.8), title="<b>", caveats=("a < b",))
    page = report.html()
    assert "<b>" not in page and "&lt;b&gt;" in page and "<li>a &lt; b</li>" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clients": population(1)}, "at least 2 to federate"),
        ({"clients": population(3, 6)}, "1 of 3 have fewer than 4"),
        ({"score": "accuracy"}, r"no 'accuracy', there are \['error', 'loss'\]"),
        ({"judged": "both"}, "judged must be"),
        ({"worth": 0.0}, "worth must be positive"),
        ({"confidence": 95}, "confidence must be"),
        ({"fractions": (0.5,)}, "with a 1"),
        ({"counts": (1, 2)}, "the last 3"),
        ({"counts": ()}, "the last 3"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"holdout": 1.5}, "holdout must be"),
        ({"private": jaxfl.mean()}, "adds no noise"),
        ({"heldout": population(2)}, "heldout has 2 clients and clients 3"),
        ({"clients": sized(9, 1, 9), "heldout": population()}, "client 1 has 1"),
        ({"heldout": sized(9, 0, 9)}, "must have 1 examples .* node 1 has 0"),
        ({"heldout": sized(9, 9, 1), "judged": "own"}, "must have 2 .* node 2 has 1"),
        ({"test": {"x": np.zeros((0, 3)), "y": np.zeros(0)}}, "no examples"),
    ],
)
def test_bad_arguments(monkeypatch, options, message):
    options = {"clients": population(), **OPTIONS} | options
    monkeypatch.setattr("jaxfl.decision.study.fedavg", pytest.fail)  # nothing is run
    with pytest.raises(ValueError, match=message):
        jaxfl.should_i_federate(linear(), optax.sgd(0.05), **options)


def test_diverged_training_has_no_verdict():
    """What is not a number is neither a loss nor within the noise."""
    with pytest.raises(ValueError, match="of isolated models is not finite"):
        made_up(np.array([0.5, 0.5, 0.5, np.nan]), 0.9)
