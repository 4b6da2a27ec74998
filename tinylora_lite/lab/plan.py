"""Which runs a claim still needs: first the sweeps of learning rates, then the seeds that are reported."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tinylora_lite.lab.claim import Claim, Point
from tinylora_lite.lab.store import Store
from tinylora_lite.lab.trial import Trial

REACH = 6
"""How many factors of two a sweep goes beyond the rates that it starts from, at either end, while the best is there."""
MEMBERS = 8
"""The most trials that run as one population."""


def sweep_accuracy(point: Point, rate: float, store: Store) -> float | None:
    """The mean validation accuracy of a learning rate; ``None`` where not all its runs were made."""
    trials = point.sweep([rate])
    records = store.of(trials)
    if len(records) < len(trials):
        return None
    return float(np.mean([record["scores"]["sampled"]["accuracy"] for record in records]))


def _rates(point: Point, store: Store) -> tuple[list[float], float | None]:
    """The rates that are compared so far, and the best of them; ``None`` where one of them still has to run."""
    rates = sorted(point.rates)
    lowest, highest = rates[0] / 2**REACH, rates[-1] * 2**REACH
    while True:
        found = {rate: sweep_accuracy(point, rate, store) for rate in rates}
        if any(accuracy is None for accuracy in found.values()):
            return rates, None
        best = max(rates, key=lambda rate: found[rate] or 0.0)
        if best == rates[0] and best / 2 >= lowest * 0.99:
            rates = [best / 2, *rates]
        elif best == rates[-1] and best * 2 <= highest * 1.01:
            rates = [*rates, best * 2]
        else:
            return rates, best


def chosen_rate(point: Point, store: Store) -> float | None:
    """The learning rate with the best validation accuracy; ``None`` while the sweep is not complete."""
    if point.like is not None:
        return chosen_rate(point.like, store)
    return _rates(point, store)[1] if point.rates else point.trial.learning_rate


def missing(point: Point, store: Store) -> list[Trial]:
    """The runs that can be made now: of the sweep, or else of the report."""
    rate = chosen_rate(point, store)
    if rate is not None:
        return [trial for trial in point.tests(rate) if trial not in store]
    swept = point.like or point
    return [trial for trial in swept.sweep(_rates(swept, store)[0]) if trial not in store]


def jobs(trials: Iterable[Trial]) -> list[list[Trial]]:
    """Trials put together: those that can share a batch, up to ``MEMBERS`` of them, and each other one by itself."""
    batches: dict[Trial, list[Trial]] = {}
    found: list[list[Trial]] = []
    for trial in dict.fromkeys(trials):
        batch = trial.batch()
        if batch is None:
            found.append([trial])
        else:
            batches.setdefault(batch, []).append(trial)
    for members in batches.values():
        found += [members[i : i + MEMBERS] for i in range(0, len(members), MEMBERS)]
    return found


def progress_of(claim: Claim, store: Store) -> dict[str, int]:
    """How many runs of a claim are recorded, and how many are known to be missing; a sweep may call for more."""
    known: set[Trial] = set()
    for point in claim.points:
        swept = point.like or point
        if swept.rates:
            known.update(swept.sweep(_rates(swept, store)[0]))
        rate = chosen_rate(point, store)
        # Which rate is not known before the sweep is over, but how many runs there will be is.
        known.update(point.tests(-1.0 if rate is None else rate))
    recorded = sum(trial in store for trial in known)
    return {"recorded": recorded, "missing": len(known) - recorded}
