"""What an adapter adds to forward and backward: ours, PEFT's TinyLoRA and PEFT's LoRA of rank 1, on one frozen model.

The factors are random here and nothing is decomposed: time does not depend on them, and setting up is measured
elsewhere.
"""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TOKENS = 512


def whole() -> dict[str, Any]:
    """Seconds of forward and backward on Qwen2.5-0.5B's shape, float32, 512 tokens, in turns; and their ratios."""
    return _measure(layers=24, head=True, rounds=8)


def blocks() -> dict[str, Any]:
    """The same on three of its blocks without the head: short passes and many rounds, since machines drift."""
    return _measure(layers=3, head=False, rounds=40)


def _measure(layers: int, head: bool, rounds: int) -> dict[str, Any]:
    import peft
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import tinylora_lite as tl
    from tinylora_lite.adapter.layer import Factors
    from tinylora_lite.adapter.tying import MODULE_TYPES, find_target_modules
    from tinylora_lite.planning.shapes import SHAPES

    torch.manual_seed(0)
    shape = SHAPES["qwen2.5-0.5b"] | {"num_hidden_layers": layers} | ({} if head else {"vocab_size": 2000})
    frozen = Qwen2ForCausalLM(Qwen2Config(**shape)).eval().requires_grad_(False)
    tokens = torch.randint(1000, (1, TOKENS + 1))
    # The inputs ask for a gradient, so that the frozen model has a backward pass at all, and all have the same one.
    inputs = frozen.get_input_embeddings()(tokens[:, :-1]).detach().requires_grad_()

    settings = {"target_modules": list(MODULE_TYPES)}
    with mock.patch("torch.linalg.svd", _random_svd):
        tiny = peft.get_peft_model(
            _twin(frozen), peft.TinyLoraConfig(r=2, u=1, weight_tying=1 - 1 / 16, init_weights="uniform", **settings)
        )
    lora = peft.get_peft_model(_twin(frozen), peft.LoraConfig(r=1, **settings))
    ours = _twin(frozen)
    modules = dict(ours.named_modules())
    factors = {}
    for target in find_target_modules(ours):
        size = modules[target.name].weight.shape
        factors[target.name] = Factors(torch.randn(size[0], 2), torch.randn(2, size[1]), torch.randn(1, 2, 2))
    adapter = tl.attach(ours, tl.TinyLoraConfig(rank=2, n_tie=16), factors=factors)
    torch.nn.init.normal_(adapter.vectors, std=1e-4)

    models = {"frozen": frozen, "tinylora_lite": ours, "peft_tinylora": tiny.eval(), "peft_lora_rank_1": lora.eval()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(rounds + 1):
        # A machine's speed drifts: each round has every model, in an order that changes.
        names = list(models)[round_ % 4 :] + list(models)[: round_ % 4]
        for name in names:
            elapsed = _step(models[name], inputs, tokens[0, 1:] if head else None)
            if round_:
                seconds[name].append(elapsed)
    ratios = {name: [a / b for a, b in zip(seconds[name], seconds["frozen"], strict=True)] for name in models}
    fastest = {name: min(seconds[name]) / min(seconds["frozen"]) for name in models}
    others = [name for name in models if name != "frozen"]
    return {
        "tokens": TOKENS,
        "layers": layers,
        "seconds": {name: [round(value, 4) for value in values] for name, values in seconds.items()},
        "overhead": {name: statistics.median(ratios[name]) - 1 for name in others},
        "quartiles": {name: [quartile - 1 for quartile in statistics.quantiles(ratios[name])] for name in others},
        "overhead_of_the_fastest": {name: fastest[name] - 1 for name in others},
    }


def _twin(model: nn.Module) -> nn.Module:
    """A second model on the same weights; four copies would not stay in the cache any better, but fill the memory."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _step(model: nn.Module, inputs: Tensor, labels: Tensor | None) -> float:
    """One forward and backward pass; without labels, the blocks alone."""
    start = time.perf_counter()
    if labels is None:
        model.get_submodule("base_model.model.model" if hasattr(model, "peft_config") else "model")(
            inputs_embeds=inputs, use_cache=False
        ).last_hidden_state.square().mean().backward()
    else:
        F.cross_entropy(model(inputs_embeds=inputs, use_cache=False).logits[0], labels).backward()
    elapsed = time.perf_counter() - start
    inputs.grad = None
    return elapsed


def _random_svd(matrix: Tensor, full_matrices: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    smaller = min(matrix.shape)
    return torch.randn(matrix.shape[0], smaller), torch.rand(smaller), torch.randn(smaller, matrix.shape[1])
