"""Intervals of a mean over problems, and of the difference between two systems on the same problems.

That of one system's accuracy is :func:`~tinylora_lite.evaluate.interval`.
"""

from __future__ import annotations

import math

import numpy as np

Z = 1.959963984540054
"""The normal quantile of a two-sided 95 % interval."""


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean of independent values, ``[problems]`` float, of which at least two differ.

    The bias-corrected and accelerated bootstrap (Efron, "Better bootstrap confidence intervals", 1987), from 9,999
    resamples.
    """
    from scipy import stats  # takes a second to import, which import tinylora_lite should not

    batch = max(1, 4_000_000 // len(values))  # 32 MB at a time, whatever the number of problems
    found = stats.bootstrap((values,), np.mean, batch=batch, method="BCa", random_state=np.random.default_rng(seed))
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def paired_interval(better: float, worse: float, n: int) -> tuple[float, float]:
    """The 95 % interval of the difference between two accuracies on the same ``n`` problems, answered once each.

    Tango's score interval ("Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design", Statistics in Medicine 17, 1998): all differences that the score test does not reject. It
    keeps its coverage where few problems disagree, never leaves -1..1, and has a width even where none does.

    Args:
        better: problems that only the second system solves.
        worse: problems that only the first solves.
        n: problems in all.

    >>> low, high = paired_interval(9, 3, 32)  # section 6 of the paper
    >>> f"{low:.3f} {high:.3f}"
    '-0.027 0.390'
    """
    from scipy.optimize import brentq

    estimate = (better - worse) / n

    def score(difference: float) -> float:
        # The most likely chance of "worse" where the true difference is this one: the root of a quadratic.
        linear = -better - worse + (2 * n - better + worse) * difference
        constant = -worse * difference * (1 - difference)
        q = (math.sqrt(max(linear**2 - 8 * n * constant, 0.0)) - linear) / (4 * n)
        variance = n * max(2 * q + difference * (1 - difference), 0.0)
        gap = better - worse - n * difference
        return gap / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, gap) if gap else 0.0

    def bound(end: float, z: float) -> float:
        # At either end of the scale the variance is nothing, so the score there is beyond every quantile.
        inner = end * (1 - 1e-12)
        if estimate == end or (score(inner) - z) * (score(estimate) - z) > 0:
            return end
        return float(brentq(lambda difference: score(difference) - z, *sorted((inner, estimate)), xtol=1e-12))

    return bound(-1.0, Z), bound(1.0, -Z)
