"""What the chapters at full size need around a run."""

import sys
import types
from pathlib import Path

import pytest
import torch

from tinylora_lite.book import colab
from tinylora_lite.evaluation.score import Completion, Score
from tinylora_lite.experiment.presets import preset
from tinylora_lite.planning.gpus import GPUS
from tinylora_lite.planning.plan import plan_run

GIB = 2**30
DEVICES = [
    ("Tesla T4", 14.6, "t4"),
    ("NVIDIA L4", 22.0, "l4"),
    ("NVIDIA L40S", 44.4, "l40s"),
    ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40gb"),
    ("NVIDIA A100-SXM4-80GB", 79.1, "a100-80gb"),
    ("NVIDIA A100 80GB PCIe", 79.1, "a100-80gb"),
    ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
    ("NVIDIA H200", 139.8, "h200"),
    ("NVIDIA GeForce RTX 4090", 23.5, "4090"),
    ("NVIDIA GeForce GTX 1080", 7.9, None),
]
"""Names as ``torch.cuda.get_device_name`` gives them, and GiB."""


@pytest.mark.parametrize(("name", "gib", "gpu"), DEVICES)
def test_a_gpu_is_known_by_its_name_and_memory(monkeypatch, name, gib, gpu):
    found = types.SimpleNamespace(name=name, total_memory=int(gib * GIB))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: found)
    assert colab.gpu_here() == gpu


def test_no_gpu_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert colab.gpu_here() is None


@pytest.mark.parametrize("gpu", GPUS)
def test_every_gpu_has_a_preset_that_computes_there(gpu):
    settings = preset("qwen2.5-0.5b/gsm8k", gpu=colab.preset_gpu(gpu))
    assert (settings.dtype == "bfloat16") == GPUS[gpu].bfloat16


def test_in_colab_the_folder_lies_on_drive_and_elsewhere_here(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    assert colab.place("runs") == Path("runs")
    mounted = []
    drive = types.SimpleNamespace(mount=lambda path: (mounted.append(path), Path(path).mkdir()))
    google = types.ModuleType("google.colab")
    monkeypatch.setitem(sys.modules, "google.colab", google)
    monkeypatch.setitem(sys.modules, "google.colab.drive", drive)
    google.drive = drive
    monkeypatch.setattr(colab, "DRIVE", tmp_path / "drive")
    assert colab.place("runs") == tmp_path / "drive" / "MyDrive" / "runs"
    assert colab.place("runs") == tmp_path / "drive" / "MyDrive" / "runs"
    assert mounted == [str(tmp_path / "drive")], "once"


def test_overrides_come_from_the_environment(monkeypatch):
    monkeypatch.delenv("TINYLORA_OVERRIDES", raising=False)
    assert colab.overrides() == []
    monkeypatch.setenv("TINYLORA_OVERRIDES", " training.steps=2\n  model=nano ")
    assert colab.overrides() == ["training.steps=2", "model=nano"]


def test_a_plan_says_what_it_takes_and_what_it_costs():
    plan = plan_run(preset("qwen2.5-7b/gsm8k").override(["learning_rates=[]"]), "a100-80gb", price=2.0)
    text = colab.plan_table(plan)
    assert text.count("| **all of it** |") == len(plan.peaks)
    assert f"| base weights | always | {plan.terms[0].bytes / GIB:.2f} |" in text
    assert f"{plan.time.hours.low:.1f} to {plan.time.hours.high:.1f} hours, planned and not measured" in text
    assert f"Cost: {2 * plan.time.hours.low:,.2f}" in text
    assert "13 parameters" in text


def test_a_plan_that_does_not_fit_says_what_would():
    plan = plan_run(preset("qwen2.5-7b/gsm8k").override(["learning_rates=[]"]), "a100-40gb")
    assert plan.advice
    text = colab.plan_table(plan)
    assert f"It fits with `{' '.join(plan.advice)}`." in text
    assert "hours" not in text


def score(rewards: list[float], samples: int = 1) -> Score:
    rows = [Completion(f"p{i // samples}", "1", f"t{i}", reward, 3, False) for i, reward in enumerate(rewards)]
    return Score.of(rows, samples)


def test_the_problems_that_changed():
    found = list(colab.changed(score([0, 1, 1, 0]), score([1, 1, 0, 0])))
    assert [(before.prompt, before.reward, after.reward) for before, after in found] == [("p0", 0, 1), ("p2", 1, 0)]


def test_of_several_samples_the_first_is_compared():
    found = list(colab.changed(score([0, 1, 1, 1], samples=2), score([1, 0])))
    assert [(before.text, after.text) for before, after in found] == [("t0", "t0"), ("t2", "t1")]
