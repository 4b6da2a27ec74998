"""verl's FSDP2 engine with our settings file and optimizer, in two processes on CPUs: the steps of one process here.

Its Ray workers and its vLLM ask for GPUs and are not run.
"""

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from torch.nn import functional as F

import tinylora_lite as tl
from tinylora_lite import nano

ROOT = Path(__file__).parents[2]


def test_the_entry_point_is_the_package_of_the_optimizer():
    points = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    (found,) = (EntryPoint(name, value, "verl.plugins") for name, value in points["verl.plugins"].items())
    settings = YAML(typ="safe").load(Path(found.load().__file__).with_name("verl.yaml"))
    optim = settings["actor_rollout_ref"]["actor"]["optim"]
    assert optim["optimizer_impl"] == found.value
    assert issubclass(getattr(found.load(), optim["optimizer"]), torch.optim.Optimizer)


def test_its_engine_makes_the_steps_of_adamw_on_v(tmp_path):
    pytest.importorskip("verl", reason="needs verl: run `make test-verl`")
    model, _ = nano.load()
    adapter = tl.attach(model, tl.TinyLoraConfig(rank=2, u=1, n_tie=4))
    tl.export_lora(adapter, tmp_path / "lora")
    tl.save(adapter, tmp_path / "adapter.tinylora", "fp32", factors=True)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, str(Path(__file__).with_name("run_verl.py")), str(tmp_path)],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads((tmp_path / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]

    optimizer = torch.optim.AdamW([adapter.vectors], lr=0.05, weight_decay=0.0)
    for step in range(4):
        ids = torch.arange(5, 65).view(4, 15).roll(step, dims=1)
        optimizer.zero_grad()
        F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_([adapter.vectors], 1.0)
        optimizer.step()
    assert adapter.vectors.abs().max() > 0.1
    for result in results:
        assert torch.allclose(torch.tensor(result["v"]), adapter.vectors, atol=2e-5)
        assert result["resumes"]
    assert results[0]["v"] == results[1]["v"]
    for name in adapter.names:  # what the sampler is sent
        B = torch.tensor(results[0]["sent"][f"base_model.model.{name}.lora_B.weight"])
        expected = adapter.factors(name).left @ adapter.mixing(name)
        assert (B - expected).norm() < 1e-3 * expected.norm()
