"""The shapes that several claims share, from one number to all weights, and the ladder of them that compares bases.

The bases of the lab have 49 modules (7 layers of 7), so that u = 1 with n_tie = 4 gives thirteen numbers, as u = 1 with
n_tie = 16 does on the 196 modules of Qwen2.5-7B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tinylora_lite.lab.claim import Point
from tinylora_lite.lab.statistics import Ends, share_of_gain, smallest_count
from tinylora_lite.lab.store import Store
from tinylora_lite.lab.trial import BASE, Trial

Ladder = Mapping[str, Point]
"""The points of one base by name; see :func:`ladder_on`."""
RUNGS = "4 random", "13 random", "49 random", "49 LoRA-XS", "98 random", "196 LoRA-XS", "784 LoRA-XS", "LoRA, r = 1"
"""Of :func:`ladder_on`, those that a smallest update is looked for among."""


def around(rate: float) -> tuple[float, ...]:
    """Three learning rates, a factor of two apart, to start a sweep from."""
    return (rate / 2, rate, rate * 2)


def random_numbers(n_tie: int | str, u: int = 1, rank: int = 2, base: str = BASE) -> Point:
    """TinyLoRA as in the paper: u random directions for each group of n_tie modules."""
    count = u * (1 if n_tie == "all" else -(-49 // int(n_tie)))
    trial = Trial(base=base, rank=rank, u=u, n_tie=n_tie)
    return Point(f"{count} random", trial, around(0.1), sweep_seeds=2)


def lora_xs_numbers(rank: int, base: str = BASE) -> Point:
    """LoRA-XS: every entry of R of every module."""
    trial = Trial(base=base, numbers="LoRA-XS", rank=rank)
    return Point(f"{49 * rank**2} LoRA-XS", trial, around({1: 0.2, 2: 0.1, 4: 0.02, 8: 0.01, 16: 0.005}[rank]))


def calibrated_numbers(u: int = 13, base: str = BASE, rank: int = 8) -> Point:
    """Thirteen numbers, or fewer, shared by all modules, on calibrated directions."""
    trial = Trial(base=base, numbers="calibrated", rank=rank, u=u, n_tie="all")
    return Point(f"{u} calibrated", trial, around(0.2))


def lora_numbers(base: str = BASE) -> Point:
    """LoRA of rank 1, as PEFT implements it."""
    return Point("LoRA, r = 1", Trial(base=base, numbers="LoRA", rank=1), (1e-3, 3e-3))


def all_weights(base: str = BASE) -> Point:
    """Full finetuning."""
    return Point("all weights", Trial(base=base, numbers="all weights"), (5e-4, 1e-3))


def untouched(base: str = BASE, task: str = "nano") -> Point:
    """The base as it is: five draws of its answers."""
    return Point("base", Trial(base=base, method="none", task=task, learning_rate=0.0))


def by_imitation(point: Point, demonstrations: str) -> Point:
    """The same numbers, trained by SFT on demonstrations of a kind: ``"stranger"``, ``"careful"`` or ``"own"``."""
    rates = point.rates
    if demonstrations == "stranger":
        # Where imitation harms at first, the best rates are those that hardly move and those that learn it all, with a
        # valley between them: a sweep that climbs from one side alone would miss the other.
        rates = (*(rates[0] / factor for factor in (64, 16, 4)), *rates, rates[-1] * 2, rates[-1] * 4)
    settings = {"method": "sft", "trained_on": f"demonstrations: {demonstrations}", "steps": 60}
    return point.varied(point.label, rates=rates, **settings)


def ladder_on(base: str, seeds: int = 5) -> dict[str, Point]:
    """The shapes that compare bases by their labels, from few numbers to all weights, each reported from ``seeds``.

    On the lab's own base they are those of its first claim. Other bases must have 49 modules, too.
    """
    random = [random_numbers(n_tie, base=base) for n_tie in (13, 4, 1)]
    points = [untouched(base), *random, random_numbers(1, u=2, base=base)]
    points += [lora_xs_numbers(rank, base) for rank in (1, 2, 4)]
    points += [lora_numbers(base), all_weights(base), calibrated_numbers(13, base)]
    return {point.label: point if base == BASE else replace(point, seeds=seeds) for point in points}


def ends(ladder: Ladder) -> tuple[Point, Point]:
    """The ceiling and the floor of a ladder: all weights, and the untouched base."""
    return ladder["all weights"], ladder["base"]


def climb(ladder: Ladder) -> Ends:
    """The rungs, the ceiling and the floor of a ladder, as smallest counts are looked for."""
    return [ladder[name] for name in RUNGS], *ends(ladder)


def counts_on(ladders: Mapping[str, Ladder], names: Mapping[str, str], share: float, store: Store) -> str:
    """In words, on each base: the smallest count for a share of the gain, and what 13 random numbers recover.

    A count of all weights says no more than that the largest rung falls short.
    """
    parts = []
    for base, ladder in ladders.items():
        largest = ladder[RUNGS[-1]].parameters(store)
        found = smallest_count(share, *climb(ladder), store)
        few, least, most = (f"{n:,}" if n <= largest else f"more than {largest:,}" for n in found)
        thirteen = share_of_gain(ladder["13 random"], *ends(ladder), store).as_percent()
        parts.append(f"{names[base]}: {few} numbers [{least} to {most}] for {share:.0%}, 13 recover {thirteen}")
    return "; ".join(parts)
