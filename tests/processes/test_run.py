"""`tinylora train` and `tinylora eval` in two processes compute what one computes, whoever starts the processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tinylora_lite as tl
from tinylora_lite.utils.record import Run

ROOT = Path(__file__).parents[2]
# Five problems do not divide evenly, and neither do the batches of three answers.
SETTINGS = [
    *("nano", "training.steps=2", "training.prompts_per_step=4", "training.group_size=4", "training.learning_rate=0.1"),
    *("evaluation.problems=5", "evaluation.samples=2", "evaluation.temperature=1.0", "sampler.batch_size=3"),
]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(*words: str, launcher: tuple[str, ...] = ()) -> tuple[dict, str]:
    command = [sys.executable, *launcher, "-m", "tinylora_lite", *words, "--json"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = done.stdout.splitlines()
    return json.loads(line), done.stderr


def train(folder: Path, *words: str, launcher: tuple[str, ...] = ()) -> dict:
    found, errors = run("train", *SETTINGS, *words, f"folder={folder}", launcher=launcher)
    assert json.loads((folder / "outcome.json").read_text()) == found
    assert errors.count("testing: nano, base") == 1, "the second process says nothing"
    return found


def same(one: Path, two: Path) -> None:
    for name in ("base", "trained"):
        mine, theirs = (tl.Score.load(folder / name / "nano") for folder in (one, two))
        assert mine.completions == theirs.completions
        assert len(mine.completions) == 10
    mine, theirs = (Run.load(folder / "run.json") for folder in (one, two))
    assert mine.curve() == theirs.curve()
    for key in ("v0", "length", "entropy"):
        assert mine.curve(key) == pytest.approx(theirs.curve(key), abs=2e-4)
    assert abs(mine.curve("v0")[-1]) > 0.01


def test_one_command_starts_both(tmp_path):
    alone = train(tmp_path / "one", "processes=1")
    shared = train(tmp_path / "two", "processes=2", "threads=1")
    same(tmp_path / "one", tmp_path / "two")
    assert alone["trained"] == shared["trained"]


@pytest.mark.slow
def test_accelerate_starts_them(tmp_path):
    pytest.importorskip("accelerate")
    # The launcher for several GPUs is the one that starts several processes; without a GPU they use the CPU.
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port=0", "--num_processes=2")
    launcher += ("--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--num_cpu_threads_per_process=1")
    train(tmp_path / "one", "processes=1")
    train(tmp_path / "two", launcher=launcher)
    same(tmp_path / "one", tmp_path / "two")


def test_an_evaluation_goes_on_with_another_number_of_processes(tmp_path):
    words = ("eval", "nano", "--task", "nano", "--problems", "7", "--samples", "2", "--batch-size", "5")
    (one,) = run(*words, "--processes", "1")[0]["results"]
    folder = tmp_path / "out" / "nano" / "base"
    (two,) = run(*words, "--processes", "2", "--threads", "1", "--folder", str(tmp_path / "out"))[0]["results"]
    assert one == two
    lines = (folder / "completions.jsonl").read_text().splitlines(keepends=True)
    (folder / "completions.jsonl").unlink()
    (folder / "completions.jsonl.part").write_text("".join(lines[:6]))
    run(*words, "--processes", "1", "--folder", str(tmp_path / "out"))
    assert (folder / "completions.jsonl").read_text().splitlines(keepends=True) == lines


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent as a terminal of Unix sends them")
@pytest.mark.parametrize("everyone", [True, False], ids=["terminal", "first process"])
def test_it_stops_at_ctrl_c(tmp_path, everyone):
    words = [*SETTINGS, "training.steps=1000", "evaluation.problems=1", "processes=2", f"folder={tmp_path}"]
    command = [sys.executable, "-m", "tinylora_lite", "train", *words]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for line in process.stderr:
        if "step 2 of" in line:
            break
    os.killpg(process.pid, signal.SIGINT) if everyone else process.send_signal(signal.SIGINT)
    assert "stopped before the end" in process.communicate(timeout=60)[1].splitlines()[-1]
    assert process.returncode == 130
    time.sleep(0.5)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nobody of the group is left
