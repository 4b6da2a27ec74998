"""Shares of the full gain: the common measure of the paper's claims, with intervals over seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinylora_lite.lab.claim import Estimate, Finding, Point
from tinylora_lite.lab.store import Store

NEVER = "none of these"


def share_of_gain(point: Point, full: Point, base: Point, store: Store) -> Estimate:
    """What a shape gains over the base, as a share of what all weights gain.

    The interval is that of the shape's seeds; base and ceiling stand at their means, whose own error is several times
    smaller.

    Raises:
        ValueError: fewer than two seeds of any of the three were run.
    """
    found = [p.estimate(store) for p in (point, full, base)]
    if None in found:
        raise ValueError(f"not all runs of {point.label}, {full.label} and {base.label} are there; run the claim first")
    own, ceiling, floor = (estimate for estimate in found if estimate is not None)
    gain = ceiling.mean - floor.mean
    shares = [(value - floor.mean) / gain for value in own.values]
    mean, half = float(np.mean(shares)), (own.high - own.low) / 2 / gain
    return Estimate(mean, mean - half, mean + half, tuple(shares))


def smallest_reaching(share: float, ladder: Sequence[Point], full: Point, base: Point, store: Store) -> str:
    """The label of the first shape of a ladder, from small to large, whose mean recovers a share of the full gain."""
    for point in ladder:
        if share_of_gain(point, full, base, store).mean >= share:
            return point.label
    return NEVER


def verdict_on(estimate: Estimate, bar: float) -> Finding:
    """Whether an interval lies above a bar, below it, or holds both sides of it."""
    if estimate.low >= bar:
        return "reproduced"
    return "not reproduced" if estimate.high < bar else "undecided"


def verdict_between(claimed_higher: Estimate, claimed_lower: Estimate) -> Finding:
    """Whether two intervals lie apart, and the way round that the paper says."""
    if claimed_higher.low > claimed_lower.high:
        return "reproduced"
    return "not reproduced" if claimed_higher.high < claimed_lower.low else "undecided"


def difference(first: Point, second: Point, store: Store) -> Estimate:
    """How much more accurate the first shape is than the second, seed by seed.

    A seed moves data, sampling and P alike in both, so that pairs differ by less than the shapes do.

    Raises:
        ValueError: fewer than two seeds of both were run.
    """
    found = [point.estimate(store) for point in (first, second)]
    if None in found:
        raise ValueError(f"not all runs of {first.label} and {second.label} are there; run the claim first")
    pairs = zip(*(estimate.values for estimate in found if estimate is not None), strict=False)
    return Estimate.of_differences([a - b for a, b in pairs])


def verdict_on_difference(claimed_higher_by: Estimate) -> Finding:
    """Whether a difference that the paper says is positive lies above zero, below it, or holds both sides of it."""
    if claimed_higher_by.low > 0:
        return "reproduced"
    return "not reproduced" if claimed_higher_by.high < 0 else "undecided"
