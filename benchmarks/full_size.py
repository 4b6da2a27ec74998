"""A training step at full size: Qwen2.5-7B's shape with random weights, on whatever GPU is there.

    python -m benchmarks full-size

Ours, PEFT's TinyLoRA and PEFT's LoRA of rank 1 take turns on the same weights: forward and backward of GRPO over 64
completions, as tokens per second and as a share of the rate at which the GPU multiplies large bf16 matrices.
"""

from __future__ import annotations

import statistics
import time
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks.overhead import _random_svd, _twin

ROWS, PROMPT, COMPLETION, MICRO_BATCH = 64, 256, 768, 8
ROUNDS = 3
MATRIX = 8192
"""Rows and columns of the matrices whose product is the GPU's measured rate."""


def full_size() -> dict[str, Any]:
    """Set-up, tokens per second and peak memory of a GRPO step on Qwen2.5-7B's shape, with random weights."""
    from tinylora_lite.planning.shapes import SHAPES

    if not torch.cuda.is_available():
        raise SystemExit("the full-size step needs a GPU of 40 GB or more; the other parts run on a CPU")
    return measure(SHAPES["qwen2.5-7b"], torch.device("cuda"), torch.bfloat16)


def measure(
    shape: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    *,
    rows: int = ROWS,
    prompt: int = PROMPT,
    completion: int = COMPLETION,
    micro_batch: int = MICRO_BATCH,
    matrix: int = MATRIX,
) -> dict[str, Any]:
    """The benchmark for any shape of Qwen2.

    Returns:
        The settings; ``matrix_tflops``, measured; and of each method, with and without gradient checkpointing,
        ``seconds`` of every round, ``tokens_per_second``, ``share_of_matrix_rate`` (4 FLOPs for a weight of the linear
        layers and a token, recomputation not counted) and ``peak_gib``.
    """
    import peft
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import tinylora_lite as tl
    from tinylora_lite.adapter.tying import MODULE_TYPES

    with torch.device("meta"):
        frozen = Qwen2ForCausalLM(Qwen2Config(**shape))
    frozen = frozen.to(dtype).to_empty(device=device)
    frozen.model.rotary_emb = type(frozen.model.rotary_emb)(frozen.config).to(device)
    torch.manual_seed(0)
    for parameter in frozen.parameters():
        parameter.data.normal_(std=0.02) if parameter.ndim == 2 else parameter.data.fill_(1.0)
    frozen.eval().requires_grad_(False)
    weights = sum(m.weight.numel() for m in frozen.modules() if isinstance(m, nn.Linear))

    ours = _twin(frozen)
    _wait(device)
    started = time.perf_counter()
    adapter = tl.attach(ours, tl.TinyLoraConfig(rank=2, n_tie=16))
    _wait(device)
    setup = time.perf_counter() - started
    torch.nn.init.normal_(adapter.vectors, std=1e-4)
    settings = {"target_modules": list(MODULE_TYPES)}
    # PEFT's own set-up takes full SVDs; the time of a step does not depend on the factors.
    with mock.patch("torch.linalg.svd", _random_svd):
        config = peft.TinyLoraConfig(r=2, u=1, weight_tying=1 - 1 / 16, init_weights="uniform", **settings)
        tiny = peft.get_peft_model(_twin(frozen), config)
    lora = peft.get_peft_model(_twin(frozen), peft.LoraConfig(r=1, **settings))
    models = {"tinylora_lite": ours, "peft_tinylora": tiny, "peft_lora_rank_1": lora}

    rollouts = _rollouts(rows, prompt, completion, frozen.config.vocab_size, device)
    tokens = rows * (prompt + completion)
    result: dict[str, Any] = {
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "rows": rows,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "micro_batch": micro_batch,
        "setup_seconds": setup,
        "matrix_tflops": matrix_rate(device, dtype, matrix) / 1e12,
        "steps": {},
    }
    for recompute in (False, True):
        seconds: dict[str, list[float]] = {name: [] for name in models}
        peaks = dict.fromkeys(models, 0.0)
        for round_ in range(ROUNDS + 1):
            names = list(models)[round_ % 3 :] + list(models)[: round_ % 3]
            for name in names:
                elapsed, peak = _step(models[name], rollouts, micro_batch, recompute, device)
                if round_:
                    seconds[name].append(elapsed)
                peaks[name] = max(peaks[name], peak)
        for name, values in seconds.items():
            speed = tokens / statistics.median(values)
            result["steps"][f"{name}, {'recomputing' if recompute else 'keeping'} activations"] = {
                "seconds": values,
                "tokens_per_second": speed,
                "share_of_matrix_rate": speed * 4 * weights / (result["matrix_tflops"] * 1e12),
                "peak_gib": peaks[name],
            }
    return result


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOPs per second of a product of two ``[size, size]`` matrices, the median of ten."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(13):
        _wait(device)
        started = time.perf_counter()
        a @ b
        _wait(device)
        times.append(time.perf_counter() - started)
    return float(2 * size**3 / statistics.median(times[3:]))


def _rollouts(rows: int, prompt: int, completion: int, vocabulary: int, device: torch.device) -> Any:
    from tinylora_lite.sampling.rollouts import Rollouts

    ids = torch.randint(vocabulary, (rows, prompt + completion), device=device)
    zeros = torch.zeros(rows, completion, device=device)
    ones = torch.ones_like(ids)
    cut = torch.ones(rows, dtype=torch.bool, device=device)
    parts = (ids[:, :prompt], ones[:, :prompt], ids[:, prompt:], ones[:, prompt:])
    return Rollouts(*parts, zeros, zeros, cut, [""] * rows)


def _step(model: Any, rollouts: Any, micro_batch: int, recompute: bool, device: torch.device) -> tuple[float, float]:
    """Seconds and peak GiB of forward and backward over all rows."""
    from tinylora_lite.sampling.logprobs import completion_logprobs
    from tinylora_lite.training.losses import grpo_loss

    inner = model.base_model.model if hasattr(model, "peft_config") else model
    if recompute:
        inner.gradient_checkpointing_enable({"use_reentrant": False})
        inner.train()
    else:
        inner.gradient_checkpointing_disable()
        inner.eval()
    advantages = torch.linspace(-1, 1, len(rollouts), device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    _wait(device)
    started = time.perf_counter()
    for index in torch.arange(len(rollouts), device=device).split(micro_batch):
        rows = rollouts.rows(index)
        logprobs = completion_logprobs(inner, rows)
        grpo_loss(logprobs, logprobs.detach(), advantages[index], rows.completion_mask).backward()
    _wait(device)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    return time.perf_counter() - started, peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
