"""The shapes that several claims share: from one number to all weights, with the learning rates to start from.

The bases of the lab have 49 modules (7 layers of 7), so that u = 1 with n_tie = 4 gives thirteen numbers, as u = 1 with
n_tie = 16 does on the 196 modules of Qwen2.5-7B.
"""

from __future__ import annotations

from dataclasses import replace

from tinylora_lite.lab.claim import Point
from tinylora_lite.lab.trial import BASE, Trial


def around(rate: float) -> tuple[float, ...]:
    """Three learning rates, a factor of two apart, to start a sweep from."""
    return (rate / 2, rate, rate * 2)


def random_numbers(n_tie: int | str, u: int = 1, rank: int = 2, base: str = BASE, rate: float = 0.1) -> Point:
    """TinyLoRA as in the paper: u random directions for each group of n_tie modules."""
    count = u * (1 if n_tie == "all" else -(-49 // int(n_tie)))
    trial = Trial(base=base, rank=rank, u=u, n_tie=n_tie)
    return Point(f"{count} random", trial, around(rate), sweep_seeds=2)


def lora_xs_numbers(rank: int, base: str = BASE) -> Point:
    """LoRA-XS: every entry of R of every module."""
    trial = Trial(base=base, numbers="LoRA-XS", rank=rank)
    return Point(f"{49 * rank**2} LoRA-XS", trial, around({1: 0.2, 2: 0.1, 4: 0.02, 8: 0.01, 16: 0.005}[rank]))


def calibrated_numbers(u: int = 13, base: str = BASE, rank: int = 8) -> Point:
    """Thirteen numbers, or fewer, shared by all modules, on calibrated directions."""
    trial = Trial(base=base, numbers="calibrated", rank=rank, u=u, n_tie="all")
    return Point(f"{u} calibrated", trial, around(0.2))


def lora_numbers(rank: int = 1, base: str = BASE) -> Point:
    """LoRA, as PEFT implements it."""
    return Point(
        "LoRA, r = 1" if rank == 1 else f"LoRA, r = {rank}",
        Trial(base=base, numbers="LoRA", rank=rank),
        (1e-3, 3e-3),
        sweep_seeds=1,
    )


def all_weights(base: str = BASE, steps: int = 20) -> Point:
    """Full finetuning."""
    label = "all weights" if steps == 20 else f"all weights, {steps} steps"
    return Point(label, Trial(base=base, numbers="all weights", steps=steps), (5e-4, 1e-3))


def untouched(base: str = BASE, task: str = "nano") -> Point:
    """The base as it is: five draws of its answers."""
    return Point("base", Trial(base=base, method="none", task=task, learning_rate=0.0))


def by_imitation(point: Point, demonstrations: str) -> Point:
    """The same numbers, trained by SFT on demonstrations of a kind: ``"stranger"``, ``"careful"`` or ``"own"``."""
    trial = replace(point.trial, method="sft", trained_on=f"demonstrations: {demonstrations}", steps=60)
    rates = point.rates
    if demonstrations == "stranger":
        # Where imitation harms at first, the best rates are those that hardly move and those that learn it all, with a
        # valley between them: a sweep that climbs from one side alone would miss the other.
        rates = (*(rates[0] / factor for factor in (64, 16, 4)), *rates, rates[-1] * 2, rates[-1] * 4)
    return replace(point, trial=trial, rates=rates)
