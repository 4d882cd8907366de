"""The notebooks run from top to bottom, and what is committed of them is fit to be read."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = ("01_swap_a_kernel", "02_paged_attention", "03_anatomy_of_a_decode_step", "04_scheduling")
LONGEST_CELL = 30
"""Lines: about a screen."""
LARGEST_PICTURE = 100_000
"""Bytes."""
ABSOLUTE_PATH = re.compile(r"""(?:^|[\s"'(=])(/[\w.-]+/[\w./-]+)""")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


@pytest.fixture(params=NAMES)
def notebook(request) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{request.param}.ipynb", 4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def texts(notebook: nbformat.NotebookNode) -> list[str]:
    """What the outputs say: streams, and results as text and HTML."""
    data = [value for o in outputs(notebook) for kind, value in o.get("data", {}).items() if kind.startswith("text/")]
    return data + [output.text for output in outputs(notebook) if output.output_type == "stream"]


def test_these_are_all():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == list(NAMES)


def test_it_runs(notebook, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # it sets that itself, where there is no GPU
    options = {"kernel_name": "python3", "extra_arguments": ["--HistoryManager.enabled=False"]}
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}, **options).execute()
    assert len(outputs(notebook)) > 5 and not [o for o in outputs(notebook) if o.get("name") == "stderr"]


def test_it_was_run_from_top_to_bottom(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert len(outputs(notebook)) > 5
    assert not [o for o in outputs(notebook) if o.output_type == "error" or o.get("name") == "stderr"]


def test_it_knows_nothing_of_the_machine_it_was_run_on(notebook):
    for text in texts(notebook):
        assert ABSOLUTE_PATH.findall(text) == []
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3" and notebook.metadata.language_info == {"name": "python"}
    assert not any(cell.metadata for cell in notebook.cells)


@pytest.mark.parametrize("text", ["/home/me/x.py:3: in f", "File '/tmp/a/b'", "at (/root/x)", "path=/mnt/data/x"])
def test_an_absolute_path_is_seen(text):
    assert ABSOLUTE_PATH.search(text)


@pytest.mark.parametrize("text", ["a / b", "tokens/s, MB/s", "kernels/op.py", "</td></tr>", "1/2 /3", "// 2 / 3"])
def test_what_is_no_absolute_path_is_not(text):
    assert not ABSOLUTE_PATH.search(text)


def test_its_cells_fit_a_screen_and_its_pictures_are_small(notebook):
    for cell in code_cells(notebook):
        assert cell.source.count("\n") < LONGEST_CELL, cell.source
    pictures = [output.data["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]
    assert pictures and all(len(base64.b64decode(picture)) < LARGEST_PICTURE for picture in pictures)


def test_its_links_lead_to_files(notebook):
    links = [link for cell in notebook.cells if cell.cell_type == "markdown" for link in LINK.findall(cell.source)]
    assert all((FOLDER / link).exists() for link in links), links
