"""The README's example runs as it stands, and what the README points to is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs(capsys):
    example, *_ = re.findall(r"```python\n(.*?)```", README, re.S)
    assert "rounds=20" in example
    exec(example.replace("rounds=20", "rounds=2"), {})
    accuracy = float(capsys.readouterr().out.splitlines()[-1])
    assert 0.3 < accuracy <= 1


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"@[A-Z]+@|TODO|XXX", README)


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert len(links) > 20
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing
