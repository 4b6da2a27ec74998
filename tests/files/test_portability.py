"""The same 26 bytes mean the same function in another process, on another number of threads, in another Python."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tinylora_lite as tl
from tinylora_lite import nano

PROMPTS = torch.arange(2, 66).reshape(2, 32) % 29
ELSEWHERE = """
import json, sys, torch
from pathlib import Path
torch.set_num_threads(int(sys.argv[3]))
import tinylora_lite as tl
from tinylora_lite import nano
model, _ = nano.load()
for file in Path(sys.argv[1]).glob("*.tinylora"):
    torch.set_num_threads(int(sys.argv[3]))
    adapter = tl.load(model, file)
    # The logits themselves on one thread: here it is the adapter that is compared, not the order of a matmul's sums.
    torch.set_num_threads(1)
    with torch.no_grad():
        logits = model(torch.tensor(json.loads(sys.argv[2]))).logits
    torch.save(logits, Path(sys.argv[4]) / f"{file.stem}.pt")
    adapter.detach()
"""
PYTHONS = [sys.executable, *filter(None, os.environ.get("TINYLORA_OTHER_PYTHONS", "").split(os.pathsep))]
"""Other interpreters with the library's requirements join in by ``TINYLORA_OTHER_PYTHONS=/path/to/python3.13``."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of adapter files, and the logits that each of them must give."""
    torch.set_num_threads(1)
    model, _ = nano.load()
    configs = {
        "random": tl.TinyLoraConfig(rank=2, u=1, n_tie=4),
        "calibrated": tl.TinyLoraConfig(rank=8, u=13, n_tie="all", projection=nano.basis()),
        "lora-xs": tl.lora_xs(4),
    }
    folder, wanted = tmp_path_factory.mktemp("portable"), {}
    for name, config in configs.items():
        adapter = tl.attach(model, config)
        with torch.no_grad():
            adapter.vectors.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
            adapter.vectors.copy_(adapter.vectors.bfloat16())
            wanted[name] = model(PROMPTS).logits
            with adapter.disabled():
                assert (wanted[name] - model(PROMPTS).logits).abs().max() > 0.1
        tl.save(adapter, folder / f"{name}.tinylora")
        adapter.detach()
    return folder, wanted


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_fresh_process_computes_the_same_logits(saved, threads, python, tmp_path):
    folder, wanted = saved
    arguments = [str(folder), json.dumps(PROMPTS.tolist()), str(threads), str(tmp_path)]
    root = Path(tl.__file__).parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(root)}
    subprocess.run([python, "-c", ELSEWHERE, *arguments], check=True, env=environment, timeout=300)
    assert {file.stem for file in tmp_path.glob("*.pt")} == wanted.keys()
    for name, logits in wanted.items():
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.pt"), logits, atol=1e-6, rtol=1e-6)
