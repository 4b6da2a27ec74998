"""The figures of *Reading the paper closely*: the paper's own points, and what stands beside them.

Intervals are drawn where the number of problems is known, and are then Wilson's for one answer to each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

import numpy as np
from matplotlib.figure import Figure

from tinylora_lite.book.published import Published
from tinylora_lite.evaluation.score import interval
from tinylora_lite.lab.figures import in_percent, percent
from tinylora_lite.view.plot import INK, METHODS, count_axis, figure, panels, style

TINYLORA = METHODS["tinylora"]
LABELS = {
    "TinyLoRA": ("tinylora", 1, (10, -4)),
    "LoRA-XS": ("lora_xs", 102_400, (-20, 9)),
    "LoRA": ("lora", 161_480_704, (-8, 10)),
    "all weights": ("full", 7_615_487_488, (0, 9)),
}
"""Of the paper's methods: the key in ``METHODS``, and at which count the label is, with its offset."""


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of ``n`` problems, each answered once.

    >>> "{:.3f} {:.3f}".format(*wilson(0.75, 4))
    '0.301 0.954'
    """
    return interval(np.full((n, 1), share))


@style()
def accuracy_against_numbers(
    paper: Sequence[Published], repeated: Sequence[Published], levels: Mapping[str, float]
) -> Figure:
    """The paper's accuracies against how many numbers trained, a replication, and untrained models as lines.

    Args:
        paper: rows of one model and task, drawn by method.
        repeated: rows of TinyLoRA by others that know their number of problems, with their intervals.
        levels: what each dashed line is, and at which accuracy.
    """
    drawn, axes = figure(3.9)
    count_axis(axes, 1, _points(paper)[0].max())
    for label, height in levels.items():
        axes.axhline(height, ls="--", lw=1.1, color=INK)
        axes.annotate(label, (0.995, height), xytext=(0, -3), textcoords="offset points", ha="right", va="top",
                      xycoords=("axes fraction", "data"), size=9)  # fmt: skip
    for name in dict.fromkeys(row.method for row in paper):
        key, place, offset = LABELS[name]
        look, (x, y) = METHODS[key], _points(row for row in paper if row.method == name)
        order, near = x.argsort(), np.abs(x - place).argmin()
        axes.plot(x[order], y[order], look.marker + look.line, color=look.colour, lw=1.4, ms=5)
        axes.annotate("TinyLoRA, paper" if name == "TinyLoRA" else look.label, (x[near], y[near]), xytext=offset,
                      textcoords="offset points", ha="left" if name == "TinyLoRA" else "right")  # fmt: skip
    for count, share, row in zip(*_points(repeated), repeated, strict=True):
        assert row.n is not None
        axes.plot([count] * 2, wilson(share, row.n), color=INK, lw=1.3)
        axes.plot([count], [share], "o", color=TINYLORA.colour, mfc="none", mew=1.6, ms=7)
    axes.annotate("TinyLoRA, repeated by others", max(zip(*_points(repeated), strict=True)), xytext=(9, 0),
                  textcoords="offset points", va="center")  # fmt: skip
    percent(axes, "right on GSM8K")
    axes.set(xlabel="numbers trained", ylim=(0.55, 1.0))
    return drawn


@style()
def untrained(rows: Sequence[tuple[str, float, int | None]]) -> Figure:
    """What sources give for one untrained model: who and how, the accuracy, and the problems where they are known."""
    drawn, axes = figure(0.8 + 0.34 * len(rows))
    for place, (_, value, n) in enumerate(rows):
        if n is not None:
            axes.plot(wilson(value, n), [place, place], color=INK, lw=1.6, alpha=0.6)
        axes.plot([value], [place], "o", color=INK, mfc=INK if n else "none")
        axes.annotate(f"{value:.1%}", (value, place), xytext=(0, 7), textcoords="offset points", ha="center", size=9)
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axes.set(ylim=(len(rows) - 0.5, -0.7), xlim=(min(0.55, *(value - 0.04 for _, value, _ in rows)), 0.97))
    axes.xaxis.set_major_formatter(in_percent)
    axes.grid(False)
    axes.set_xlabel("right on GSM8K, nothing trained")
    return drawn


PRECISIONS = {"fp32": ("o", "-", 4), "bf16": ("D", ":", 2)}
"""Marker, line and bytes of a number, of the precisions that figure 4 draws in full."""


@style()
def bytes_of_numbers(rows: Sequence[Published]) -> Figure:
    """Figure 4 as printed and on the axis that it names: one row of panels for each tying, one column for each axis."""
    drawn, grid = panels(2, 2, 4.9, sharey=True, sharex=True)
    for axes, (tying, true) in zip(grid, product(("tiled", "structured"), (False, True)), strict=True):
        for precision, (marker, dash, size) in PRECISIONS.items():
            x, y = _points(row for row in rows if (row.tying, row.precision) == (tying, precision))
            x *= size if true else 1
            axes.plot(x, y, marker + dash, ms=4.5, lw=1.6, color=TINYLORA.colour,
                      mfc="none" if precision == "bf16" else None)  # fmt: skip
            outer = (precision == "bf16") == true  # of the two curves this one starts further left or higher
            axes.annotate(precision, (x[0], y[0]), xytext=(-6, 3) if outer else (7, -4), size=9,
                          textcoords="offset points", ha="right" if outer else "left")  # fmt: skip
        axes.set(xscale="log", xlim=(2.5, 1600))
        axes.set_title(f"{tying}, {'in bytes' if true else 'as printed'}", size=9.5)
        axes.set_xticks([8, 32, 128, 512], ["8", "32", "128", "512"])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(in_percent)
    grid[2].set_xlabel("position on the axis")
    grid[3].set_xlabel("bytes of v")
    drawn.supylabel("right on GSM8K", size=10)
    return drawn


@style()
def strict_and_lenient(paper: Sequence[Published], repeated: Sequence[Published]) -> Figure:
    """One grid of settings, as the paper drew it and as others scored it twice, with what each gives untrained."""
    drawn, axes = figure(3.5)
    count_axis(axes, 1, _points([*paper, *repeated])[0].max())
    for scoring, marker in ((None, "o"), ("strict", "v"), ("lenient", "s")):
        own = [row for row in (repeated if scoring else paper) if row.scoring == scoring]
        look = {"color": INK, "alpha": 0.6} if scoring else {"color": TINYLORA.colour}
        axes.plot(*_points(own), marker, ms=5, mfc="none" if scoring == "strict" else None, **look)
        if own[0].untrained is not None:
            axes.axhline(own[0].untrained, ls="--", lw=1.0, color=INK)
    for text, x, y in (("repeated, lenient", 1, 0.9), ("repeated, strict", 1, 0.735), ("paper", 1.6, 0.55)):
        axes.annotate(text, (x, y), ha="left", va="center")
    percent(axes, "right on GSM8K")
    axes.set(xlabel="numbers trained", ylim=(0.18, 0.95))
    return drawn


def _points(rows: Iterable[Published]) -> np.ndarray:
    """How many numbers trained and what came of it, ``[2, rows]`` float64."""
    return np.array([(row.parameters, row.value) for row in rows], dtype=float).T
