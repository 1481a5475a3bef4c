"""The gallery: a page from what experiments left behind."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import common, gallery

ROOT = Path(__file__).parent.parent

EXPERIMENT = '''
"""What an average is worth: nothing.

And more.
"""
import json
import pathlib

PRESETS = {
    "ci": 1,
}

def main():
    %s

if __name__ == "__main__":
    main()
'''

LEAVES = """
    folder = pathlib.Path("results", "good")
    folder.mkdir(parents=True, exist_ok=True)
    run = {"command": "go", "device": "2 CPU cores", "seconds": 1.5}
    table = {"title": "T", "columns": ["a", "b"], "rows": [["c|d", "1.5"]]}
    summary = {"run": run, "settings": {"preset": "ci"}, "tables": [table]}
    (folder / "summary.json").write_text(json.dumps(summary))
"""


def record(preset, command, seconds, rows, figure=None):
    made = {"command": command, "device": "2 CPU cores", "seconds": seconds}
    table = {"title": "Rounds to 97 %", "columns": ["", "ours", "paper"], "rows": rows}
    settings = {"preset": preset, "seeds": [0, 1]}
    of_figure = {} if figure is None else {"figure": figure}
    return {"run": made, "settings": settings, "tables": [table], **of_figure}


def section(page, name):
    """What the page says of one experiment."""
    return re.split(r"^## ", page.partition(f"\n## {name}\n")[2], flags=re.MULTILINE)[0]


def test_every_experiment_of_the_repository_is_found():
    found = gallery.experiments()
    # What it goes by is the text of the modules; this, what they are.
    for name in ("mnist_skews", "processes", "sweeps"):
        module = __import__(f"experiments.{name}", fromlist=["main"])
        assert "ci" in module.PRESETS and callable(module.main)
        assert found[name] == module.__doc__.splitlines()[0]
    assert not {"common", "gallery", "baselines", "turbofan_models"} & set(found)
    assert all(purpose.endswith(".") for purpose in found.values())


def test_page():
    purposes = {"one": "Both of them.", "two": "Small alone.", "three": "Neither."}
    small_one = record("ci", "run one", 8.4, [["2NN", "3", ""]], "ci/one.png")
    small_two = record("ci", "run two", 51.6, [["a|b", "> 40", "x_y <z>\nw"]])
    whole = record("full", "run one whole", None, [["2NN", "36", "87"]])
    page = gallery.page(
        purposes, {"one": whole}, {"one": small_one, "two": small_two}, {}
    )
    assert page.startswith(gallery.HEAD) and "Failed" not in page
    assert "| [one](#one) | Both of them. | `full` | 8 |\n" in page
    assert "| [two](#two) | Small alone. |  | 52 |\n" in page
    assert "| [three](#three) | Neither. |  |  |\n" in page
    assert "All presets `ci` together: 1 minutes." in page
    assert section(page, "one") == (
        "\nBoth of them. ([source](experiments/one.py))\n\n"
        "![Both of them.](ci/one.png)\n\n"
        "*Figure: preset `ci`, 2 CPU cores.*\n\n"  # the whole run has none
        "Preset `full` on 2 CPU cores:\n\n"  # nor seconds
        "```sh\nrun one whole\n```\n\n"
        "Rounds to 97 %:\n\n"
        "|  | ours | paper |\n| --- | --- | --- |\n| 2NN | 36 | 87 |\n\n"
        "<details><summary>settings</summary>\n\n"
        '`preset "full"; seeds [0, 1]`\n\n</details>\n\n'
        "Preset `ci` on 2 CPU cores, 8 seconds:\n\n"
        "```sh\nrun one\n```\n\n"
        "<details><summary>numbers</summary>\n\n"
        "Rounds to 97 %:\n\n"
        "|  | ours | paper |\n| --- | --- | --- |\n| 2NN | 3 |  |\n\n"
        "</details>\n\n"
        "<details><summary>settings</summary>\n\n"
        '`preset "ci"; seeds [0, 1]`\n\n</details>\n\n'
    )
    two = section(page, "two")
    assert "![" not in two and "Figure" not in two and "numbers" not in two
    assert "| a\\|b | > 40 | x\\_y \\<z> w |\n" in two
    assert section(page, "three").strip().endswith("Not run yet.")


def test_figure_of_the_whole_run_comes_first():
    small = record("ci", "a", 1.0, [], "ci/one.png")
    whole = record("full", "b", 1.0, [], "one.png")
    page = gallery.page({"one": "One."}, {"one": whole}, {"one": small}, {})
    assert "![One.](one.png)" in page and "ci/one.png" not in page
    assert "*Figure: preset `full`, 2 CPU cores.*" in page


def test_what_failed_is_named_and_keeps_its_record():
    small = {"one": record("ci", "a", 1.0, [["old", "1", "2"]])}
    purposes = {"one": "One.", "two": "Two."}
    failed = {"one": "ValueError: a|b", "two": "not done after 900 s"}
    page = gallery.page(purposes, {}, small, failed)
    assert "- [one](#one): ValueError: a\\|b\n" in page.partition("## one")[0]
    assert "**Failed**: ValueError: a\\|b" in section(page, "one")
    assert "| old | 1 | 2 |" in section(page, "one")
    assert "**Failed**: not done after 900 s" in section(page, "two")


def test_records_and_figures_of_results(tmp_path):
    import matplotlib.figure

    results = tmp_path / "results" / "one"
    results.mkdir(parents=True)
    summary = {"accuracy": np.arange(10_000), "settings": {"preset": "full"}}
    common.save_summary(results, summary)
    common.print_table(results, "T", ("a", "b"), [("c", np.float32(0.5))])
    into = Path("figures")
    gallery.take(results, tmp_path / into)
    assert "figure" not in gallery.records(tmp_path, into)["one"]

    figure = matplotlib.figure.Figure()
    figure.subplots().imshow(np.random.default_rng(0).random((64, 64)))
    figure.savefig(results / "one_2nn.png", dpi=150)
    gallery.take(results, tmp_path / into)
    found = gallery.records(tmp_path, into)["one"]
    assert found["tables"] == [
        {"title": "T", "columns": ["a", "b"], "rows": [["c", "0.5"]]}
    ]
    assert found["settings"] == {"preset": "full"}
    assert found["run"]["seconds"] > 0 and "accuracy" not in found
    assert found["figure"] == "figures/one.png"
    taken, drawn = tmp_path / found["figure"], results / "one_2nn.png"
    assert taken.read_bytes().startswith(b"\x89PNG")
    assert taken.stat().st_size < drawn.stat().st_size


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A root with experiments of our own, which import nothing that takes time."""
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "good.py").write_text(EXPERIMENT % LEAVES)
    (folder / "bad.py").write_text(EXPERIMENT % "raise ValueError('no | data')")
    (folder / "silent.py").write_text(EXPERIMENT % "pass")
    (folder / "helper.py").write_text('"""Helps."""')
    monkeypatch.setattr(gallery, "ROOT", tmp_path)
    monkeypatch.setattr(gallery.experiments, "__defaults__", (tmp_path,))
    monkeypatch.setattr(gallery.run, "__defaults__", (tmp_path,))
    return tmp_path


def test_from_runs_to_page(repository, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gallery.py"])
    with pytest.raises(SystemExit, match="failed: bad, silent"):
        gallery.main()
    page = (repository / "GALLERY.md").read_text("utf-8")
    assert "| [good](#good) | What an average is worth: nothing. |" in page
    assert "| c\\|d | 1.5 |" in section(page, "good")
    assert "```sh\ngo\n```" in section(page, "good")
    assert "**Failed**: ValueError: no \\| data" in section(page, "bad")
    assert "left no record" in section(page, "silent") and "helper" not in page

    # Only what has not been run is run again, or what is older than the code.
    log = repository / gallery.RUNS / "good.log"
    before = log.stat().st_mtime_ns
    assert gallery.run("good") is None and log.stat().st_mtime_ns == before
    (repository / "experiments" / "helper.py").write_text("")
    assert gallery.run("good") is None and log.stat().st_mtime_ns > before

    # What is taken from another preset's results stands before it from now on.
    whole = repository / "results" / "good"
    whole.mkdir(parents=True)
    common.save_summary(whole, {"settings": {"preset": "full"}})
    monkeypatch.setattr(sys, "argv", ["gallery.py", "--skip-run", "--take", str(whole)])
    gallery.main()
    page = (repository / "GALLERY.md").read_text("utf-8")
    good = section(page, "good")
    assert good.index("Preset `full`") < good.index("Preset `ci`")
    assert "Failed" not in page


@pytest.mark.parametrize("option", ["--only", "--take"])
def test_unknown_experiments(option, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gallery.py", option, "results/nope"])
    with pytest.raises(SystemExit, match=r"unknown: \['.*nope'\]; there are"):
        gallery.main()


def test_the_page_is_that_of_its_records():
    page = gallery.page(
        gallery.experiments(),
        gallery.records(ROOT, gallery.FIGURES),
        gallery.records(ROOT, gallery.SMALL),
        {},
    )
    text = (ROOT / "GALLERY.md").read_text("utf-8")
    assert text == page, "python -m experiments.gallery --skip-run writes it anew"


def test_links_of_the_page_lead_somewhere():
    text = (ROOT / "GALLERY.md").read_text("utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text)
    assert len(links) > len(gallery.experiments())
    assert not [link for link in links if not (ROOT / link).exists()]
    names = set(re.findall(r"^\| \[(\w+)\]", text, re.MULTILINE))
    assert names == set(gallery.experiments())


def test_records_are_small():
    files = [*(ROOT / gallery.FIGURES).rglob("*")]
    assert sum(f.stat().st_size for f in files if f.is_file()) < 3e6
    for path in files:
        if path.suffix == ".json":
            assert set(json.loads(path.read_text("utf-8"))) == {
                *("run", "settings", "tables")
            }
