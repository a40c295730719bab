"""The notebook runs, and its stored outputs are complete, small and free of local paths."""

import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from scripts.update_notebook import NOTEBOOK, executed
from tests.project_helpers import clean_environment

MOST_BYTES = 300_000


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


@pytest.mark.slow
def test_notebook_runs_and_its_stored_outputs_are_current(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    environment = clean_environment() | {"IPYTHONDIR": str(tmp_path / "ipython"), "TMPDIR": str(tmp_path)}
    kept, notebook = nbformat.read(NOTEBOOK, as_version=4), executed(environment=environment)
    for ours, theirs in zip(code_cells(kept), code_cells(notebook), strict=True):
        assert [one.output_type for one in ours.outputs] == [one.output_type for one in theirs.outputs], ours.source
        assert len(printed(ours).splitlines()) == pytest.approx(len(printed(theirs).splitlines()), abs=6), ours.source
    text = "".join(printed(cell) for cell in code_cells(notebook))
    assert "prostate_seg version 1 is champion now" in text
    assert len(list(tmp_path.glob("prostate_seg-*/predictions/masks/*.nii.gz"))) == 4


def test_stored_outputs_are_small_and_contain_no_local_paths() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < MOST_BYTES
    assert not re.search(r"/(home|root|work|tmp|Users)/", text)
    assert "Traceback" not in text
    for cell in code_cells(nbformat.read(NOTEBOOK, as_version=4))[1:]:
        assert cell.outputs, cell.source


def test_links_of_the_notebook_exist() -> None:
    cells = [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "markdown"]
    links = re.findall(r"\]\(([^)#]+)", "\n".join(cells))
    assert links
    assert [link for link in links if not (NOTEBOOK.parent / link).is_file()] == []
