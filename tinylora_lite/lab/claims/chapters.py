"""The runs of the first chapters, on the base that the library ships: 13 numbers, LoRA-XS, LoRA and all weights."""

from __future__ import annotations

from typing import Any

from tinylora_lite import nano
from tinylora_lite.lab.claim import Claim, Point, Verdict, flat
from tinylora_lite.lab.figures import Series, against_numbers
from tinylora_lite.lab.statistics import difference
from tinylora_lite.lab.store import CHAPTERS, Store
from tinylora_lite.lab.trial import Trial
from tinylora_lite.view import plot

RATES = (0.1, 0.2, 0.4)
OF_WEIGHTS = (3e-4, 1e-3, 3e-3)


def shape(label: str, rates: tuple[float, ...], seeds: int = 5, sweep_seeds: int = 1, **settings: Any) -> Point:
    """Thirty steps of GRPO on the shipped base; the sweep has these rates and no others."""
    return Point(label, Trial(base=nano.BASE, steps=30, **settings), rates, seeds, sweep_seeds, reach=0)


BASE = Point("base", Trial(base=nano.BASE, method="none", learning_rate=0.0, samples=8), seeds=1)
ALL = shape("all weights", OF_WEIGHTS, numbers="all weights", learning_rate=3e-4)
PAPER = shape("13 random, r = 2", RATES)
RANK_ONE = shape("13 random, r = 1", RATES, sweep_seeds=3, rank=1)
"""Swept on three seeds: on one, a rate had won that destroys the model from other seeds."""
UNTIED = shape("98 random", RATES, u=2, n_tie=1)
UNTIED_ONE = shape("49 random", (), 3, n_tie=1)
CALIBRATED = shape("13 calibrated", RATES, numbers="calibrated", rank=8, u=13, n_tie="all", learning_rate=0.2)
FOUR = shape("4 calibrated", (), 3, numbers="calibrated", rank=8, u=4, n_tie="all", learning_rate=0.2)
SAME_SHAPE = shape("13 random, r = 8", (0.005, 0.01, 0.02), rank=8, u=13, n_tie="all", learning_rate=0.01)
"""The control of the calibrated numbers: all their settings, and random directions.

One number drives 49 modules with 64 entries each. Its P is about twenty times as long as a calibrated direction, and
its rates are smaller by that much.
"""
XS_ONE = shape("49 LoRA-XS", RATES, numbers="LoRA-XS", rank=1, sigma="right")
"""One number for each module: the place of Σ does not matter."""
SIDES = ("left", "split", "right")
XS_TWO = {
    side: shape(f"196 LoRA-XS, Σ {side}", (0.05, 0.1, 0.2), numbers="LoRA-XS", rank=2, sigma=side) for side in SIDES
}
FINER = (6.25e-4, 1.25e-3, 2.5e-3, 5e-3)
XS_LARGE = {
    side: shape(f"50,176 LoRA-XS, Σ {side}", FINER, 3, numbers="LoRA-XS", rank=32, sigma=side)
    for side in ("left", "right")
}
LORA = shape("LoRA, r = 1", OF_WEIGHTS, 3, numbers="LoRA", rank=1)


def draw(store: Store) -> plot.Figure:
    """Accuracy against numbers, a line for each method."""
    xs = (XS_ONE, XS_TWO["right"], XS_LARGE["right"])
    lines = ((PAPER, UNTIED_ONE, UNTIED), (FOUR, CALIBRATED), xs, (LORA,), (ALL,))
    drawn = against_numbers([Series(points) for points in lines], store, BASE)
    for accuracy in BASE.accuracies(store):
        drawn.axes[0].axhline(accuracy, ls="--", lw=1.2, color=plot.INK)
    return drawn


def judge(store: Store) -> Verdict:
    """Thirteen numbers by where they point, and all weights."""
    shown = (RANK_ONE, PAPER, SAME_SHAPE, CALIBRATED, ALL)
    found = "; ".join(f"{point.label} {point.estimate(store)}" for point in shown)
    gap = difference(CALIBRATED, SAME_SHAPE, store)
    return Verdict(f"{found}. Calibrated over random directions of one shape by {gap.as_points()}.", "not in the paper")


CLAIM = Claim(
    name="chapters",
    order=18,
    title="The runs of chapters 2 to 6.",
    paper="Not tested here.",
    where="no claim of the paper",
    points=flat(
        BASE, ALL, PAPER, RANK_ONE, UNTIED, UNTIED_ONE, CALIBRATED, FOUR, SAME_SHAPE, XS_ONE, XS_TWO, XS_LARGE, LORA
    ),
    draw=draw,
    judge=judge,
    folder=CHAPTERS,
)
