"""TRL on two processes makes the steps of one, whether each holds the whole base (DDP) or a half of it (FSDP2)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tinylora_lite as tl
from tinylora_lite import nano

pytest.importorskip("accelerate")
pytest.importorskip("trl")

SCRIPT = Path(__file__).with_name("train_trl.py")
ROOT = Path(__file__).parents[2]
SETTINGS = {"steps": 2, "prompts_per_step": 4, "group_size": 4, "learning_rate": 0.1, "micro_batch": 4, "save_every": 1}
DDP = ["--multi_gpu"]
FSDP = ["--use_fsdp", "--fsdp_version=2", "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP"]
FSDP += ["--fsdp_cpu_ram_efficient_loading=false"]


def train(folder: Path, how: list[str], **options) -> list[dict]:
    """What each of two processes wrote."""
    folder.mkdir(exist_ok=True)
    launch = [sys.executable, "-m", "accelerate.commands.launch", *how, "--num_processes=2", "--main_process_port=0"]
    launch += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--num_cpu_threads_per_process=1"]
    done = subprocess.run(
        [*launch, str(SCRIPT), str(folder), json.dumps(SETTINGS | options)],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    assert [result["processes"] for result in results] == [2, 2]
    assert results[0]["v"] == results[1]["v"]
    assert results[0]["v"]["type"] == "torch.float32"
    return results


@pytest.mark.parametrize(
    "options",
    [
        {"kl": 0.05, "normalise": "token", "truncated": "mask"},
        pytest.param({"normalise": "sequence", "scale": "batch", "epochs_per_step": 2}, marks=pytest.mark.slow),
    ],
    ids=["penalty", "two epochs"],
)
def test_two_processes_make_the_steps_of_one(tmp_path, options):
    model, tokenizer = nano.load()
    adapter = tl.attach(model, tl.TinyLoraConfig(rank=8, u=13, n_tie="all", projection=nano.basis()))
    settings = tl.GRPOSettings(max_new_tokens=nano.MAX_NEW_TOKENS, **SETTINGS | options)
    run = tl.train_grpo(model, tokenizer, adapter, nano.task(), settings)
    result, _ = train(tmp_path / "two", DDP, sampler=True, **options)
    assert [row["reward"] for row in result["steps"]] == pytest.approx(run.curve())
    v = torch.tensor(result["v"]["values"])
    assert torch.allclose(v, adapter.vectors.detach().flatten(), atol=2e-4)
    assert v.abs().max() > 0.1


@pytest.mark.slow
def test_a_sharded_base_changes_nothing(tmp_path):
    whole, _ = train(tmp_path / "whole", DDP, sampler=False, kl=0.05, steps=3)
    sharded, _ = train(tmp_path / "sharded", FSDP, sampler=False, kl=0.05, steps=3, fsdp=True)
    assert (whole["weights"], sharded["weights"]) == ("Parameter", "DTensor")
    assert sharded["v"] == whole["v"]
    shutil.rmtree(tmp_path / "sharded" / "run" / "checkpoint-3")
    gone_on, _ = train(tmp_path / "sharded", FSDP, sampler=False, kl=0.05, steps=3, fsdp=True)
    assert gone_on["v"] == whole["v"]
    assert [row["step"] for row in gone_on["steps"]] == [1, 2, 3]
