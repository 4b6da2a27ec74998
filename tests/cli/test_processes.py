"""What a run on CPUs computes with, and the processes that one command starts."""

import json
import os
from pathlib import Path

import pytest
import torch

from tinylora_lite.cli.processes import FILE, computing, started
from tinylora_lite.experiment.run import dtype_of
from tinylora_lite.experiment.settings import RunSettings
from tinylora_lite.utils import cpu
from tinylora_lite.utils.cpu import Computing, choose, measure

ROOT = Path(__file__).parents[2]


def rates(one=100.0, bfloat16=50.0, together=400.0, threads=100.0) -> dict[str, float]:
    return {"float32": one, "bfloat16": bfloat16, "4 x float32": together, "4 threads": threads}


@pytest.mark.parametrize(
    ("measured", "options", "chosen"),
    [
        ({}, {"shares": 8, "most": 9}, ("float32", 1, 4)),
        ({}, {"shares": 0, "most": 9}, ("float32", 1, 4)),
        ({}, {"shares": 6, "most": 9}, ("float32", 1, 3)),
        ({}, {"shares": 0, "most": 2.5}, ("float32", 1, 2)),
        ({}, {"shares": 0, "most": 0.1}, ("float32", 1, 1)),
        ({"together": 274.0}, {"shares": 0, "most": 9}, ("float32", 1, 2)),
        ({"together": 276.0}, {"shares": 0, "most": 9}, ("float32", 1, 3)),
        ({"together": 30.0}, {"shares": 0, "most": 9}, ("float32", 1, 1)),
        ({"threads": 350.0}, {"shares": 1, "most": 9}, ("float32", 4, 1)),
        ({"threads": 350.0}, {"shares": 2, "most": 9}, ("float32", 2, 2)),
        ({"threads": 350.0, "together": 800.0}, {"shares": 0, "most": 9}, ("float32", 1, 8)),
        ({"threads": 250.0}, {"shares": 1, "most": 9}, ("float32", 1, 1)),
        ({"bfloat16": 195.0}, {}, ("float32", 1, 1)),
        ({"bfloat16": 205.0}, {}, ("bfloat16", 1, 1)),
    ],
)
def test_the_choice(monkeypatch, measured, options, chosen):
    monkeypatch.setattr(cpu, "measure", lambda: rates(**measured))
    monkeypatch.setattr(cpu, "cores", lambda: 4)
    found = choose("auto", "auto", "auto", **options)
    assert (found.dtype, found.threads, found.processes) == chosen
    assert found.gflops == rates(**measured)


def test_what_is_given_stays_and_needs_no_measurement(monkeypatch):
    monkeypatch.setattr(cpu, "measure", lambda: pytest.fail("measured"))
    assert choose("bfloat16", 3, 5, shares=1) == Computing("bfloat16", 3, 5)
    monkeypatch.setattr(cpu, "measure", rates)
    assert choose("bfloat16", "auto", 5, shares=1) == Computing("bfloat16", 1, 5, rates())


def test_the_measurement():
    torch.set_num_threads(1)
    found = measure()
    assert list(found)[:2] == ["float32", "bfloat16"]
    assert min(found.values()) > 0
    assert torch.get_num_threads() == 1
    assert f"{found['float32']:.0f}" in str(Computing("float32", 1, 1, found))


def test_a_run_that_goes_on_keeps_what_was_chosen(monkeypatch, tmp_path, capsys, make_model, tokenizer):
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    settings = RunSettings(model=str(tmp_path / "base"), task="nano")
    monkeypatch.setattr(cpu, "measure", lambda: rates(bfloat16=300.0))
    monkeypatch.setattr(cpu, "cores", lambda: 4)

    def run(**changes):
        changed = settings.model_copy(update=changes)
        with computing(changed, [], shares=1, folder=tmp_path) as now:
            return now.dtype, now.threads, now.processes

    assert run() == ("bfloat16", 1, 1)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "CPU: bfloat16, processes: 1, threads of each: 1 (GFLOP/s: " + (
        "float32 100, bfloat16 300, 4 x float32 400, 4 threads 100)"
    )
    kept = json.loads((tmp_path / FILE).read_text())
    assert kept == {"dtype": "bfloat16", "threads": 1, "processes": 1, "gflops": rates(bfloat16=300.0)}
    monkeypatch.setattr(cpu, "measure", lambda: pytest.fail("measured again"))
    assert run() == ("bfloat16", 1, 1)
    assert run(dtype="float32", threads=2) == ("float32", 2, 1)
    assert json.loads((tmp_path / FILE).read_text()) == kept | {"dtype": "float32", "threads": 2}


def test_a_run_goes_on_in_its_own_dtype(tmp_path):
    assert dtype_of(tmp_path) is None
    for dtype, expected in (("auto", None), ("bfloat16", "bfloat16")):
        RunSettings(model="nano", task="nano", dtype=dtype).save(tmp_path / "settings.yaml")
        assert dtype_of(tmp_path) == expected


def test_a_process_that_fails_says_why(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    failing = started(Computing("float32", 1, 2), ["train", "nowhere.yaml"])
    with (
        pytest.raises(RuntimeError, match=r"exit code 1 \(tinylora train: error: no settings file at nowhere.yaml"),
        failing,
    ):
        pytest.fail("the block began without the other process")
    assert "WORLD_SIZE" not in os.environ
