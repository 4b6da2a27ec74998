"""Where 13 directions should point: random, the best of several draws, or calibrated; and what aim costs in bits."""

from __future__ import annotations

from dataclasses import replace
from math import log2

import numpy as np
from matplotlib.figure import Figure

from tinylora_lite.lab.claim import Claim, Point, Verdict
from tinylora_lite.lab.claims import family, seeds, size
from tinylora_lite.lab.claims import rl_parameters as rl
from tinylora_lite.lab.claims.family import FAMILIES
from tinylora_lite.lab.claims.size import SIZES
from tinylora_lite.lab.estimate import Estimate
from tinylora_lite.lab.figures import base_line, percent, score_label
from tinylora_lite.lab.shapes import calibrated_numbers, ends
from tinylora_lite.lab.statistics import share_of_gain
from tinylora_lite.lab.store import Store
from tinylora_lite.lab.trial import BASE
from tinylora_lite.view import plot

BITS = 16
"""Of a stored number, of a basis too."""
SEED_BITS = 64
"""Of the seed that P is drawn from."""
MODULES = 49
NARROW = tuple(replace(calibrated_numbers(13, rank=rank), label=f"13 calibrated, r = {rank}") for rank in (1, 2, 4))
CALIBRATED = (*NARROW, replace(rl.CALIBRATED[-1], label="13 calibrated, r = 8"))


def looked_at(problems: int) -> Point:
    """Thirteen numbers on a basis from fewer problems."""
    point = rl.CALIBRATED[-1]
    trial = replace(point.trial, calibration=f"problems={problems}")
    # A basis of fewer problems varies more with them, and a rate that suits one can ruin another.
    return replace(point, label=f"{problems} problems", trial=trial, seeds=3, sweep_seeds=2)


FEWER = tuple(looked_at(problems) for problems in (24, 48, 96, 192))


ELSEWHERE = {base: calibrated_numbers(13, base, rank=1) for base in (*SIZES, *FAMILIES) if base != BASE}
"""The narrow basis on every size and family: is aim worth as much there?"""
LADDERS = {base: ladder for base, ladder in (size.LADDERS | family.LADDERS).items() if base != BASE}
BESIDE = ("base", "13 random", "13 calibrated", "49 LoRA-XS", "all weights")
"""What it is compared with on each of them, of :func:`~tinylora_lite.lab.shapes.ladder_on`."""


def own_bits(point: Point) -> int:
    """Of the trained numbers alone, as the paper counts."""
    trial = point.trial
    return BITS * trial.u * (1 if trial.n_tie == "all" else -(-MODULES // int(trial.n_tie)))


def basis_bits(point: Point) -> int:
    """Of the basis that the numbers of a calibrated shape stand on: u directions through all entries of R."""
    return BITS * point.trial.u * MODULES * point.trial.rank**2


@plot.style()
def draw(store: Store) -> Figure:
    """Accuracy against the numbers' bits (left), and against all bits with basis and seed (right)."""
    drawn = Figure(figsize=(plot.WIDTH, 3.6))
    panels = drawn.subplots(1, 2, sharey=True)
    for axes, everything in zip(panels, (False, True), strict=True):
        for method, bits in _bits(store, everything).items():
            look = plot.METHODS[method]
            rows = [(size, estimate) for size, estimate in bits if estimate is not None]
            if rows:
                means = np.array([e.mean for _, e in rows])
                spread = np.abs(np.array([[e.low, e.high] for _, e in rows]).T - means)
                axes.errorbar(
                    [size for size, _ in rows], means, spread, fmt=look.marker, color=look.colour, capsize=2.5,
                    label=look.label,
                )  # fmt: skip
                for size, e in rows:
                    axes.plot([size] * len(e.values), e.values, ".", color=look.colour, ms=4, alpha=0.5)
        axes.set_xscale("log")
        axes.set_xlabel("bits, with basis and seed" if everything else "bits of the trained numbers")
        base_line(axes, rl.BASE, store)
    percent(panels[0], score_label(store))
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return drawn


def _bits(store: Store, everything: bool) -> dict[str, list[tuple[int, Estimate | None]]]:
    """Bits and accuracy of each point, by the method of its look."""
    seed = SEED_BITS if everything else 0
    found = {"tinylora": [(own_bits(p) + seed, p.estimate(store)) for p in rl.RANDOM]}
    calibrated = (*CALIBRATED, *rl.CALIBRATED[:-1])
    found["calibrated"] = [(own_bits(p) + (basis_bits(p) if everything else 0), p.estimate(store)) for p in calibrated]
    for method, points in (("lora_xs", rl.LORA_XS), ("lora", (rl.LADDER[-2],)), ("full", (rl.FULL,))):
        run = [p for p in points if p.records(store)]
        found[method] = [(BITS * int(p.records(store)[0]["parameters"]), p.estimate(store)) for p in run]
    return found


def judge(store: Store) -> Verdict:
    """Calibrated directions against the random ones, the best of eight draws, and LoRA-XS at as few numbers."""
    points = {p.label: p.estimate(store) for p in (rl.THIRTEEN, *CALIBRATED, *FEWER, rl.LORA_XS[0])}
    best = seeds.best_of(seeds.POINTS[13], store, seeds.DRAWS)
    ours = f"13 numbers on the best of {seeds.DRAWS} draws of P ({log2(seeds.DRAWS):.0f} more bits): {best:.0%}; "
    ours += "; ".join(f"{label} {estimate.as_percent()}" for label, estimate in points.items() if estimate is not None)
    narrow = ", ".join(f"{own_bits(p) + basis_bits(p):,} at r = {p.trial.rank}" for p in CALIBRATED)
    shares = {
        (SIZES | FAMILIES)[base]: share_of_gain(point, *ends(LADDERS[base]), store) for base, point in ELSEWHERE.items()
    }
    there = ", ".join(f"{name} {share.as_percent()}" for name, share in shares.items())
    ours += f". All bits of 13 calibrated numbers: {narrow}. At r = 1 they recover on other bases: {there} of the gain."
    return Verdict(ours, "not in the paper")


CLAIM = Claim(
    name="aim",
    order=13,
    title="Are 13 numbers worth more on directions that are calibrated on the task?",
    paper="Takes random directions; 26 bytes count the numbers and neither P's seed nor the base.",
    where="section 4; an idea of this book",
    points=(
        rl.BASE,
        rl.FULL,
        *rl.RANDOM,
        *rl.CALIBRATED,
        *rl.LORA_XS,
        rl.LADDER[-2],
        *NARROW,
        *FEWER,
        *ELSEWHERE.values(),
        *(LADDERS[base][name] for base in ELSEWHERE for name in BESIDE),
        *seeds.POINTS[13],
    ),
    draw=draw,
    judge=judge,
)
