"""The notebooks run from top to bottom, with tiny settings, and are kept clean."""

import ast
import os
import re
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def test_stored_without_outputs(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert not cell.metadata, cell.id
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.id


def test_every_code_cell_is_introduced(path):
    kinds = [cell.cell_type for cell in read(path).cells]
    assert kinds[0] == kinds[-1] == "markdown"
    assert ("code", "code") not in zip(kinds, kinds[1:], strict=False)


def test_badge_opens_what_is_installed(path):
    cells = read(path).cells
    repo = re.search(r'^REPO = "https://github.com/(.*)"$', cells[2].source, re.M)
    assert repo
    link = f"/github/{repo[1]}/blob/main/{path.relative_to(ROOT).as_posix()})"
    assert cells[0].source.splitlines()[0].endswith(link)


def test_runs(path, monkeypatch, tmp_path):
    pytest.importorskip("ipykernel")
    if path.stem == "06_turbofan" and not os.environ.get("JAXFL_DATA_DIR"):
        pytest.skip("JAXFL_DATA_DIR is not set: no original C-MAPSS files")
    for name, value in {
        "JAXFL_FAST": "1",
        "IPYTHONDIR": str(tmp_path / "ipython"),  # no one's own start-up files
        "JUPYTER_CONFIG_DIR": str(tmp_path / "jupyter"),
    }.items():
        monkeypatch.setenv(name, value)
    notebook = read(path)
    probe = nbformat.v4.new_code_cell(
        "import sys, jaxfl; print([sys.executable, jaxfl.__file__])"
    )
    notebook.cells.append(probe)
    # Executing adds outputs to `notebook`, which is never written back.
    nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    python, package = ast.literal_eval(probe.outputs[0].text)
    assert python == sys.executable
    assert Path(package).parent == ROOT / "jaxfl"
    problems = [
        (cell.id, output.text)
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.get("name") == "stderr"
    ]
    assert not problems
