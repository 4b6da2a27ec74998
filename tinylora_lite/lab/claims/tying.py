"""How to spend a budget of numbers: on more groups or on longer vectors, and which modules to tie. Figures 4, 8, 9."""

from __future__ import annotations

from tinylora_lite.lab.claim import Claim, Point, Verdict
from tinylora_lite.lab.claims import rl_parameters as rl
from tinylora_lite.lab.figures import side_by_side
from tinylora_lite.lab.shapes import random_numbers
from tinylora_lite.lab.statistics import difference, verdict_on, verdict_over
from tinylora_lite.lab.store import Store


def spent(label: str, n_tie: int | str, u: int, tying: str = "tiled") -> Point:
    """A budget spent in one way."""
    return random_numbers(n_tie, u).varied(label, tying=tying)


# Points of the first claim, under names that say how their budget is spent, beside others.
AROUND_49 = (
    rl.FORTY_NINE.varied("49: 49 groups, u = 1"),
    spent("52: 13 groups, u = 4", 4, 4),
    spent("48: 4 groups, u = 12", 13, 12),
    spent("49: 1 group, u = 49", "all", 49),
)
AROUND_13 = (
    rl.THIRTEEN.varied("13: 13 groups, u = 1"),
    spent("12: 4 groups, u = 3", 13, 3),
    spent("13: 1 group, u = 13", "all", 13),
    spent("14: attention and MLP, u = 7", 1, 7, "attention, MLP"),
)
TYING = (
    rl.RANDOM[3].varied("7: 7 tiled groups, u = 1"),
    spent("7: one for each type, u = 1", 7, 1, "structured"),
    rl.THIRTEEN.varied("13: 13 tiled groups, u = 1"),
    spent("14: two for each type, u = 1", 4, 1, "structured"),
    rl.RANDOM[1].varied("2: 2 tiled groups, u = 1"),
    spent("2: attention and MLP, u = 1", 1, 1, "attention, MLP"),
)


def judge(store: Store) -> Verdict:
    """More groups against one long vector, at both budgets; tiled against structured beside it."""
    wide = {n: difference(points[0], points[k], store) for n, points, k in ((49, AROUND_49, 3), (13, AROUND_13, 2))}
    tiled = {n: difference(TYING[k], TYING[k + 1], store) for n, k in ((7, 0), (13, 2))}
    halves = difference(AROUND_13[3], AROUND_13[2], store)
    ours = "; ".join(f"{n} numbers: groups over one vector by {e.as_points()}" for n, e in wide.items())
    ours += "; " + "; ".join(f"tiled over structured at {n} by {e.as_points()}" for n, e in tiled.items())
    ours += f"; one vector each for attention and MLP over one for both by {halves.as_points()}."
    return Verdict(ours, verdict_over(map(verdict_on, wide.values())))


CLAIM = Claim(
    name="tying",
    order=5,
    title="At an equal count, more groups of modules are worth more than longer vectors.",
    paper=(
        "Qwen2.5-3B: 62 against 60 % with 4 numbers, 68 against 64 % with 16, 79 against 74 % with 256; tiled 1 to 3 "
        "points above structured at 63 and 126 numbers."
    ),
    where="Figures 4 and 8, sections 6.4 and 6.5",
    points=(rl.BASE, rl.FULL, *AROUND_49, *AROUND_13, *TYING),
    draw=lambda store: side_by_side((*AROUND_49, *AROUND_13, *TYING), store, rl.BASE, rl.FULL),
    judge=judge,
)
