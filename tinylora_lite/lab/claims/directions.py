"""Which singular directions: the leading ones, as everyone takes them, or others."""

from __future__ import annotations

from dataclasses import replace

from matplotlib.figure import Figure

from tinylora_lite.lab.claim import Claim, Verdict
from tinylora_lite.lab.claims.rl_parameters import BASE, FULL, RANDOM, THIRTEEN
from tinylora_lite.lab.directions import WHICH
from tinylora_lite.lab.figures import side_by_side
from tinylora_lite.lab.gain import difference, verdict_on_difference
from tinylora_lite.lab.store import Store

POINTS = {
    point.label: {kind: replace(point, label=kind, trial=replace(point.trial, directions=kind)) for kind in WHICH}
    for point in (THIRTEEN, RANDOM[6])
}


def draw(store: Store) -> Figure:
    """Accuracy by the kind of directions, at 13 and at 49 numbers."""
    return side_by_side([(f"{n},", list(p.values())) for n, p in POINTS.items()], store, BASE, full=FULL)


def judge(store: Store) -> Verdict:
    """The leading directions against each other kind; the paper's choice is right if it beats the random ones."""
    gaps = {
        (numbers, kind): difference(points["leading"], points[kind], store)
        for numbers, points in POINTS.items()
        for kind in WHICH[1:]
    }
    ours = "; ".join(f"{n}: leading over {kind} by {gap.as_points()}" for (n, kind), gap in gaps.items())
    verdicts = {verdict_on_difference(gap) for (_, kind), gap in gaps.items() if kind == "rotated"}
    return Verdict(ours + ".", verdicts.pop() if len(verdicts) == 1 else "undecided")


CLAIM = Claim(
    name="directions",
    order=6,
    title="The leading singular directions are the ones to stand on.",
    paper="Takes the leading directions throughout and tests no others.",
    where="section 4; assumed",
    points=(BASE, FULL, *(point for points in POINTS.values() for point in points.values())),
    draw=draw,
    judge=judge,
)
