"""The place of Σ: on the left as the paper writes it, split as PEFT has it, or on the right as LoRA-XS computes."""

from __future__ import annotations

from tinylora_lite.lab.claim import Claim, Verdict, flat
from tinylora_lite.lab.claims.rl_parameters import BASE, FORTY_NINE, FULL
from tinylora_lite.lab.figures import side_by_side
from tinylora_lite.lab.statistics import difference
from tinylora_lite.lab.store import Store

PLACES = ("left", "split", "right")
POINTS = {place: FORTY_NINE.varied(f"Σ {place}", sigma=place) for place in PLACES}


def judge(store: Store) -> Verdict:
    """The other two places against the paper's."""
    gaps = {place: difference(POINTS[place], POINTS["left"], store) for place in PLACES[1:]}
    ours = "; ".join(f"Σ {place} over Σ left by {gap.as_points()}" for place, gap in gaps.items())
    return Verdict(f"49 numbers: {ours}.", "not in the paper")


CLAIM = Claim(
    name="sigma",
    order=6,
    title="Does it matter where Σ stands?",
    paper="Σ stands beside U; PEFT splits it, and LoRA-XS's code has it beside V.",
    where="section 4; the side is left open",
    points=flat(BASE, FULL, POINTS),
    draw=lambda store: side_by_side(list(POINTS.values()), store, BASE, FULL),
    judge=judge,
)
