"""The precision of v: at equal counts, as the paper compares, and at equal bytes, as its axis says. Figure 4."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from tinylora_lite.lab.claim import Claim, Verdict
from tinylora_lite.lab.claims.rl_parameters import BASE, FULL, RANDOM
from tinylora_lite.lab.figures import base_line, legend, percent, score_label
from tinylora_lite.lab.statistics import difference, verdict_on_difference, verdict_over
from tinylora_lite.lab.store import Store
from tinylora_lite.view import plot

SEEDS = 3
"""The same for every precision: a seed moves P, and P moves the accuracy far more than a precision can."""
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
EQUAL_BYTES = ((13, 25), (25, 49), (49, 98))
"""Numbers of 32 bits, and as many bytes of numbers of 16, to within 4 %."""
COUNTS = {13: RANDOM[4], 25: RANDOM[5], 49: RANDOM[6], 98: RANDOM[7]}
POINTS = {
    precision: {
        count: replace(
            point, label=f"{point.label}, {precision}", trial=replace(point.trial, precision=precision), seeds=SEEDS
        )
        for count, point in COUNTS.items()
    }
    for precision in BYTES
}
DODGE = {"fp32": 0.96, "bf16": 1.0, "fp16": 1.04}
"""Marks beside each other that would lie on each other."""
LOOKS = {"fp32": "tinylora", "bf16": "lora", "fp16": "calibrated"}


@plot.style()
def draw(store: Store) -> Figure:
    """Accuracy against the count of numbers, and against their bytes; a seed is a dot, with the same P in all three."""
    drawn = Figure(figsize=(plot.WIDTH, 3.4))
    panels = drawn.subplots(1, 2, sharey=True)
    for axes, unit in zip(panels, ("numbers", "bytes"), strict=True):
        for precision, points in POINTS.items():
            look = plot.METHODS[LOOKS[precision]]
            rows = [(n, estimate) for n, point in points.items() if (estimate := point.estimate(store)) is not None]
            if not rows:
                continue
            size = DODGE[precision] * (BYTES[precision] if unit == "bytes" else 1)
            x = [n * size for n, _ in rows]
            means = np.array([e.mean for _, e in rows])
            spread = np.abs(np.array([[e.low, e.high] for _, e in rows]).T - means)
            for place, (_, e) in zip(x, rows, strict=True):
                axes.plot([place] * len(e.values), e.values, ".", color=look.colour, ms=4, alpha=0.5)
            line = look.marker + look.line
            axes.errorbar(x, means, spread, fmt=line, color=look.colour, capsize=2.5, label=precision)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel(unit)
        base_line(axes, BASE, store)
    percent(panels[0], score_label(store))
    legend(panels[0], "upper left")
    return drawn


def judge(store: Store) -> Verdict:
    """fp32 against the 16-bit formats where both have as many bytes; the claim needs every such pair."""
    by_count = {n: difference(POINTS["fp32"][n], POINTS["bf16"][n], store) for n in COUNTS}
    by_bytes = {
        (few, many, narrow): difference(POINTS["fp32"][few], POINTS[narrow][many], store)
        for narrow in ("bf16", "fp16")
        for few, many in EQUAL_BYTES
    }
    ours = "; ".join(f"fp32 over bf16 at {n} numbers by {gap.as_points()}" for n, gap in by_count.items())
    ours += ". At equal bytes: " + "; ".join(
        f"{few} in fp32 over {many} in {narrow} by {gap.as_points()}" for (few, many, narrow), gap in by_bytes.items()
    )
    return Verdict(f"{ours}.", verdict_over(map(verdict_on_difference, by_bytes.values())))


CLAIM = Claim(
    name="precision",
    order=8,
    title="Bit for bit, fp32 is the best way to store the numbers.",
    paper="83.0 against 80.7 % with 63 numbers; the axis says bytes, its positions are counts.",
    where="Figure 4 and section 6.5",
    points=(BASE, FULL, *(point for points in POINTS.values() for point in points.values())),
    draw=draw,
    judge=judge,
)
