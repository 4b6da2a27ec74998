"""Which singular directions: the leading ones, as everyone takes them, or others."""

from __future__ import annotations

from tinylora_lite.lab.claim import Claim, Verdict, flat
from tinylora_lite.lab.claims.rl_parameters import BASE, FORTY_NINE, FULL
from tinylora_lite.lab.figures import side_by_side
from tinylora_lite.lab.statistics import difference
from tinylora_lite.lab.store import Store
from tinylora_lite.lab.trial import DIRECTIONS

POINTS = {kind: FORTY_NINE.varied(kind, directions=kind) for kind in DIRECTIONS}


def judge(store: Store) -> Verdict:
    """The leading directions against each other kind."""
    gaps = {kind: difference(POINTS["leading"], POINTS[kind], store) for kind in DIRECTIONS[1:]}
    ours = "; ".join(f"leading over {kind} by {gap.as_points()}" for kind, gap in gaps.items())
    return Verdict(f"49 numbers: {ours}.", "not in the paper")


CLAIM = Claim(
    name="directions",
    order=7,
    title="Are the leading singular directions the ones to stand on?",
    paper="Takes the leading directions throughout and tests no others.",
    where="section 4; assumed",
    points=flat(BASE, FULL, POINTS),
    draw=lambda store: side_by_side(list(POINTS.values()), store, BASE, FULL),
    judge=judge,
)
