"""Which runs a claim still needs, which of them share a batch, and the table of what was found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tinylora_lite.lab.claim import Claim, Point
from tinylora_lite.lab.store import Store
from tinylora_lite.lab.trial import Trial

POPULATION = 8
"""The most trials that run as one population."""


def missing(point: Point, store: Store) -> list[Trial]:
    """The runs that can be made now: of the sweep, or else of the report."""
    rate, swept = point.rate(store), point.like or point
    wanted = swept.sweep(swept.swept(store)[0]) if rate is None else point.tests(rate)
    return [trial for trial in wanted if trial not in store]


def jobs(trials: Iterable[Trial]) -> list[list[Trial]]:
    """Trials put together: those that can share a batch, up to ``POPULATION`` of them, and each other one by itself."""
    batches: dict[Trial, list[Trial]] = {}
    for trial in dict.fromkeys(trials):
        batches.setdefault(trial.batch() or trial, []).append(trial)
    return [batch[i : i + POPULATION] for batch in batches.values() for i in range(0, len(batch), POPULATION)]


def progress_of(claim: Claim, store: Store) -> dict[str, int]:
    """How many runs of a claim are recorded, and how many are known to be missing; a sweep may call for more."""
    known: set[Trial] = set()
    for point in claim.points:
        swept, rate = point.like or point, point.rate(store)
        if swept.rates:
            known.update(swept.sweep(swept.swept(store)[0]))
        # Before the sweep is over the rate is not known, but how many runs there will be is.
        known.update(point.tests(-1.0 if rate is None else rate))
    recorded = sum(trial in store for trial in known)
    return {"recorded": recorded, "missing": len(known) - recorded}


def rows_of(claims: Sequence[Claim], store: Store) -> list[dict[str, str]]:
    """The table's rows: name, title, paper, where, ours, finding; ``"not yet run"`` where runs are missing."""
    rows = []
    for claim in claims:
        row = {"name": claim.name, "title": claim.title, "paper": claim.paper, "where": claim.where}
        if progress_of(claim, store)["missing"]:
            rows.append(row | {"ours": "", "finding": "not yet run"})
        else:
            rows.append(row | claim.judge(store)._asdict())
    return rows
