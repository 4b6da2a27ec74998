"""Notebooks as text: what the build and a phone's screen ask of them."""

import json

import pytest

COLUMNS = 78


@pytest.fixture(scope="module")
def notebooks(texts) -> dict[str, dict]:
    found = {name: json.loads(text) for name, text in texts.items() if name.endswith(".ipynb")}
    if not found:
        pytest.skip("no notebooks yet")
    return found


def test_code_fits_the_page(notebooks):
    wide = [
        f"{name}, cell {number}: {line}"
        for name, notebook in notebooks.items()
        for number, cell in enumerate(notebook["cells"])
        if cell["cell_type"] == "code"
        for line in "".join(cell["source"]).splitlines()
        if len(line) > COLUMNS
    ]
    assert wide == []


def test_every_reader_has_the_kernel(notebooks):
    kernels = {notebook["metadata"]["kernelspec"]["name"] for notebook in notebooks.values()}
    assert kernels == {"python3"}


def test_no_stored_widget(notebooks):
    # A page with a stored widget loads its scripts from a CDN.
    stored = [name for name, notebook in notebooks.items() if "widgets" in notebook["metadata"]]
    assert stored == []
