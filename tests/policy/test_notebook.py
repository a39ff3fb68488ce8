# SPDX-License-Identifier: MIT
"""The notebook runs from its first cell to its last, at a small size."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "gated_deltanet_research.ipynb"


def test_the_notebook_runs(monkeypatch):
    monkeypatch.setenv("FLA_SMALL", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # outputs are not kept
    done = NotebookClient(
        notebook, timeout=200, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()
    outputs = [out for cell in done.cells for out in cell.get("outputs", [])]
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(pictures) >= 5
