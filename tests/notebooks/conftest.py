"""What the tests of the notebooks share."""

import os
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))  # the tests run without being a package


@pytest.fixture(scope="session")
def run_notebook():
    """``run_notebook(name, overrides, **environment)``: a copy, run from top to bottom in a kernel of its own."""
    nbclient = pytest.importorskip("nbclient")

    def run(name: str, overrides: list[str], **environment: str) -> nbformat.NotebookNode:
        book = nbformat.read(ROOT / "notebooks" / name, as_version=4)
        quiet = {"CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        quiet |= {"JUPYTER_PREFER_ENV_PATH": "1", "JUPYTER_PLATFORM_DIRS": "1"}
        quiet |= {"TINYLORA_OVERRIDES": " ".join(overrides)}
        client = nbclient.NotebookClient(
            book, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "notebooks")}}
        )
        client.execute(env=os.environ | {"PYTHONPATH": str(ROOT)} | quiet | environment)
        return book

    return run
