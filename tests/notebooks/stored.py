"""The outputs that the chapters on GPUs show without a GPU: tables, plans and pictures, and nothing of a training run.

``python tests/notebooks/stored.py`` runs the cells that need no GPU and stores what they put out; the others, tagged
``gpu``, and the cell that sets the notebook up are stored without outputs. A test runs them again and compares. So a
page never shows what the library no longer says, and never numbers of a toy where a reader expects those of the model.
"""

import os
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("gpu_*.ipynb"))
GPU, SETUP = "gpu", "colab-setup"
QUIET = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "JUPYTER_PLATFORM_DIRS": "1",
    "JUPYTER_PREFER_ENV_PATH": "1",
    "PYTHONPATH": str(ROOT),
    "TINYLORA_OVERRIDES": "",
    "TQDM_DISABLE": "1",
}
"""The environment in which every machine puts out the same."""


def outputs(paths: list[Path]) -> list[list[list[dict[str, Any]]]]:
    """What each code cell of each notebook puts out, ``[notebook][code cell]``; all in one kernel, wiped in between."""
    books = [nbformat.read(path, as_version=4) for path in paths]
    sources = [
        source
        for book in books
        for source in [*(cell.source for cell in code_cells(book) if not left_out(cell)), "%reset -f"]
    ]
    joined = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, sources)))
    NotebookClient(
        joined,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(paths[0].parent)}},
        record_timing=False,
        coalesce_streams=True,  # how many pieces a stream arrives in is a matter of time
    ).execute(env=os.environ | QUIET)
    done = iter(joined.cells)
    found = []
    for book in books:
        found.append([[] if left_out(cell) else clean(next(done).outputs) for cell in code_cells(book)])
        next(done)
    return found


def code_cells(book: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in book.cells if cell.cell_type == "code"]


def needs_gpu(cell: nbformat.NotebookNode) -> bool:
    return GPU in cell.metadata.get("tags", [])


def left_out(cell: nbformat.NotebookNode) -> bool:
    """What depends on the machine: whatever a GPU is needed for, and the cell that sets the notebook up."""
    return needs_gpu(cell) or SETUP in cell.metadata.get("tags", [])


def clean(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Outputs without what no two runs share: the count of executions, and what was written to standard error."""
    kept = [dict(output) for output in given if output.get("name") != "stderr"]
    return [output | {"execution_count": None} if "execution_count" in output else output for output in kept]


def main() -> None:
    for path, found in zip(NOTEBOOKS, outputs(NOTEBOOKS), strict=True):
        book = nbformat.read(path, as_version=4)
        for cell, output in zip(code_cells(book), found, strict=True):
            cell.outputs, cell.execution_count = [nbformat.from_dict(each) for each in output], None
        path.write_text(nbformat.writes(book, indent=1) + "\n", encoding="utf-8")
        print(f"{path.name}: {sum(map(len, found))} outputs", file=sys.stderr)


if __name__ == "__main__":
    main()
