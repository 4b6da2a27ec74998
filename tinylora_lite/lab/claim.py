"""What a claim is: the paper's number, the runs that test it, a figure and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy import stats

from tinylora_lite.lab.store import Record, Store
from tinylora_lite.lab.trial import Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Finding = Literal[
    "reproduced", "reproduced in part", "not reproduced", "undecided", "not testable at this size", "not in the paper"
]


@dataclass(frozen=True)
class Point:
    """A point of a figure: a shape whose learning rate is chosen on validation, and then run from several seeds.

    Attributes:
        label: names it in the figure.
        trial: its settings; learning rate, seed and split are filled in.
        rates: the learning rates to start from, in steps of a factor of two. While the best of them is the smallest or
            the largest, the next one is tried too, up to ``plan.REACH`` beyond. Empty: the trial's own rate, no sweep.
        seeds: how many the test split sees.
        sweep_seeds: how many the validation split sees for each rate.
        like: another point, whose chosen learning rate this one takes instead of sweeping.
    """

    label: str
    trial: Trial
    rates: tuple[float, ...] = ()
    seeds: int = 5
    sweep_seeds: int = 1
    like: Point | None = None

    def sweep(self, rates: Iterable[float]) -> list[Trial]:
        """The runs that compare learning rates, scored on the validation split."""
        return [
            replace(self.trial, learning_rate=rate, seed=seed, split="validation")
            for rate in rates
            for seed in range(self.sweep_seeds)
        ]

    def tests(self, rate: float) -> list[Trial]:
        """The runs that are reported, scored on the test split."""
        return [replace(self.trial, learning_rate=rate, seed=seed, split="test") for seed in range(self.seeds)]

    def records(self, store: Store) -> list[Record]:
        """The test records of the best learning rate, as far as they were run."""
        from tinylora_lite.lab.plan import chosen_rate

        rate = chosen_rate(self, store)
        return [] if rate is None else store.of(self.tests(rate))

    def estimate(self, store: Store, score: str | None = None) -> Estimate | None:
        """The mean accuracy over seeds and its interval; ``None`` with fewer than two records.

        Args:
            store: the records.
            score: of theirs; ``None`` is the one that the store compares by.
        """
        accuracies = [record["scores"][score or store.score]["accuracy"] for record in self.records(store)]
        return Estimate.of(accuracies) if len(accuracies) > 1 else None


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
        """A ratio and its interval, in three digits or in whole numbers."""
        mean, low, high = (f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}] times"

    def __str__(self) -> str:
        return f"{self.mean:.1%} [{self.low:.1%}, {self.high:.1%}], {len(self.values)} seeds"


@dataclass(frozen=True)
class Verdict:
    """What came out.

    Attributes:
        ours: our numbers with their intervals, in a sentence.
        finding: the verdict's word.
    """

    ours: str
    finding: Finding


@dataclass(frozen=True)
class Claim:
    """A claim and how it is tested.

    Attributes:
        name: on the command line.
        order: where the claim stands in the table.
        title: the claim in a sentence.
        paper: what the paper says, with its number.
        where: where the paper says so.
        points: what is run.
        draw: makes the figure from the records.
        judge: gives the verdict from the records; called when all of them are there.
    """

    name: str
    order: int
    title: str
    paper: str
    where: str
    points: tuple[Point, ...]
    draw: Callable[[Store], Figure]
    judge: Callable[[Store], Verdict]
