"""The precision of v: at equal counts, as the paper compares, and at equal bytes, as its axis says. Figure 4."""

from __future__ import annotations

from tinylora_lite.lab.claim import Claim, Verdict, flat
from tinylora_lite.lab.claims.rl_parameters import BASE, FULL, RANDOM
from tinylora_lite.lab.figures import base_line, counted, marks, percent, score_label
from tinylora_lite.lab.statistics import difference, verdict_on, verdict_over
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
        count: point.varied(f"{point.label}, {precision}", precision=precision, seeds=SEEDS)
        for count, point in COUNTS.items()
    }
    for precision in BYTES
}
DODGE = {"fp32": 0.96, "bf16": 1.0, "fp16": 1.04}
"""Moves marks that would cover each other."""
LOOKS = {"fp32": "tinylora", "bf16": "lora", "fp16": "calibrated"}


@plot.style()
def draw(store: Store) -> plot.Figure:
    """Accuracy against the count of numbers, and against their bytes; a seed is a dot, with the same P in all three."""
    drawn, both = plot.panels(1, 2, 3.4, sharey=True)
    for axes, unit in zip(both, ("numbers", "bytes"), strict=True):
        for precision, points in POINTS.items():
            look = plot.METHODS[LOOKS[precision]]
            size = DODGE[precision] * (BYTES[precision] if unit == "bytes" else 1)
            rows = [(size * count, estimate) for count, estimate in counted(list(points.values()), store)]
            marks(axes, rows, look.colour, look.marker + look.line, label=precision)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel(unit)
        base_line(axes, BASE, store)
    percent(both[0], score_label(store))
    both[0].legend(*both[0].get_legend_handles_labels(), loc="upper left", fontsize=8)
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
    return Verdict(f"{ours}.", verdict_over(map(verdict_on, by_bytes.values())))


CLAIM = Claim(
    name="precision",
    order=8,
    title="Bit for bit, fp32 is the best way to store the numbers.",
    paper="83.0 against 80.7 % with 63 numbers; the axis says bytes, its positions are counts.",
    where="Figure 4 and section 6.5",
    points=flat(BASE, FULL, POINTS),
    draw=draw,
    judge=judge,
)
