"""`tinylora train` in two processes: they share the problems, and the first one shows and writes the result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tinylora_lite as tl
from tinylora_lite import nano

pytest.importorskip("accelerate")

ROOT = Path(__file__).parents[2]
SETTINGS = [
    *("nano", "training.steps=1", "training.prompts_per_step=4", "training.group_size=2"),
    *("evaluation.problems=5", "evaluation.samples=2"),
]


def test_two_processes_evaluate_all_problems_once(tmp_path):
    # The launcher for several GPUs is the one that starts several processes; without a GPU they use the CPU.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port=0"]
    launch += ["--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    command = [*launch, "--num_cpu_threads_per_process=1", "-m", "tinylora_lite", "train", *SETTINGS]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, f"folder={tmp_path}", "--json"], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert json.loads((tmp_path / "outcome.json").read_text()) == found
    assert done.stderr.count("testing: nano, base") == 1, "the second process says nothing"
    for name in ("base", "trained"):
        score = found[name]["nano"]
        assert (score["n"], score["samples"]) == (5, 2)
        parts = [tl.Score.load(tmp_path / name / "nano" / f"{i}-of-2").completions for i in (1, 2)]
        asked = [example.prompt for example in nano.task().test[:5] for _ in range(2)]
        # Five problems for two: the last one is dealt twice and counted once.
        assert [c.prompt for c in parts[0]] == asked[0:2] + asked[4:6] + asked[8:10]
        assert [c.prompt for c in parts[1]] == asked[2:4] + asked[6:8] + asked[8:10]
        right = sum(c.reward for part in (parts[0], parts[1][:4]) for c in part)
        assert score["accuracy"] == right / 10
