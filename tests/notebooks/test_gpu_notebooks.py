"""The chapters on GPUs, from top to bottom on the nano base; and what they show where there is no GPU."""

import json
import re
from pathlib import Path

import nbformat
import pytest
import stored

NAMES = [path.name for path in stored.NOTEBOOKS]
SHORT = [
    *("model=nano", "task=nano", "dtype=float32", "quantize=null", "gradient_checkpointing=false", "data=null"),
    *("prompt=null", "max_prompt_tokens=256", "adapter.n_tie=4", "learning_rates=[]", "training.steps=2"),
    *("training.prompts_per_step=4", "training.group_size=4", "training.micro_batch=16", "training.max_new_tokens=24"),
    *("training.learning_rate=0.1", "sampler.engine=transformers", "evaluation.tasks=[nano]"),
    *("evaluation.problems=12", "evaluation.max_new_tokens=24"),
]


def text_of(cell) -> str:
    """What a cell put out, as text and HTML together."""
    parts = []
    for output in cell.outputs:
        data = output.get("data", {})
        parts.append(output.get("text") or data.get("text/markdown") or data.get("text/html") or data.get("text/plain"))
    return "\n".join(map(str, parts))


def code_with(book, needle: str):
    (cell,) = (cell for cell in stored.code_cells(book) if needle in cell.source)
    return cell


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_on_nano_from_top_to_bottom(run_notebook, name, folder):
    book = run_notebook(name, [*SHORT, f"folder={folder / name}"])
    told = text_of(code_with(book, "with Dashboard(tokenizer)"))
    assert "grpo, rate 0.1: step 2 of 2, reward" in told
    assert "widget" not in json.dumps(book.metadata)
    last = text_of(book.cells[-1])
    assert "| numbers |" in last
    assert f"runs/{name}" in last, "the run of this very notebook is a row"
    shown = text_of(code_with(book, "for file in FILES"))
    assert [json.loads(Path(path).read_text())["parameters"] for path in shown.split()[1:]] == [13, 13]


def test_after_a_disconnect_the_same_notebook_goes_on(run_notebook, folder):
    """A new kernel, the same folder: nothing is sampled again, and the run it finds is the one that was made."""
    name = NAMES[0]
    if not (folder / name / "outcome.json").exists():
        run_notebook(name, [*SHORT, f"folder={folder / name}"])
    kept = {path: path.read_bytes() for path in (folder / name).rglob("*.jsonl")}
    checkpoint = (folder / name / "run.json").read_bytes()
    assert kept
    book = run_notebook(name, [*SHORT, f"folder={folder / name}"])
    told = text_of(code_with(book, "with Dashboard(tokenizer)"))
    assert "step" not in told.replace("steps", ""), "no step is made twice"
    assert (folder / name / "run.json").read_bytes() == checkpoint
    assert {path: path.read_bytes() for path in (folder / name).rglob("*.jsonl")} == kept


@pytest.mark.parametrize("path", stored.NOTEBOOKS, ids=NAMES)
def test_no_number_of_a_training_run_is_stored(path):
    book = nbformat.read(path, as_version=4)
    gpu = [cell for cell in stored.code_cells(book) if stored.needs_gpu(cell)]
    assert len(gpu) >= 5
    assert [cell.source for cell in gpu if cell.outputs] == []
    made = re.compile(r"\b(?:outcome|board|result|tokenizer)\b")
    shown = [cell for cell in stored.code_cells(book) if not stored.needs_gpu(cell)]
    assert [cell.source for cell in shown if made.search(cell.source)] == []
    assert "not yet run" in text_of(book.cells[-1])


def test_what_is_stored_is_what_the_library_says_now():
    pytest.importorskip("myst_nb")
    for path, found in zip(stored.NOTEBOOKS, stored.outputs(stored.NOTEBOOKS), strict=True):
        book = nbformat.read(path, as_version=4)
        kept = [stored.clean(cell.outputs) for cell in stored.code_cells(book)]
        differ = [
            cell.source.splitlines()[0]
            for cell, old, new in zip(stored.code_cells(book), kept, found, strict=True)
            if not re.match("(?s).*print\\(package", cell.source) and list(map(dict, old)) != list(map(dict, new))
        ]
        assert differ == [], f"{path.name} shows what is out of date; run python tests/notebooks/stored.py"
