"""Which singular directions: the leading ones, as everyone takes them, or others."""

from __future__ import annotations

from dataclasses import replace

from matplotlib.figure import Figure

from tinylora_lite.lab.claim import Claim, Verdict
from tinylora_lite.lab.claims.rl_parameters import BASE, FULL, RANDOM
from tinylora_lite.lab.directions import WHICH
from tinylora_lite.lab.figures import side_by_side
from tinylora_lite.lab.statistics import difference
from tinylora_lite.lab.store import Store

SHAPE = RANDOM[6]
"""49 numbers, one to a module: the draw of P moves them less than it moves 13."""
POINTS = {kind: replace(SHAPE, label=kind, trial=replace(SHAPE.trial, directions=kind)) for kind in WHICH}


def draw(store: Store) -> Figure:
    """Accuracy by the kind of directions."""
    return side_by_side([("", list(POINTS.values()))], store, BASE, full=FULL)


def judge(store: Store) -> Verdict:
    """The leading directions against each other kind."""
    gaps = {kind: difference(POINTS["leading"], POINTS[kind], store) for kind in WHICH[1:]}
    ours = "; ".join(f"leading over {kind} by {gap.as_points()}" for kind, gap in gaps.items())
    return Verdict(f"49 numbers: {ours}.", "not in the paper")


CLAIM = Claim(
    name="directions",
    order=7,
    title="Are the leading singular directions the ones to stand on?",
    paper="Takes the leading directions throughout and tests no others.",
    where="section 4; assumed",
    points=(BASE, FULL, *POINTS.values()),
    draw=draw,
    judge=judge,
)
