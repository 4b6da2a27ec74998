"""What several points say together: differences, shares of the full gain, smallest counts, and verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from tinylora_lite.lab.claim import Finding, Point
from tinylora_lite.lab.estimate import Estimate
from tinylora_lite.lab.store import Store

Ends = tuple[Sequence[Point], Point, Point]
"""The shapes of a base in any order, its ceiling (all weights) and its floor (the untouched base)."""
DRAWS = 2000
"""Of the bootstrap over seeds."""


def estimates(points: Sequence[Point], store: Store) -> list[Estimate]:
    """The estimate of each point. Raises ``ValueError`` where one has fewer than two records."""
    found = [estimate for point in points if (estimate := point.estimate(store)) is not None]
    if len(found) < len(points):
        *first, last = (point.label for point in points)
        names = f"{', '.join(first)} and {last}" if first else last
        raise ValueError(f"not all runs of {names} are there; run the claim first")
    return found


def listed(points: Sequence[Point], store: Store, between: str = ", ") -> str:
    """In words: each point's label with its estimate in percent. Raises as :func:`estimates`."""
    found = zip(points, estimates(points, store), strict=True)
    return between.join(f"{point.label} {estimate.as_percent()}" for point, estimate in found)


def difference(first: Point, second: Point, store: Store) -> Estimate:
    """How much more accurate the first shape is than the second, seed by seed. Raises as :func:`estimates`.

    A seed moves data, sampling and P alike in both, so that pairs differ by less than the shapes do.
    """
    pairs = zip(*(estimate.values for estimate in estimates([first, second], store)), strict=False)
    return Estimate.of_differences([a - b for a, b in pairs])


def share_of_gain(point: Point, full: Point, base: Point, store: Store) -> Estimate:
    """What a shape gains over the base, as a share of what all weights gain. Raises as :func:`estimates`.

    The interval holds the errors of all three, by the delta method, with Student's t at the degrees of freedom of Welch
    and Satterthwaite.
    """
    from scipy import stats

    own, ceiling, floor = (np.array(estimate.values) for estimate in estimates([point, full, base], store))
    gain = ceiling.mean() - floor.mean()
    shares = (own - floor.mean()) / gain
    share = float(shares.mean())
    # How the share moves with each of the three means.
    slopes = ((own, 1.0), (ceiling, share), (floor, 1.0 - share))
    errors = [(slope / gain) ** 2 * values.var(ddof=1) / len(values) for values, slope in slopes]
    total = max(sum(errors), 1e-18)
    freedom = total**2 / max(sum(e**2 / (len(v) - 1) for e, (v, _) in zip(errors, slopes, strict=True)), 1e-36)
    half = float(stats.t.ppf(0.975, freedom) * total**0.5)
    return Estimate(share, share - half, share + half, tuple(map(float, shares)))


def smallest_reaching(share: float, ladder: Sequence[Point], full: Point, base: Point, store: Store) -> str:
    """The label of the shape of fewest numbers whose mean recovers a share of the full gain."""
    rungs = sorted(ladder, key=lambda point: point.parameters(store))
    reached = (point.label for point in rungs if share_of_gain(point, full, base, store).mean >= share)
    return next(reached, "none of these")


def smallest_count(
    share: float, ladder: Sequence[Point], full: Point, base: Point, store: Store
) -> tuple[int, int, int]:
    """The fewest numbers that recover a share of the full gain, and the ends of its 95 % interval.

    The interval is the bootstrap's: each draw takes seeds of every shape, of ceiling and floor with replacement, and
    the first rung whose mean is high enough; all weights are the last rung and reach any share. Raises as
    :func:`estimates`.
    """
    count, drawn = _smallest(share, (ladder, full, base), store)
    low, high = np.percentile(drawn, (2.5, 97.5), method="nearest")
    return count, int(low), int(high)


def times_fewer(share: float, few: Ends, many: Ends, store: Store) -> Estimate:
    """How many times fewer numbers recover a share of each base's own full gain on one base than on another.

    It is the ratio of the two counts of :func:`smallest_count`; ``values`` are the bootstrap's.
    """
    (fewer, drawn_few), (more, drawn_many) = (_smallest(share, ends, store) for ends in (few, many))
    ratios = drawn_many / drawn_few
    low, high = np.percentile(ratios, (2.5, 97.5), method="nearest")
    return Estimate(more / fewer, float(low), float(high), tuple(ratios.tolist()))


def _smallest(share: float, ends: Ends, store: Store) -> tuple[int, np.ndarray]:
    """The smallest count by the means, and in every draw of the bootstrap, ``[DRAWS]`` float64."""
    ladder, full, base = ends
    rungs = [base, *sorted(ladder, key=lambda point: point.parameters(store)), full]
    values = [np.array(estimate.values) for estimate in estimates(rungs, store)]
    counts = np.array([point.parameters(store) for point in rungs[1:]], dtype=float)
    rng = np.random.default_rng(0)

    def first(means: np.ndarray) -> np.ndarray:
        """Of means ``[draws, rungs]``, the count of the first rung that reaches the share."""
        gains = means[:, 1:] - means[:, :1]
        reached = gains >= share * gains[:, -1:]
        # In a draw whose ceiling is below its floor no rung is a share of the gain; it takes all weights.
        reached[:, -1] = True
        smallest: np.ndarray = counts[reached.argmax(axis=1)]
        return smallest

    # All values of a rung at once: [DRAWS, seeds], drawn with replacement.
    means = np.stack([rng.choice(v, (DRAWS, len(v))).mean(axis=1) for v in values], axis=1)
    return int(first(np.array([[v.mean() for v in values]]))[0]), first(means)


def verdict_on(estimate: Estimate, bar: float = 0.0, *, strictly: bool = True) -> Finding:
    """Whether an interval is above a bar, below it, or holds both sides of it.

    Args:
        estimate: what was measured: a difference that the paper says is positive, or a number with a bar.
        bar: what it has to reach.
        strictly: whether to touch the bar is too little, as where 1 is the ratio of equals.
    """
    if estimate.low > bar or (estimate.low == bar and not strictly):
        return "reproduced"
    return "not reproduced" if estimate.high < bar else "undecided"


def verdict_between(claimed_higher: Estimate, claimed_lower: Estimate) -> Finding:
    """Whether two intervals are apart, and the way round that the paper says."""
    if claimed_higher.low > claimed_lower.high:
        return "reproduced"
    return "not reproduced" if claimed_higher.high < claimed_lower.low else "undecided"


def verdict_over(findings: Iterable[Finding]) -> Finding:
    """One verdict on a claim that is of several settings.

    All of them is *reproduced*, some *reproduced in part*; with none, one that speaks against it is enough.
    """
    found = set(findings)
    if found == {"reproduced"}:
        return "reproduced"
    if "reproduced" in found:
        return "reproduced in part"
    return "not reproduced" if "not reproduced" in found else "undecided"


def verdict_of_replicates(findings: Iterable[Finding]) -> Finding:
    """One verdict on one setting that was tried more than once, on bases of one recipe: theirs if all agree."""
    found = set(findings)
    return found.pop() if len(found) == 1 else "undecided"
