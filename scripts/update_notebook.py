"""Execute docs/demo.ipynb and store its outputs: python scripts/update_notebook.py."""

import os
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOK = Path(__file__).parents[1] / "docs" / "demo.ipynb"


def executed(*, environment: Mapping[str, str]) -> NotebookNode:
    """Return the notebook with the outputs of a fresh run; a cell that fails raises."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", coalesce_streams=True, record_timing=False)
    client.execute(env=dict(environment))
    return notebook


if __name__ == "__main__":
    nbformat.write(executed(environment=os.environ), NOTEBOOK)
    print(f"wrote {NOTEBOOK}, {NOTEBOOK.stat().st_size // 1000} kB")
