"""Two processes compute what one computes: the same samples, the same update, but for rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tinylora_lite.utils import distributed

pytest.importorskip("accelerate")

SCRIPT = Path(__file__).with_name("train.py")
ROOT = Path(__file__).parents[2]
TOLERANCE = 2e-4


def train(folder: Path, count: int, **options) -> list[dict]:
    """What every process wrote."""
    folder.mkdir(exist_ok=True)
    # Its launcher for several GPUs is the one that starts several processes; the script asks for the CPU.
    where = ["--multi_gpu", "--main_process_port=0"] if count > 1 else ["--cpu"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *where, f"--num_processes={count}"]
    launch += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--num_cpu_threads_per_process=1"]
    options = {"adapter": True, "steps": 3} | options
    done = subprocess.run(
        [*launch, str(SCRIPT), str(folder), json.dumps(options)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(count)]


def check(one: dict, other: dict) -> None:
    assert torch.allclose(torch.tensor(one["numbers"]), torch.tensor(other["numbers"]), atol=TOLERANCE)
    for mine, theirs in zip(one["steps"], other["steps"], strict=True):
        for key in mine.keys() - {"seconds", "sampling_seconds", "logprob_diff_mean", "logprob_diff_max"}:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-2, abs=TOLERANCE), key


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"truncated": "mask", "scale": "batch"}, marks=pytest.mark.slow),
        {"kl": 0.05, "normalise": "sequence", "epochs_per_step": 2, "evaluate_every": 3, "evaluate_problems": 10},
        pytest.param({"shard": True, "kl": 0.05, "micro_batch": 3}, marks=pytest.mark.slow),
        pytest.param({"adapter": False, "normalise": "constant", "steps": 2}, marks=pytest.mark.slow),
    ],
    ids=["adapter", "penalty", "sharded base", "all weights"],
)
def test_two_processes_make_the_step_of_one(tmp_path, options):
    (one,) = train(tmp_path / "one", 1, **options)
    two = train(tmp_path / "two", 2, **options)
    assert [each["rows"] for each in (one, *two)] == [[32] * len(one["rows"])] + [[16] * len(one["rows"])] * 2
    assert two[0]["numbers"] == two[1]["numbers"]
    check(one, two[0])
    assert one["evaluations"] == two[0]["evaluations"] == two[1]["evaluations"]


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one(tmp_path):
    (one,) = train(tmp_path / "one", 1, steps=4)
    train(tmp_path / "two", 2, steps=2)
    (gone_on,) = train(tmp_path / "two", 1, steps=4)
    assert len(gone_on["rows"]) == 2
    check(one, gone_on)


def test_prompts_that_cannot_be_shared(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(ValueError, match=r"prompts_per_step=8 cannot be shared by 3 processes; make it a multiple"):
        distributed.shard(8, "prompts_per_step")
