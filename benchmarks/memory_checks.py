"""Holds the formulas of ``tinylora plan-run`` against tensors that PyTorch really makes, and writes the record.

Forward and backward of GRPO's loss on the real shapes, by fake tensors: every operation runs, with shapes, dtypes and
storages as ever and no numbers in them, so that a 7B model needs no memory. Weights and caches are counted likewise.
Caching allocators, kernels' own workspaces and CUDA's context are not seen here.

    python -m benchmarks.memory_checks
"""

from __future__ import annotations

import argparse
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.live_bytes import LiveBytes
from tinylora_lite.utils.record import environment

RECORD = Path(__file__).parents[1] / "book" / "results" / "memory_checks.json"
CASES: tuple[tuple[str, str, int, int, int, bool], ...] = (
    ("qwen2.5-7b", "bfloat16", 1, 1024, 4096, False),
    ("qwen2.5-7b", "bfloat16", 1, 1024, 4096, True),
    ("qwen2.5-7b", "bfloat16", 8, 512, 4096, True),
    ("llama-3.1-8b", "bfloat16", 2, 256, 1024, False),
    ("llama-3.1-8b", "bfloat16", 2, 256, 1024, True),
    ("qwen2.5-3b", "bfloat16", 2, 256, 768, False),
    ("qwen2.5-1.5b", "float16", 8, 512, 1024, True),
    ("qwen2.5-0.5b", "float32", 4, 64, 128, False),
)
"""Model, dtype, rows, tokens of prompt and completion, gradient checkpointing."""


def activations(name: str, dtype: str, rows: int, prompt: int, completion: int, recompute: bool) -> dict[str, float]:
    """Bytes of forward and backward of one micro batch: what the plan says, and what is counted."""
    import tinylora_lite as tl
    from tinylora_lite.adapter import adapter
    from tinylora_lite.adapter.layer import Factors
    from tinylora_lite.adapter.tying import find_target_modules
    from tinylora_lite.experiment.settings import RunSettings
    from tinylora_lite.planning.memory import Batch, training_terms, weight_bytes
    from tinylora_lite.planning.shapes import ModelShape, model_config
    from tinylora_lite.sampling import logprobs, policy
    from tinylora_lite.sampling.policy import ready_to_train
    from tinylora_lite.sampling.rollouts import Rollouts

    settings = RunSettings(model=name, task="gsm8k", dtype=dtype, gradient_checkpointing=recompute)  # type: ignore[arg-type]
    shape = ModelShape.of(model_config(name))
    kept, workspace = training_terms(settings, shape, Batch(rows, prompt, completion), "training", rank=2)
    with ExitStack() as stack:
        for replaced in (
            mock.patch.object(adapter, "check_weight"),  # they look at numbers, and there are none
            mock.patch.object(Factors, "check"),
            mock.patch.object(logprobs, "can_share_prompts", return_value=False),
            mock.patch.object(policy, "ON_A_CPU", policy.LOGITS_AT_ONCE),  # what is planned is a GPU's memory
        ):
            stack.enter_context(replaced)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        model = _model(name, dtype)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        modules = dict(model.named_modules())
        sizes = {target.name: modules[target.name].weight.shape for target in find_target_modules(model)}
        factors = {
            n: Factors(torch.empty(o, 2), torch.empty(2, i), torch.empty(1, 2, 2)) for n, (o, i) in sizes.items()
        }
        attached = tl.attach(model, tl.TinyLoraConfig(n_tie=16), factors=factors)
        ids, answers = torch.zeros(rows, prompt).long(), torch.zeros(rows, completion).long()
        nothing = torch.zeros(rows, completion)
        masks = torch.ones_like(ids), torch.ones_like(answers)
        rollouts = Rollouts(ids, masks[0], answers, masks[1], nothing, nothing, nothing[:, 0] > 0, [""] * rows)
        frozen = [t for n in attached.names for t in vars(attached.factors(n)).values() if isinstance(t, torch.Tensor)]
        known = [*model.parameters(), *model.buffers(), attached.vectors, *frozen, ids, answers, *masks]
        with ready_to_train(model, [attached.vectors]), LiveBytes(known) as counted:
            found = logprobs.completion_logprobs(model, rollouts)
            after_forward = counted.live
            found.sum().backward()
        weights = sum(p.untyped_storage().nbytes() for p in set(model.parameters()))
    return {
        "planned_peak": kept.bytes + workspace.bytes,
        "counted_peak": float(counted.peak),
        "planned_kept": kept.bytes,
        "counted_after_forward": float(after_forward),
        "planned_weights": float(weight_bytes(settings, shape)),
        "counted_weights": float(weights),
    }


def cache(name: str, rows: int, tokens: int) -> dict[str, float]:
    """Bytes of the keys and values of so many sequences in bfloat16: planned, and in a cache of transformers."""
    from transformers import DynamicCache

    from tinylora_lite.planning.shapes import ModelShape, model_config

    config = model_config(name)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model, filled = _model(name, "bfloat16"), DynamicCache(config=config)
        model(input_ids=torch.zeros(rows, tokens).long(), past_key_values=filled, use_cache=True, logits_to_keep=1)
        tensors = [t for layer in filled.layers for t in (layer.keys, layer.values)]
        counted = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return {"planned": float(rows * tokens * ModelShape.of(config).cache_per_token(2)), "counted": float(counted)}


def _model(name: str, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    from tinylora_lite.planning.shapes import model_config

    return AutoModelForCausalLM.from_config(model_config(name), dtype=getattr(torch, dtype)).eval()


def main() -> None:
    """Runs all checks and writes the record; exit code 1 where a formula is more than 10 % off."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory_checks", description=__doc__)
    parser.add_argument("--out", type=Path, default=RECORD, help="the record (default: the committed one)")
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    for name, dtype, rows, prompt, completion, recompute in CASES:
        row: dict[str, Any] = {"model": name, "dtype": dtype, "rows": rows, "prompt": prompt, "completion": completion}
        row |= {"gradient_checkpointing": recompute} | activations(name, dtype, rows, prompt, completion, recompute)
        row["off"] = row["planned_peak"] / row["counted_peak"] - 1
        found.append(row)
        print(json.dumps(row), flush=True)
    caches = [
        {"model": name, "rows": 4, "tokens": 256} | cache(name, 4, 256) for name in ("qwen2.5-7b", "llama-3.1-8b")
    ]
    record = {"training": found, "cache": caches, "environment": environment()}
    temporary = arguments.out.with_name(f"{arguments.out.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(arguments.out)
    exact = all(row["planned_weights"] == row["counted_weights"] for row in found) and all(
        row["planned"] == row["counted"] for row in caches
    )
    raise SystemExit(0 if exact and all(abs(row["off"]) < 0.1 for row in found) else 1)


if __name__ == "__main__":
    main()
