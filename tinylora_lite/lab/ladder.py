"""The ladder: the shapes on which bases are compared, from few numbers to all weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tinylora_lite.lab.claim import Point
from tinylora_lite.lab.shapes import (
    all_weights,
    calibrated_numbers,
    lora_numbers,
    lora_xs_numbers,
    random_numbers,
    untouched,
)
from tinylora_lite.lab.statistics import share_of_gain, smallest_count
from tinylora_lite.lab.store import Store
from tinylora_lite.lab.trial import BASE


def ladder_on(base: str, seeds: int = 5) -> dict[str, Point]:
    """The shapes that compare bases, from few numbers to all weights; on the lab's own base those of its first claim.

    Args:
        base: a shipped base of 49 modules.
        seeds: reported of each shape.
    """
    points = {
        "base": untouched(base),
        "4 random": random_numbers(13, base=base),
        "13 random": random_numbers(4, base=base),
        "49 random": random_numbers(1, base=base),
        "98 random": random_numbers(1, u=2, base=base),
        "49 LoRA-XS": lora_xs_numbers(1, base),
        "196 LoRA-XS": lora_xs_numbers(2, base),
        "784 LoRA-XS": lora_xs_numbers(4, base),
        "LoRA, r = 1": lora_numbers(1, base),
        "all weights": all_weights(base),
        "13 calibrated": calibrated_numbers(13, base),
    }
    if base == BASE:
        return points
    return {name: replace(point, seeds=seeds) for name, point in points.items()}


def ends(ladder: Mapping[str, Point]) -> tuple[Point, Point]:
    """The ceiling and the floor of a ladder: all weights, and the untouched base."""
    return ladder["all weights"], ladder["base"]


RUNGS = (
    *("4 random", "13 random", "49 random", "49 LoRA-XS", "98 random", "196 LoRA-XS", "784 LoRA-XS"),
    "LoRA, r = 1",
)
"""Of :func:`ladder_on`, those that a smallest update is looked for among."""


def climb(ladder: Mapping[str, Point]) -> tuple[Sequence[Point], Point, Point]:
    """The rungs, the ceiling and the floor of a ladder, as smallest counts are looked for."""
    return [ladder[name] for name in RUNGS], *ends(ladder)


def as_count(count: int, ladder: Mapping[str, Point], store: Store) -> str:
    """A smallest count in words: that of all weights says no more than that the largest rung falls short."""
    largest = ladder[RUNGS[-1]].records(store)[0]["parameters"]
    return f"{count:,}" if count <= largest else f"more than {largest:,}"


def counts_on(ladders: Mapping[str, Mapping[str, Point]], names: Mapping[str, str], share: float, store: Store) -> str:
    """In words, on each base: the smallest count for a share of the gain, and what 13 random numbers recover."""
    parts = []
    for base, ladder in ladders.items():
        count, low, high = smallest_count(share, *climb(ladder), store)
        thirteen = share_of_gain(ladder["13 random"], *ends(ladder), store).as_percent()
        few, least, most = (as_count(n, ladder, store) for n in (count, low, high))
        parts.append(f"{names[base]}: {few} numbers [{least} to {most}] for {share:.0%}, 13 recover {thirteen}")
    return "; ".join(parts)
