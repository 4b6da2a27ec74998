"""The frozen rank: how many singular directions an adapter should have. Figure 7 of the paper."""

from __future__ import annotations

from tinylora_lite.lab.claim import Claim, Point, Verdict, flat
from tinylora_lite.lab.claims.rl_parameters import BASE, FULL
from tinylora_lite.lab.figures import side_by_side
from tinylora_lite.lab.shapes import around, random_numbers
from tinylora_lite.lab.statistics import difference, verdict_on, verdict_over
from tinylora_lite.lab.store import Store

RANKS = (1, 2, 4, 8, 16)


def at(rank: int, n_tie: int) -> Point:
    """One number to each group, on ``rank`` directions; the entries of P sum over more of them as r grows.

    At rank 2 this is the first claim's own point, which has been run.
    """
    return random_numbers(n_tie, rank=rank).varied(f"r = {rank}", rates=around(0.2 / rank))


THIRTEEN = {rank: at(rank, 4) for rank in RANKS}
FORTY_NINE = {rank: at(rank, 1) for rank in RANKS}
NAMED = [
    point.varied(f"{n} numbers,  {point.label}")
    for n, points in ((13, THIRTEEN), (49, FORTY_NINE))
    for point in points.values()
]


def judge(store: Store) -> Verdict:
    """Rank 2 against rank 16, at both counts; the claim is of both."""
    found = {n: difference(points[2], points[16], store) for n, points in ((13, THIRTEEN), (49, FORTY_NINE))}
    to_one = difference(FORTY_NINE[2], FORTY_NINE[1], store)
    ours = "; ".join(f"{n} numbers: r = 2 over r = 16 by {e.as_points()}" for n, e in found.items())
    ours += f". With 49 numbers r = 2 over r = 1 by {to_one.as_points()}."
    return Verdict(ours, verdict_over(map(verdict_on, found.values())))


CLAIM = Claim(
    name="rank",
    order=4,
    title="The frozen rank should be small: two directions are better than many.",
    paper="Qwen2.5-3B, u = 1: 80, 82, 81, 78, 75 % at r = 1, 2, 4, 16, 64, without intervals.",
    where="Figure 7 and section 6.4",
    points=flat(BASE, FULL, THIRTEEN, FORTY_NINE),
    draw=lambda store: side_by_side(NAMED, store, BASE, FULL),
    judge=judge,
)
