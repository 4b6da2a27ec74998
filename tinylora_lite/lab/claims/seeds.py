"""How much the seed of P alone moves the result, and what the best of N seeds is worth."""

from __future__ import annotations

import numpy as np

from tinylora_lite.lab.claim import Claim, Point, Verdict, flat
from tinylora_lite.lab.claims.rl_parameters import BASE, FULL, RANDOM, THIRTEEN
from tinylora_lite.lab.figures import base_line, percent, score_label
from tinylora_lite.lab.store import Store
from tinylora_lite.view import plot

DRAWS = 8
"""Seeds of P."""
REPEATS = 3
"""Seeds of data and sampling for each P."""
COUNTS = {1: RANDOM[0], 4: RANDOM[2], 13: THIRTEEN}
POINTS = {
    count: [
        point.varied(f"{count} numbers, P {draw}", projection_seed=draw, seeds=REPEATS, like=point)
        for draw in range(DRAWS)
    ]
    for count, point in COUNTS.items()
}


def table(points: list[Point], store: Store) -> np.ndarray:
    """Test accuracies, ``[seeds of P, seeds of data]`` float64; NaN where a run is missing."""
    found = np.full((len(points), REPEATS), np.nan)
    for row, point in enumerate(points):
        accuracies = point.accuracies(store)
        found[row, : len(accuracies)] = accuracies
    return found


def shares(accuracies: np.ndarray) -> tuple[float, float]:
    """The standard deviations that P's seed and all else cause in a :func:`table`: a one-way analysis of variance."""
    repeats = accuracies.shape[1]
    within = accuracies.var(axis=1, ddof=1).mean()
    between = max(0.0, accuracies.mean(axis=1).var(ddof=1) - within / repeats)
    return float(between**0.5), float(within**0.5)


def best_of(points: list[Point], store: Store, count: int) -> float:
    """The expected test accuracy of the P that earned most at the end of training, among ``count`` of them.

    Training rewards choose and test problems judge, so nothing is chosen on what it is judged by. Exact over all
    choices of ``count`` seeds out of those that were run, one data seed at a time.
    """
    from scipy import stats

    means = []
    for repeat in range(REPEATS):
        records = [point.records(store)[repeat] for point in points]
        by_reward = sorted(records, key=lambda record: float(np.mean(record["curve"][-5:])))
        ranks = np.arange(len(records))
        chance = stats.hypergeom.pmf(count - 1, len(records) - 1, ranks, count - 1) * count / len(records)
        means.append(float(chance @ [record["scores"][store.score]["accuracy"] for record in by_reward]))
    return float(np.mean(means))


@plot.style()
def draw(store: Store) -> plot.Figure:
    """Each seed of P a column, each seed of data a dot."""
    drawn, each = plot.panels(1, len(COUNTS), 3.2, sharey=True)
    look = plot.METHODS["tinylora"]
    for axes, (count, points) in zip(each, POINTS.items(), strict=True):
        accuracies = table(points, store)
        for column, row in enumerate(accuracies[np.argsort(-np.nan_to_num(accuracies.mean(axis=1)))]):
            axes.plot([column] * REPEATS, row, ".", color=look.colour, ms=6, alpha=0.7)
        axes.set(title=f"{count} number{'s' if count > 1 else ''}", xlabel="seeds of P, sorted", xticks=[])
        base_line(axes, BASE, store)
    percent(each[0], score_label(store))
    return drawn


def judge(store: Store) -> Verdict:
    """The standard deviations at each count, and what the best of eight is worth."""
    from scipy import stats

    parts = []
    for count, points in POINTS.items():
        accuracies = table(points, store)
        by_p, by_rest = shares(accuracies)
        chance = stats.f_oneway(*accuracies).pvalue
        parts.append(
            f"{count}: P's seed moves the accuracy by {100 * by_p:.1f} points (standard deviation), everything else by "
            f"{100 * by_rest:.1f} (F test: p = {chance:.2g}); best of {DRAWS} seeds by training reward "
            f"{best_of(points, store, DRAWS):.0%}, one seed {best_of(points, store, 1):.0%}"
        )
    return Verdict("; ".join(parts) + ".", "not in the paper")


CLAIM = Claim(
    name="seeds",
    order=9,
    title="How much does the draw of P matter?",
    paper="Means over three seeds; whether P's seed is among what they move is not said.",
    where="left open",
    points=flat(BASE, FULL, COUNTS, POINTS),
    draw=draw,
    judge=judge,
)
