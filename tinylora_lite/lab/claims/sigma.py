"""Where Σ stands: on the left as the paper writes it, split as PEFT has it, or on the right as LoRA-XS computes."""

from __future__ import annotations

from dataclasses import replace

from matplotlib.figure import Figure

from tinylora_lite.config import Sigma
from tinylora_lite.lab.claim import Claim, Verdict
from tinylora_lite.lab.claims.rl_parameters import BASE, FULL, RANDOM, THIRTEEN
from tinylora_lite.lab.figures import side_by_side
from tinylora_lite.lab.gain import difference
from tinylora_lite.lab.store import Store

PLACES: tuple[Sigma, ...] = ("left", "split", "right")
POINTS = {
    point.label: {p: replace(point, label=f"Σ {p}", trial=replace(point.trial, sigma=p)) for p in PLACES}
    for point in (THIRTEEN, RANDOM[6])
}


def draw(store: Store) -> Figure:
    """Accuracy by the place of Σ, at 13 and at 49 numbers."""
    return side_by_side([(f"{n},", list(p.values())) for n, p in POINTS.items()], store, BASE, full=FULL)


def judge(store: Store) -> Verdict:
    """The other two places against the paper's."""
    ours = "; ".join(
        f"{numbers}: Σ {place} over Σ left by {difference(points[place], points['left'], store).as_points()}"
        for numbers, points in POINTS.items()
        for place in PLACES[1:]
    )
    return Verdict(ours + ".", "not in the paper")


CLAIM = Claim(
    name="sigma",
    order=5,
    title="Where Σ stands is a choice that the paper does not discuss.",
    paper="Σ stands beside U; PEFT splits it, and LoRA-XS's code has it beside V.",
    where="section 4; the side is left open",
    points=(BASE, FULL, *(point for points in POINTS.values() for point in points.values())),
    draw=draw,
    judge=judge,
)
