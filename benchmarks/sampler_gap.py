"""How far a sampler is from the trainer: log-probabilities, rewards and seconds over a run, by three engines.

    PYTHONPATH=. .venv-vllm/bin/python benchmarks/sampler_gap.py     # half an hour on one core: sampler_gap.json

Thirteen calibrated numbers on the nano base, the same seeds and settings, with samples from transformers, from vLLM
with the adapter as a LoRA, and from vLLM with merged weights; in bfloat16, as large models train, and in float32. The
trainer never merges. vLLM needs an environment of its own, which ``make test-vllm`` sets up; the record holds what its
CPU build does, whose kernels are not those of a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tinylora_lite as tl
from tinylora_lite import nano
from tinylora_lite.adapter.adapter import TinyLoraAdapter
from tinylora_lite.adapter.layer import Factors
from tinylora_lite.sampling.rollouts import Rollouts, Sampler
from tinylora_lite.sampling.sampler import ModelSampler
from tinylora_lite.utils.record import environment

RECORD = Path(__file__).parents[1] / "book" / "results" / "sampler_gap.json"
SETTINGS = tl.GRPOSettings(
    steps=30,
    prompts_per_step=8,  # a CPU without instructions for bfloat16 takes ten times as long for it
    learning_rate=0.2,
    schedule="linear",
    max_new_tokens=nano.MAX_NEW_TOKENS,
)
DTYPES = ("bfloat16", "float32")
ENGINES = ("transformers", "vllm, lora", "vllm, merged")
DIFFERENCES = ("logprob_diff_mean", "logprob_diff_max", "tis_clip_frac")
COLUMNS = ("reward", *DIFFERENCES, "kept", "sync_seconds", "sampling_seconds")
LAST = 5
"""The steps at the end of a run whose mean reward tells what it has reached."""


class Watched:
    """A sampler that is timed; at every sync it notes what a merge in bfloat16 would keep of the update."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.rows: list[dict[str, float]] = []

    def sync(self, adapter: TinyLoraAdapter | None) -> None:
        started = time.perf_counter()
        self.sampler.sync(adapter)
        seconds = time.perf_counter() - started
        if adapter is not None:
            self.rows.append({"sync_seconds": seconds, "kept": tl.merge_report(adapter, torch.bfloat16).total.kept})

    def sample(self, *prompts: torch.Tensor, **settings: Any) -> Rollouts:
        return self.sampler.sample(*prompts, **settings)


def run(dtype: str, engine: str, seeds: list[int], path: Path) -> None:
    """Trains once for each seed with one engine, in this process, and writes the curves to ``path``."""
    model, tokenizer = nano.load()
    model.to(getattr(torch, dtype))
    sampler: Sampler = ModelSampler(model, tokenizer)
    if engine != "transformers":
        from tinylora_lite.sampling.vllm import VllmSampler

        sampler = VllmSampler(
            nano.CHECKPOINTS / nano.BASE,
            tokenizer,
            sync="lora" if engine.endswith("lora") else "merged",
            max_model_len=256,
            dtype=dtype,
            kv_cache_memory_bytes=256 * 2**20,
        )
    runs = []
    for seed in seeds:
        config = tl.TinyLoraConfig(rank=8, u=13, n_tie="all", projection=nano.basis())
        adapter, watched = tl.attach(model, config), Watched(sampler)
        settings = tl.GRPOSettings(**asdict(SETTINGS) | {"seed": seed})
        done = tl.train_grpo(model, tokenizer, adapter, nano.task(), settings, sampler=watched, progress=False)
        synced = watched.rows[-len(done.steps) :]  # before them the sampler was checked
        rows = [step | row for step, row in zip(done.steps, synced, strict=True)]
        runs.append({"dtype": dtype, "engine": engine, "seed": seed} | _curves(rows))
        adapter.detach()
        path.write_text(json.dumps(runs), encoding="utf-8")


def _curves(rows: list[dict[str, float]]) -> dict[str, Any]:
    curves = {name: [float(f"{row[name]:.4g}") for row in rows] for name in COLUMNS}
    middle = {name: statistics.median(curves[name]) for name in ("sync_seconds", "sampling_seconds")}
    return {
        "logprob_diff_mean": statistics.mean(curves["logprob_diff_mean"]),
        "logprob_diff_max": max(curves["logprob_diff_max"]),
        "tis_clip_frac": statistics.mean(curves["tis_clip_frac"]),
        "reward": statistics.mean(curves["reward"][-LAST:]),
        "least_kept": min(curves["kept"][1:]),  # before the first step there is no update
        **middle,
        "curves": curves,
    }


def handover() -> dict[str, float]:
    """What a LoRA takes to write for an adapter of rank 2 on the shapes of Qwen2.5-7B: seconds and bytes."""
    width, inner, keys = 3584, 18944, 512
    shapes = {"q": (width, width), "k": (keys, width), "v": (keys, width), "o": (width, width)}
    shapes |= {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    blocks = nn.ModuleList(nn.ModuleDict({name: _linear(*shape) for name, shape in shapes.items()}) for _ in range(28))
    model = nn.ModuleDict({"layers": blocks})
    factors = {
        f"layers.{layer}.{name}": Factors(torch.randn(out, 2), torch.randn(2, wide), torch.randn(1, 2, 2))
        for layer in range(28)
        for name, (out, wide) in shapes.items()
    }
    adapter = tl.attach(model, tl.TinyLoraConfig(rank=2, target_modules=[*shapes]), factors=factors)
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(5):
            started = time.perf_counter()
            path = tl.export_lora(adapter, Path(folder) / "lora")
            seconds.append(time.perf_counter() - started)
        size = sum(file.stat().st_size for file in path.iterdir())
    return {"modules": len(adapter.names), "export_seconds": statistics.median(seconds), "bytes": size}


def _linear(out: int, wide: int) -> nn.Linear:
    """A linear layer whose weights, all zero, take no memory."""
    with torch.device("meta"):
        layer = nn.Linear(wide, out, bias=False)
    layer.weight = nn.Parameter(torch.zeros(1, 1).expand(out, wide), requires_grad=False)
    return layer


def main() -> None:
    """The command line: all runs, each engine in a process of its own, and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each engine (default: %(default)s)")
    parser.add_argument("--record", type=Path, default=RECORD, help="where the record goes (default: %(default)s)")
    parser.add_argument("--one", nargs=3, metavar=("DTYPE", "ENGINE", "FILE"), help="one engine's runs alone")
    arguments = parser.parse_args()
    seeds = list(range(arguments.seeds))
    if arguments.one:
        dtype, engine, file = arguments.one
        run(dtype, engine, seeds, Path(file))
        return
    runs: list[dict[str, Any]] = []
    environs = os.environ | {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES:
            for engine in ENGINES:
                part = Path(folder) / "part.json"
                command = [sys.executable, __file__, "--seeds", str(arguments.seeds), "--one", dtype, engine, str(part)]
                subprocess.run(command, env=environs, check=True)
                runs += json.loads(part.read_text(encoding="utf-8"))
                for row in runs[-len(seeds) :]:
                    shown = {name: value for name, value in row.items() if name != "curves"}
                    print(json.dumps(shown), flush=True)
    vllm = packages_distributions()["vllm"][0]
    record = {
        "command": "python benchmarks/sampler_gap.py",
        "settings": asdict(SETTINGS),
        "adapter": {"rank": 8, "u": 13, "n_tie": "all", "projection": "calibrated"},
        "seeds": seeds,
        "runs": runs,
        "seven_billion": handover(),
        "environment": environment() | {"vllm": f"{vllm} {version(vllm)}"},
    }
    text = json.dumps(record, indent=1)
    text = re.sub(r"\[[^][{}]*\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text)  # a curve is one line
    temporary = arguments.record.with_suffix(".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, arguments.record)


if __name__ == "__main__":
    main()
