"""Diagrams that count: what trains inside one matrix, and which number drives which module.

One language for both: grey is frozen, a shaded grid is random and frozen, and whatever has a colour trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

from tinylora_lite.view.plot import BLACK, INK, METHODS, WIDTH, figure, style

OUT, IN, RANK = 1.7, 2.0, 0.62
"""Sides of the drawn matrices, in units of which the width of a figure holds ``UNITS``."""
UNITS = 13.4


class Box(NamedTuple):
    """A matrix: its letter, ``rows`` by ``columns`` as words on its edges, and the method whose colour it has.

    ``method=None`` is frozen, ``"random"`` random and frozen. Sizes follow the words: ``out``, ``in``, else small.
    """

    letter: str
    rows: str
    columns: str
    method: str | None = None

    def draw(self, axes: Axes, left: float) -> float:
        """Draws the matrix with its left edge at ``left``, centred on 0. Returns its width."""
        width, height = (IN if self.columns == "in" else RANK), (OUT if self.rows == "out" else RANK)
        middle, bottom = left + width / 2, -height / 2
        fill = METHODS[self.method].colour if self.method in METHODS else (INK, 0.10)
        axes.add_patch(Rectangle((left, bottom), width, height, fc=fill, ec=(INK, 0.75), lw=0.9))
        if self.method == "random":
            shades = np.random.default_rng(ord(self.letter[-1])).uniform(0.05, 0.45, (2, 2))
            for (row, column), shade in np.ndenumerate(shades):
                corner = (left + column * width / 2, bottom + row * height / 2)
                axes.add_patch(Rectangle(corner, width / 2, height / 2, fc=(INK, shade), lw=0))
            axes.text(middle, bottom - 0.08, self.letter, ha="center", va="top")
        elif self.method is None:
            axes.text(middle, 0, self.letter, ha="center", va="center")
        else:
            on_colour = "#ffffff" if self.method == "lora" else BLACK
            axes.text(middle, 0, self.letter, ha="center", va="center", weight="bold", color=on_colour)
        axes.text(middle, height / 2 + 0.08, self.columns, ha="center", va="bottom", size=8)
        if self.columns == "in":
            axes.text(left - 0.07, 0, self.rows, ha="right", va="center", size=8)
        return width


U, S, VT = Box("U", "out", "r"), Box("Σ", "r", "r"), Box("Vᵀ", "r", "in")
P1, PU = Box("P₁", "r", "r", "random"), Box("Pᵤ", "r", "r", "random")
UPDATES: dict[str, list[Box | str]] = {
    "LoRA: r (in + out) numbers in every module": [Box("B", "out", "r", "lora"), Box("A", "r", "in", "lora")],
    "LoRA-XS: r² numbers in every module": [U, S, Box("R", "r", "r", "lora_xs"), VT],
    "TinyLoRA: u numbers for all modules of a group": [U, S, "(", "v₁", P1, "+ … +", "vᵤ", PU, ")", VT],
}
"""The factors of each method's update."""


@style()
def matrices() -> Figure:
    """The update of each method as a product of boxes, one method a row."""
    drawn = Figure(figsize=(WIDTH, WIDTH * 2.75 * len(UPDATES) / UNITS))
    for axes, (title, items) in zip(drawn.subplots(len(UPDATES)), UPDATES.items(), strict=True):
        axes.set(xlim=(0, UNITS), ylim=(-OUT / 2 - 0.1, OUT / 2 + 0.95), aspect="equal")
        axes.axis("off")
        axes.text(0, OUT / 2 + 0.92, title, weight="bold", va="top")
        _row(axes, ["W\u2032 =", Box("W", "out", "in"), "+", *items])
    return drawn


def _row(axes: Axes, items: Sequence[Box | str]) -> None:
    left = 0.0
    for item in items:
        if isinstance(item, Box):
            left += 0.5 if item.columns == "in" else 0.22
            left += item.draw(axes, left)
        elif item.startswith("v"):
            left += 0.3
            axes.add_patch(Circle((left, 0), 0.29, fc=METHODS["tinylora"].colour, ec=(INK, 0.75), lw=0.9))
            axes.text(left, 0, item, ha="center", va="center", color=BLACK, weight="bold", size=9)
            left += 0.12
        else:
            width = {"(": 0.28, ")": 0.2, "+": 0.4, "+ … +": 1.3, "W\u2032 =": 1.3}[item]
            middle = left + (width / 2 if left else 0.45)
            axes.text(middle, 0, item, ha="center", va="center", size=16 if item in "()" else 11)
            left += width


TONES = (METHODS["tinylora"].colour, "#E69F00")
"""Neighbouring groups take turns."""


@style()
def tying_map(groups: Sequence[int], types: Sequence[str]) -> Figure:
    """Every module as a square, every number above the modules that it drives.

    Args:
        groups: the group of each module in tying order, layer by layer (``adapter.groups``).
        types: the names of the modules of one layer, in the same order.
    """
    grid = np.array(groups).reshape(-1, len(types)).T
    layers, count = grid.shape[1], grid.max() + 1
    numbered = len(groups) <= 100
    top = -2.2 if numbered else -2.9
    width = WIDTH if layers > 12 else 0.7 * WIDTH
    drawn, axes = figure(0.35 + 0.86 * width / max(layers, 8) * (len(types) + 0.3 - top), width)
    axes.set(xlim=(-0.6, layers - 0.4), ylim=(len(types) - 0.4, top - 0.7), aspect="equal")
    for number in range(count):
        x, tone = (number + 0.5) * layers / count - 0.5, TONES[number % 2]
        for layer in np.unique(np.nonzero(grid == number)[1]):
            axes.plot([x, layer], [top, -0.5], color=tone, lw=1.0)
        axes.plot([x], [top], "o", color=tone, ms=11 if numbered else 9, mec=INK, mew=0.6)
        if numbered:
            axes.text(x, top, str(number + 1), ha="center", va="center", color=BLACK, size=7.5, weight="bold")
    for (row, layer), number in np.ndenumerate(grid):
        axes.add_patch(Rectangle((layer - 0.44, row - 0.44), 0.88, 0.88, fc=TONES[number % 2], lw=0))
        if numbered:
            axes.text(layer, row, str(number + 1), ha="center", va="center", color=BLACK, size=8)
    axes.set_yticks(range(len(types)), types, size=9)
    axes.set_xticks([0, layers - 1], ["layer 1", f"layer {layers}"])
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines["bottom"].set_visible(False)
    return drawn
