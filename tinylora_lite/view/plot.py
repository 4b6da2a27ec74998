"""The book's figures: one style, and one colour for each method.

Figures are drawn with matplotlib and shown as SVG in the page's own text colour and font, so that the same figure works
on a white page, on a dark one and on paper. The colours are Okabe and Ito's. Their contrast is at least 3 on both
pages, and each method also has its own marker and line style.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.sax.saxutils import quoteattr

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes  # for whoever draws with this module
    from matplotlib.figure import Figure as Figure

    from tinylora_lite.utils.record import Run

STYLE = Path(__file__).with_name("book.mplstyle")
"""A style sheet of matplotlib."""

INK = "#24292f"
"""Of text, axes and everything that is not a method; :func:`show` turns it into the colour of the page's text."""

BLACK = "#010101"
"""For text on a coloured background, which must not follow the page; :func:`show` turns #000000 into ink, too."""

WIDTH = 5.4
"""Inches; shown a fifth larger on a wide page and a quarter smaller on a phone."""


class Method(NamedTuple):
    """How a method is drawn in every figure of the book."""

    label: str
    colour: str
    marker: str
    line: str


METHODS = {
    "tinylora": Method("TinyLoRA", "#D55E00", "o", "-"),
    "calibrated": Method("TinyLoRA, calibrated", "#009E73", "D", "-"),
    "lora": Method("LoRA", "#0072B2", "s", "-."),
    "lora_xs": Method("LoRA-XS", "#CC79A7", "^", ":"),
    "full": Method("all weights", "#808080", "X", "-"),
    "base": Method("untrained base", INK, "", "--"),
}


@contextmanager
def style(options: Mapping[str, Any] | None = None) -> Iterator[None]:
    """The style, with further options, for a while; ``matplotlib.style.use(plot.STYLE)`` sets it for good."""
    try:
        from matplotlib import style  # here, so that what only names a figure starts without it
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('figures need matplotlib; pip install "tinylora_lite[lab]" brings it') from error
    with style.context([STYLE, dict(options or {})]):
        yield


def figure(height: float = 3.0, width: float = WIDTH) -> tuple[Figure, Axes]:
    """An empty figure, its size in inches; it is not registered with pyplot, so nothing has to close it."""
    drawn, (axes,) = panels(1, 1, height, width)
    return drawn, axes


@style()
def panels(rows: int, columns: int, height: float, width: float = WIDTH, **options: Any) -> tuple[Figure, list[Axes]]:
    """As :func:`figure`, with several axes, row by row; ``options`` are those of ``Figure.subplots``."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height))
    return drawn, list(drawn.subplots(rows, columns, squeeze=False, **options).flat)


class Drawing(NamedTuple):
    """A figure as a notebook shows it, with its alternative text."""

    svg: str
    alt: str

    def _repr_html_(self) -> str:
        return self.svg

    def __repr__(self) -> str:
        return f"[Figure: {self.alt}]"


def show(drawn: Figure, alt: str) -> Drawing:
    """A figure as the value of a notebook cell.

    Args:
        drawn: any matplotlib figure, preferably in the :func:`style` of this module.
        alt: one sentence about what the figure shows and what follows from it.

    Raises:
        ValueError: ``alt`` is empty.
    """
    if not alt.strip():
        raise ValueError("a figure needs an alternative text that says what it shows")
    text = io.StringIO()
    # The salt makes identifiers unique on the page and equal in every build.
    with style({"svg.hashsalt": alt}):
        drawn.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue().partition("<svg")[2]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(f"{INK}|#000000", "currentColor", svg)
    svg = re.sub(r"'DejaVu Sans'(, ?'[^']*')*(, ?sans-serif)?", "var(--pst-font-family-base, sans-serif)", svg)
    measure = 39 * drawn.get_figwidth() / WIDTH
    look = f"display:block;height:auto;max-width:{measure:.3g}rem;overflow:visible;stroke-linejoin:round;width:100%"
    return Drawing(f'<svg role="img" aria-label={quoteattr(alt)} fill="currentColor" style="{look}"{svg}', alt)


def human(number: float) -> str:
    """A count in short form.

    >>> [human(n) for n in (1, 13, 784, 1000, 2_523_136, 7_615_616_512)]
    ['1', '13', '784', '1 k', '2.5 M', '7.6 G']
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number / size >= 100 else f"{number / size:.2g} {unit}"
    return f"{number:g}"


def count_axis(axes: Axes, smallest: float, largest: float) -> None:
    """Makes x a logarithmic axis of parameter counts with the labels 1, 13, 1 k, 1 M and so on."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log")
    axes.set_xlim(smallest / 1.6, largest * 1.6)
    near = [1, 13, 100, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10]
    ticks = near if largest / smallest < 1e5 else [1, 13, 1e3, 1e6, 1e9]
    axes.xaxis.set_major_locator(FixedLocator([t for t in ticks if smallest <= t <= largest]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: human(value))


class Curves(NamedTuple):
    """Runs that differ only in their seed: a key of ``METHODS``, the runs, and a label in place of the method's."""

    method: str
    runs: Sequence[Run]
    label: str | None = None


@style()
def learning_curves(curves: Sequence[Curves], base: float | None = None) -> Figure:
    """Rewards against steps: a thin line for each seed, a thick one for their mean, its label at the right.

    Args:
        curves: the runs; the mean ends where the shortest run ends.
        base: the mean reward of the untrained model, drawn as a dashed line.
    """
    ends, last = [], 0.0
    drawn, axes = figure()
    for method, runs, label in curves:
        look, length = METHODS[method], min(len(run.steps) for run in runs)
        for run in runs:
            axes.plot(run.curve("step"), run.curve(), color=look.colour, lw=0.8, alpha=0.45)
        steps, mean = runs[0].curve("step")[:length], np.mean([run.curve()[:length] for run in runs], axis=0)
        axes.plot(steps, mean, look.line, color=look.colour, lw=2.4)
        ends.append((float(mean[-1]), label or look.label, look.colour))
        last = max(last, steps[-1])
    if base is not None:
        axes.axhline(base, ls="--", lw=1.2, color=INK)
        ends.append((base, METHODS["base"].label, INK))
    axes.set(xlabel="step", ylabel="mean reward")
    axes.set_xlim(right=last)
    label_at_the_right(axes, ends)
    return drawn


def label_at_the_right(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Labels each end, given as (y, label, colour), at its height; labels that would overlap are pushed apart."""
    low, high = axes.get_ylim()
    ends = sorted(ends)
    heights = [(y - low) / (high - low) for y, _, _ in ends]
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + 0.09)
    too_high = max(0.0, heights[-1] - 1.0)
    for height, (_, label, colour) in zip(heights, ends, strict=True):
        for text, place, shade in (("━", 4, colour), (label, 17, INK)):
            axes.annotate(text, (1, height - too_high), xytext=(place, 0), color=shade, va="center",
                          xycoords="axes fraction", textcoords="offset points")  # fmt: skip


@style()
def accuracy_against_numbers(rows: Iterable[Mapping[str, Any]], ylabel: str) -> Figure:
    """Accuracy with its interval against the number of trained parameters, one line for each method.

    A row has ``method`` (a key of ``METHODS``), ``parameters``, and ``accuracy``, ``low`` and ``high`` from 0 to 1. One
    of ``"base"`` becomes a dashed line with a band.
    """
    rows = sorted(rows, key=lambda row: row["parameters"])
    trained = [row for row in rows if row["method"] != "base"]
    drawn, axes = figure(3.4)
    count_axis(axes, min(1, trained[0]["parameters"]), trained[-1]["parameters"])
    for row in rows:
        if row["method"] == "base":
            axes.axhline(row["accuracy"], ls="--", lw=1.2, color=INK)
            axes.axhspan(row["low"], row["high"], color=INK, alpha=0.08, lw=0)
            axes.annotate(METHODS["base"].label, (0.99, row["high"]), xytext=(0, 4), textcoords="offset points",
                          xycoords=("axes fraction", "data"), ha="right", va="bottom")  # fmt: skip
    for name in dict.fromkeys(row["method"] for row in trained):
        look = METHODS[name]
        own = [row for row in trained if row["method"] == name]
        x, y = [row["parameters"] for row in own], np.array([row["accuracy"] for row in own])
        spread = np.abs(np.array([[row["low"], row["high"]] for row in own]).T - y)
        axes.errorbar(x, y, spread, fmt=look.marker + look.line, color=look.colour, elinewidth=1.2, capsize=2.5)
        inside = x[-1] < 0.1 * trained[-1]["parameters"]
        beside = inside and len(own) > 1
        axes.annotate(look.label, (x[-1], y[-1]), xytext=(9, 0) if beside else (0, 10), textcoords="offset points",
                      ha="left" if beside else "center" if inside else "right",
                      va="center" if beside else "bottom")  # fmt: skip
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set(xlabel="numbers trained", ylabel=ylabel)
    return drawn


@style()
def counts(rows: Sequence[tuple[str, str, int]]) -> Figure:
    """A ladder of parameter counts on a logarithmic axis: ``(method, label, count)`` from top to bottom."""
    drawn, axes = figure(0.9 + 0.27 * len(rows))
    count_axis(axes, 1, max(count for _, _, count in rows))
    for place, (method, _, count) in enumerate(rows):
        look = METHODS[method]
        axes.plot([axes.get_xlim()[0], count], [place, place], color=look.colour, lw=1.6)
        axes.plot([count], [place], look.marker, color=look.colour, ms=7)
        axes.annotate(f"{count:,}", (count, place), xytext=(8, 0), textcoords="offset points", va="center")
    axes.set_xlim(right=axes.get_xlim()[1] * 12)
    axes.set_yticks(range(len(rows)), [label for _, label, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(False)
    axes.set_xlabel("numbers that train")
    return drawn


def bars(axes: Axes, values: Sequence[float], colour: str, most: int = 200) -> None:
    """Draws a bar for each value; of more than ``most``, neighbours share a bar from their minimum to their maximum."""
    finite = np.nan_to_num(np.asarray(values, dtype=float), nan=0, posinf=0, neginf=0)
    parts = np.array_split(finite, max(1, min(len(values), most)))
    low = np.array([part.min(initial=0.0) for part in parts])
    high = np.array([part.max(initial=0.0) for part in parts])
    axes.bar(range(len(parts)), high - low, bottom=low, color=colour)
    axes.axhline(0, lw=1, color=INK)
    axes.set_xticks([])
