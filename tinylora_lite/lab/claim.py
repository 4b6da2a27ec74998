"""What a claim is: the paper's number, the runs that test it, a figure and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tinylora_lite.lab.estimate import Estimate
from tinylora_lite.lab.store import RESULTS, Record, Store
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
        rates: the learning rates to start from, or the values of ``varies``. Empty: the trial's own rate, no sweep.
        seeds: how many the test split sees.
        sweep_seeds: how many the validation split sees for each rate.
        like: another point, whose chosen learning rate this one takes instead of sweeping.
        reach: while the best rate is the smallest or the largest, the next one, a factor of two away, is tried too, up
            to this many beyond the first and the last of ``rates``; with 0 they need not be numbers.
        sweep_from: the first seed of the sweep; beyond ``seeds``, no reported seed has chosen its own rate.
        varies: the setting that the sweep chooses.
        by: the score of the validation records that it is chosen by.
    """

    label: str
    trial: Trial
    rates: tuple[Any, ...] = ()
    seeds: int = 5
    sweep_seeds: int = 1
    like: Point | None = None
    reach: int = 6
    sweep_from: int = 0
    varies: str = "learning_rate"
    by: str = "sampled"

    def varied(self, label: str, **changes: Any) -> Point:
        """The same point under another label, with other attributes of its own or settings of its trial."""
        own = {name: changes.pop(name) for name in [f.name for f in fields(self)] if name in changes}
        return replace(self, label=label, trial=replace(self.trial, **changes), **own)

    def sweep(self, rates: Iterable[Any]) -> list[Trial]:
        """The runs that compare learning rates, scored on the validation split."""
        return [
            replace(self.trial, **{self.varies: rate}, seed=seed, split="validation")
            for rate in rates
            for seed in range(self.sweep_from, self.sweep_from + self.sweep_seeds)
        ]

    def tests(self, rate: Any) -> list[Trial]:
        """The runs that are reported, scored on the test split."""
        return [replace(self.trial, **{self.varies: rate}, seed=seed, split="test") for seed in range(self.seeds)]

    def sweep_accuracy(self, rate: Any, store: Store) -> float | None:
        """The mean validation accuracy of a learning rate; ``None`` where not all its runs were made."""
        accuracies = [record["scores"][self.by]["accuracy"] for record in store.of(self.sweep([rate]))]
        return sum(accuracies) / self.sweep_seeds if len(accuracies) == self.sweep_seeds else None

    def swept(self, store: Store) -> tuple[list[Any], Any]:
        """The rates that are compared so far, and the best of them; ``None`` where one of them still has to run."""
        rates = sorted(self.rates)
        while True:
            found = {rate: self.sweep_accuracy(rate, store) for rate in rates}
            if None in found.values():
                return rates, None
            best = max(rates, key=lambda rate: found[rate] or 0.0)
            if self.reach and best == rates[0] and best / 2 >= min(self.rates) / 2**self.reach * 0.99:
                rates = [best / 2, *rates]
            elif self.reach and best == rates[-1] and best * 2 <= max(self.rates) * 2**self.reach * 1.01:
                rates = [*rates, best * 2]
            else:
                return rates, best

    def rate(self, store: Store) -> Any:
        """The learning rate with the best validation accuracy; ``None`` while the sweep is not complete."""
        if self.like is not None:
            return self.like.rate(store)
        return self.swept(store)[1] if self.rates else getattr(self.trial, self.varies)

    def records(self, store: Store) -> list[Record]:
        """The test records of the best learning rate, as far as they were run."""
        rate = self.rate(store)
        return [] if rate is None else store.of(self.tests(rate))

    def parameters(self, store: Store) -> int:
        """How many parameters train; 0 before the first run."""
        return next((int(record["parameters"]) for record in self.records(store)), 0)

    def accuracies(self, store: Store, score: str | None = None) -> list[float]:
        """The accuracy of each of :meth:`records`, by one of their scores; ``None`` is the one of the store."""
        return [record["scores"][score or store.score][store.reading] for record in self.records(store)]

    def estimate(self, store: Store, score: str | None = None) -> Estimate | None:
        """The mean of :meth:`accuracies` and its interval; ``None`` with fewer than two records."""
        accuracies = self.accuracies(store, score)
        return Estimate.of(accuracies) if len(accuracies) > 1 else None


def flat(*nested: Any) -> tuple[Point, ...]:
    """All points of nested sequences and dictionaries, in their order."""
    found: list[Point] = []
    for one in nested:
        inside = one.values() if isinstance(one, dict) else one
        found += [one] if isinstance(one, Point) else flat(*inside)
    return tuple(found)


class Verdict(NamedTuple):
    """What came out: our numbers with their intervals, in a sentence, and the verdict's word."""

    ours: str
    finding: Finding


@dataclass(frozen=True)
class Claim:
    """A claim and how it is tested.

    Attributes:
        name: on the command line.
        order: the claim's place in the table.
        title: the claim in a sentence.
        paper: what the paper says, with its number.
        where: where the paper says so.
        points: what is run.
        draw: makes the figure from the records.
        judge: gives the verdict from the records; called when all of them are there.
        folder: where its records are kept. Only claims whose records are the lab's are rows of the table.
    """

    name: str
    order: int
    title: str
    paper: str
    where: str
    points: tuple[Point, ...]
    draw: Callable[[Store], Figure]
    judge: Callable[[Store], Verdict]
    folder: Path = RESULTS
