"""A mean over seeds and its 95 % interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its 95 % interval (Student's).

    Attributes:
        mean, low, high: shares; the interval of an accuracy is cut off at 0 and 1.
        values: one for each seed.
    """

    mean: float
    low: float
    high: float
    values: tuple[float, ...] = field(repr=False)

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """The estimate from at least two values."""
        free = cls.of_differences(values)
        return cls(free.mean, max(0.0, free.low), min(1.0, free.high), free.values)

    @classmethod
    def of_differences(cls, values: Sequence[float]) -> Estimate:
        """The estimate of a difference: nothing is cut off."""
        import numpy as np
        from scipy import stats  # here, as a list of claims needs none of it

        mean, error = float(np.mean(values)), float(stats.sem(values))
        low, high = stats.t.interval(0.95, len(values) - 1, loc=mean, scale=max(error, 1e-9))
        return cls(mean, float(low), float(high), tuple(values))

    def as_percent(self) -> str:
        """The mean and the interval, in whole percents."""
        return f"{self.mean:.0%} [{self.low:.0%}, {self.high:.0%}]"

    def as_points(self) -> str:
        """A difference and its interval, in percentage points."""
        return f"{100 * self.mean:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}] points"

    def as_times(self) -> str:
        """A ratio and its interval, in three digits or in integers."""
        mean, low, high = (f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}] times"

    def __str__(self) -> str:
        return f"{self.mean:.1%} [{self.low:.1%}, {self.high:.1%}], {len(self.values)} seeds"
