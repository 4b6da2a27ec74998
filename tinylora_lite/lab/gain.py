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


def smallest_count(
    share: float, ladder: Sequence[Point], full: Point, base: Point, store: Store, draws: int = 2000
) -> tuple[int, int, int]:
    """The fewest numbers that recover a share of the full gain, with a 95 % interval by the bootstrap over seeds.

    Every draw takes seeds of every shape, of ceiling and floor with replacement, and the first rung whose mean is high
    enough; all weights are the last rung and reach any share.

    Args:
        share: of the gain of all weights.
        ladder: shapes from few numbers to many.
        full: the ceiling.
        base: the floor.
        store: holds all their runs.
        draws: of the bootstrap.

    Returns:
        The count by the means, and the low and the high end of the interval.

    Raises:
        ValueError: fewer than two seeds of any shape were run.
    """
    rungs = [base, *ladder, full]
    found = [point.estimate(store) for point in rungs]
    if None in found:
        raise ValueError("not all runs of the ladder are there; run the claim first")
    values = [np.array(estimate.values) for estimate in found if estimate is not None]
    counts = [int(point.records(store)[0]["parameters"]) for point in rungs[1:]]
    rng = np.random.default_rng(0)

    def first(means: list[float]) -> int:
        floor, ceiling = means[0], means[-1]
        reached = (mean - floor >= share * (ceiling - floor) for mean in means[1:])
        return next(count for count, enough in zip(counts, reached, strict=True) if enough)

    drawn = [first([rng.choice(v, len(v)).mean() for v in values]) for _ in range(draws)]
    low, high = np.percentile(drawn, (2.5, 97.5), method="nearest")
    return first([float(v.mean()) for v in values]), int(low), int(high)
