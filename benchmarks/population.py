"""Many adapters in one batch against one after the other, on the base that carries the lab's sweeps."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

MEMBERS = (2, 4, 8)
BATCHES = {"the lab's": (32, 8), "a small": (4, 8)}
"""Prompts and completions of each for one member's step."""
STEPS, ROUNDS = 4, 3


def population() -> dict[str, Any]:
    """Seconds of training K adapters by GRPO in one batch and one by one, on one thread, in turns; and their ratios."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {
            "threads": torch.get_num_threads(),
            "steps": STEPS,
            "batches": [
                {"name": name, "prompts": prompts, "completions": completions}
                | {"members": [_compared(K, prompts, completions) for K in MEMBERS]}
                for name, (prompts, completions) in BATCHES.items()
            ],
        }
    finally:
        torch.set_num_threads(threads)


def _compared(K: int, prompts: int, completions: int) -> dict[str, Any]:
    together, alone = [], []
    for round_ in range(ROUNDS):
        ways = ((together, _together), (alone, _alone))
        # A machine's speed drifts: each round has both, and who goes first changes.
        for seconds, way in ways if round_ % 2 else reversed(ways):
            seconds.append(way(K, prompts, completions))
    ratios = [a / b for a, b in zip(alone, together, strict=True)]
    return {"K": K, "together": together, "alone": alone, "ratios": ratios, "speed_up": statistics.median(ratios)}


def _settings(seed: int, prompts: int, completions: int) -> Any:
    from tinylora_lite import GRPOSettings, nano

    return GRPOSettings(
        steps=STEPS,
        prompts_per_step=prompts,
        group_size=completions,
        max_new_tokens=nano.MAX_NEW_TOKENS,
        learning_rate=0.1,
        seed=seed,
    )


def _together(K: int, prompts: int, completions: int) -> float:
    import tinylora_lite as tl
    from tinylora_lite import nano
    from tinylora_lite.lab.trial import BASE
    from tinylora_lite.training.grpo import GRPO
    from tinylora_lite.training.loop import fit

    model, tokenizer = nano.load(BASE)
    members = tl.attach_population(model, [tl.TinyLoraConfig(rank=2, n_tie=4, seed=seed) for seed in range(K)])
    settings = [_settings(seed, prompts, completions) for seed in range(K)]
    runs = fit(GRPO(model, tokenizer, members, nano.task(), settings), progress=False)
    return float(runs[0].seconds) * K  # a run is told its share


def _alone(K: int, prompts: int, completions: int) -> float:
    import tinylora_lite as tl
    from tinylora_lite import nano
    from tinylora_lite.lab.trial import BASE

    model, tokenizer = nano.load(BASE)
    seconds = 0.0
    for seed in range(K):
        adapter = tl.attach(model, tl.TinyLoraConfig(rank=2, n_tie=4, seed=seed))
        started = time.perf_counter()
        tl.train_grpo(
            model, tokenizer, adapter, nano.task(), _settings(seed, prompts, completions), progress=False
        )  # fmt: skip
        seconds += time.perf_counter() - started
        adapter.detach()
    return seconds
