"""Two scores on the same problems: how far apart, how sure of that we are, and whether it could be chance."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import zip_longest
from textwrap import shorten
from typing import Any

import numpy as np

from tinylora_lite.evaluation.score import Score, bootstrap_interval, paired_interval


@dataclass(frozen=True)
class Difference:
    """How two mean rewards on the same problems differ.

    Attributes:
        base, adapted: the two.
        difference: ``adapted - base``.
        low, high: its 95 % interval over problems: Tango's where the test is McNemar's, else the bootstrap's.
        p_value: the chance of a difference at least as large, in either direction, were the two equally good.
        test: ``"McNemar, exact"`` where both answered every problem once and rewards are 0 or 1, else ``"sign flips"``,
            which swaps the two at random within problems.
        better, worse: problems on which the adapted model's mean is above the base's, and below it.
    """

    base: float
    adapted: float
    difference: float
    low: float
    high: float
    p_value: float
    test: str
    better: int
    worse: int

    def __str__(self) -> str:
        return (
            f"{self.base:.1%} -> {self.adapted:.1%}, {100 * self.difference:+.1f} points "
            f"[{100 * self.low:+.1f}, {100 * self.high:+.1f}], better on {self.better} and worse on {self.worse}, "
            f"p {'< 0.0001' if self.p_value < 1e-4 else f'= {self.p_value:.2g}'} ({self.test})"
        )


@dataclass(frozen=True)
class Comparison:
    """Two scores on the same problems.

    Attributes:
        n: problems.
        strict: by the task's reward.
        lenient: by the reward that takes the answer from wherever it is; ``None`` where a score has none.
    """

    n: int
    strict: Difference
    lenient: Difference | None

    def summary(self) -> dict[str, Any]:
        """The same as nested dictionaries, for a record."""
        return asdict(self)

    def __str__(self) -> str:
        lenient = "" if self.lenient is None else f"; lenient: {self.lenient}"
        return f"{self.strict}{lenient}; n = {self.n}"


def compare(base: Score, adapted: Score, *, seed: int = 0) -> Comparison:
    """Compares two scores problem by problem.

    Args:
        base: what ``evaluate`` returned for the one.
        adapted: and for the other, of the same problems in the same order; the number of samples may differ.
        seed: of the resampling, where there is any.

    Raises:
        ValueError: the two are of different problems, or one holds no completions.
    """
    if not (base.completions and adapted.completions):
        raise ValueError("a score without completions cannot be compared; evaluate anew, or use Score.load")
    ours, theirs = ([(c.prompt, c.gold) for c in s.completions[:: s.samples]] for s in (base, adapted))
    for place, (one, other) in enumerate(zip_longest(ours, theirs), 1):
        if one != other:
            how = f"number {place} is {_short(one)} in the one and {_short(other)} in the other"
            raise ValueError(f"the scores are of different problems: {how}; evaluate both on the same task and split")
    both = base.lenient, adapted.lenient
    lenient = None if both[0] is None or both[1] is None else _difference(both[0], both[1], seed)
    return Comparison(len(ours), _difference(base, adapted, seed), lenient)


def _difference(base: Score, adapted: Score, seed: int) -> Difference:
    from scipy import stats  # takes a second to import, which import tinylora_lite should not

    gaps, n = adapted.rewards.mean(axis=1) - base.rewards.mean(axis=1), base.n
    mean, better, worse = float(gaps.mean()), int((gaps > 0).sum()), int((gaps < 0).sum())
    rewards = {c.reward for score in (base, adapted) for c in score.completions}
    once = base.samples == adapted.samples == 1 and rewards <= {0.0, 1.0}
    if once:
        test, disagree = "McNemar, exact", better + worse
        p_value = stats.binomtest(better, disagree).pvalue if disagree else 1.0
        low, high = paired_interval(better, worse, n)
    else:
        test = "sign flips"
        p_value = stats.permutation_test(
            (gaps,),
            lambda values, axis: values.mean(axis=axis),
            permutation_type="samples",
            vectorized=True,
            batch=max(1, 4_000_000 // n),
            random_state=np.random.default_rng(seed),
        ).pvalue
        if np.ptp(gaps) > 0:
            low, high = bootstrap_interval(gaps, seed)
        elif abs(mean) <= 1:  # nothing to resample, and yet no certainty: as if each problem were answered once
            low, high = paired_interval(n * max(mean, 0.0), n * max(-mean, 0.0), n)
        else:
            low, high = mean, mean
    return Difference(base.accuracy, adapted.accuracy, mean, low, high, float(p_value), test, better, worse)


def _short(problem: tuple[str, str] | None) -> str:
    if problem is None:
        return "not there"
    return f"{shorten(problem[0], 43, placeholder='...')!r} (answer {problem[1]!r})"
