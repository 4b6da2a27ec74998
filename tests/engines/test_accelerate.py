"""``accelerate`` with two processes makes the steps of one, and its saved state resumes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import tinylora_lite as tl
from tinylora_lite import nano

pytest.importorskip("accelerate")
pytest.importorskip("peft")

ROOT = Path(__file__).parents[2]


def test_two_processes_make_the_steps_of_one(tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    launch += ["--main_process_port=0", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    launch += ["--num_cpu_threads_per_process=1", str(Path(__file__).with_name("train_accelerate.py"))]
    done = subprocess.run(
        [*launch, str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads((tmp_path / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]

    model, _ = nano.load()
    adapter = tl.attach(model, tl.TinyLoraConfig(n_tie=16))
    optimizer = torch.optim.AdamW([adapter.vectors], lr=0.05, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2)
    for step in range(4):
        ids = torch.arange(5, 65).view(4, 15).roll(step, dims=1)
        optimizer.zero_grad()
        F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        if step == 0:
            gradient = adapter.vectors.grad.clone()
        torch.nn.utils.clip_grad_norm_([adapter.vectors], 0.5)
        optimizer.step()
        # accelerate's scheduler makes a step for every process
        scheduler.step()
        scheduler.step()
    assert adapter.vectors.abs().max() > 0.1
    for result in results:
        assert result["kind"] == "DistributedDataParallel"
        assert (torch.tensor(result["gradient"]) - gradient).norm() < 1e-6 * gradient.norm()
        assert torch.allclose(torch.tensor(result["v"]), adapter.vectors, atol=1e-5)
        assert result["resumes"]
    assert results[0]["v"] == results[1]["v"]
