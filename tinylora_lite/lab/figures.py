"""The figures that several claims share, drawn from records in the style of the book."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tinylora_lite.lab.claim import Point
from tinylora_lite.lab.estimate import Estimate
from tinylora_lite.lab.shapes import RUNGS, Ladder, ends
from tinylora_lite.lab.statistics import share_of_gain
from tinylora_lite.lab.store import Store
from tinylora_lite.view import plot

RUNG_METHODS = {"random": "tinylora", "LoRA-XS": "lora_xs", "LoRA": "lora"}
METHODS: dict[str, str] = {**RUNG_METHODS, "calibrated": "calibrated", "all weights": "full"}
"""The key of ``plot.METHODS`` for what trains; the first of these are the rungs of a ladder."""
LOOKS = (("o-", "auto"), ("s--", "none"), ("D:", "auto"), ("^-.", "none"))
"""How the bases of a figure are told apart, whose methods have the same colours: marker and line, and the face."""


class Series(NamedTuple):
    """Points of a line, from few numbers to many, with a label and a key of ``plot.METHODS`` that are not their own."""

    points: Sequence[Point]
    label: str | None = None
    method: str | None = None

    @property
    def look(self) -> plot.Method:
        """What the line looks like."""
        return plot.METHODS[self.method or METHODS[self.points[0].trial.numbers]]


def marks(axes: plot.Axes, rows: Sequence[tuple[float, Estimate]], colour: str, fmt: str, **how: Any) -> None:
    """Every seed a dot, the mean with its interval a marker, at each place on the horizontal axis.

    ``fmt`` is the marker, and the line between means; ``how`` goes to ``Axes.errorbar``.
    """
    for x, estimate in rows:
        axes.plot([x] * len(estimate.values), estimate.values, ".", color=colour, ms=4, alpha=0.5)
    if rows:
        means, lows, highs = zip(*((e.mean, e.mean - e.low, e.high - e.mean) for _, e in rows), strict=True)
        axes.errorbar([x for x, _ in rows], means, [lows, highs], fmt=fmt, color=colour, capsize=2.5, **how)


def counted(points: Sequence[Point], store: Store) -> list[tuple[float, Estimate]]:
    """How many numbers each point trains, and its estimate; points that have not run yet are left out."""
    found = [(point, point.estimate(store)) for point in points]
    return [(point.parameters(store), estimate) for point, estimate in found if estimate is not None]


@plot.style()
def against_numbers(series: Sequence[Series], store: Store, base: Point) -> plot.Figure:
    """Accuracy against how many numbers were trained: every seed a dot, the mean with its interval, a line a method.

    Points that have not run yet are left out.
    """
    drawn, axes = plot.figure(3.9)
    largest = 1.0
    for line in series:
        look, rows = line.look, counted(line.points, store)
        largest = max([largest, *(count for count, _ in rows)])
        marks(axes, rows, look.colour, look.marker + look.line, elinewidth=1.2, label=line.label or look.label)
    plot.count_axis(axes, 1, largest)
    base_line(axes, base, store)
    percent(axes, score_label(store))
    axes.set_xlabel("numbers trained")
    named = axes.get_legend_handles_labels()[0]
    # Below the panel: inside, lines would run through it.
    drawn.legend(handles=named, loc="outside lower center", ncols=2 if len(named) == 4 else 3, fontsize=8)
    return drawn


@plot.style()
def side_by_side(points: Sequence[Point], store: Store, base: Point, full: Point | None = None) -> plot.Figure:
    """Accuracy of named settings, one below the other: every seed a dot, the mean with its interval.

    ``base`` is a dashed line across, ``full`` a dotted one.
    """
    drawn, axes = plot.figure(0.9 + 0.3 * len(points))
    draw_rows(axes, points, store, base, full)
    axes.set_xlabel(score_label(store))
    return drawn


def draw_rows(
    axes: plot.Axes, points: Sequence[Point], store: Store, base: Point, full: Point | None, method: str = "tinylora"
) -> None:
    """The rows of :func:`side_by_side` and its lines across, into axes that are there."""
    look = plot.METHODS[method]
    for place, point in enumerate(points):
        values, estimate = point.accuracies(store), point.estimate(store)
        axes.plot(values, [place] * len(values), ".", color=look.colour, ms=4, alpha=0.5 if estimate else 1)
        if estimate is not None:
            axes.errorbar(
                [estimate.mean], [place], xerr=[[estimate.mean - estimate.low], [estimate.high - estimate.mean]],
                fmt=look.marker, color=look.colour, elinewidth=1.4, capsize=3,
            )  # fmt: skip
    axes.set_yticks(range(len(points)), [point.label for point in points])
    axes.set_ylim(len(points) - 0.4, -0.6)
    for line, style, name in ((base, "--", "untrained base"), (full, ":", "all weights")):
        values = [] if line is None else line.accuracies(store)
        if values:
            mean = sum(values) / len(values)
            axes.axvline(mean, ls=style, lw=1.2, color=plot.INK)
            axes.annotate(name, (mean, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
                          textcoords="offset points", ha="center", va="bottom", fontsize=8)  # fmt: skip
    axes.xaxis.set_major_formatter(in_percent)
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")


@plot.style()
def share_against_numbers(ladders: Mapping[str, Ladder], store: Store, shares: Sequence[float]) -> plot.Figure:
    """The share of all weights' gain against how many numbers were trained, a marker and a line for each base.

    ``ladders`` are of the bases by their labels; a base that lacks runs of its ends is left out. Each of ``shares``
    gets a line across.
    """
    drawn, axes = plot.figure(3.8)
    for place, ((label, ladder), look) in enumerate(zip(ladders.items(), LOOKS, strict=False)):
        # Intervals at one count are drawn beside each other.
        _draw_ladder(axes, ladder, store, look, label, shift=1.09 ** (place - (len(ladders) - 1) / 2))
    _share_axes(axes, shares)
    axes.set_xlabel("numbers trained")
    axes.set_ylabel(f"share of full gain, {store.score} answers")
    drawn.legend(handles=_names(axes), loc="outside lower center", ncols=3, fontsize=8)
    return drawn


@plot.style()
def share_beside(
    reference: tuple[str, Ladder], ladders: Mapping[str, Ladder], store: Store, shares: Sequence[float]
) -> plot.Figure:
    """As :func:`share_against_numbers`, a panel with its label for each base, beside a reference with its own."""
    rows = -(-len(ladders) // 2)
    drawn, grid = plot.panels(rows, 2, 0.6 + 2.1 * rows, sharex=True, sharey=True)
    for axes, (label, ladder) in zip(grid, ladders.items(), strict=False):
        _draw_ladder(axes, reference[1], store, LOOKS[1], reference[0], shift=1 / 1.12)
        _draw_ladder(axes, ladder, store, LOOKS[0], "what the panel says", shift=1.12)
        _share_axes(axes, shares)
        axes.set_title(label, fontsize=9)
        axes.tick_params(labelbottom=True)
    for axes in grid[len(ladders) :]:
        axes.set_axis_off()
    drawn.supxlabel("numbers trained", fontsize=10)
    drawn.supylabel(f"share of full gain, {store.score} answers", fontsize=10)
    drawn.legend(handles=_names(grid[0]), loc="outside upper center", ncols=3, fontsize=8)
    return drawn


def _draw_ladder(
    axes: plot.Axes, ladder: Ladder, store: Store, look: tuple[str, str], label: str, shift: float
) -> None:
    """Shares of a base's rungs, a line through those of a kind."""
    ceiling, floor = ends(ladder)
    if floor.estimate(store) is None or ceiling.estimate(store) is None:
        return
    fmt, face = look
    for kind, method in RUNG_METHODS.items():
        run = [p for p in map(ladder.__getitem__, RUNGS) if p.trial.numbers == kind and p.estimate(store) is not None]
        rows = [(shift * p.parameters(store), share_of_gain(p, ceiling, floor, store)) for p in run]
        marks(axes, rows, plot.METHODS[method].colour, fmt, elinewidth=1.2, mfc=face)
    axes.plot([], [], fmt, color=plot.INK, label=label, mfc=face)


def _names(axes: plot.Axes) -> list[Any]:
    """What a legend shows: bases by their lines, and what the colours mean."""
    from matplotlib.lines import Line2D

    looks = [plot.METHODS[method] for method in RUNG_METHODS.values()]
    kinds = [Line2D([], [], lw=4, color=look.colour, label=look.label) for look in looks]
    return [*axes.get_legend_handles_labels()[0], *kinds]


def _share_axes(axes: plot.Axes, shares: Sequence[float]) -> None:
    for share in shares:
        axes.axhline(share, ls=":", lw=1.0, color=plot.INK)
    plot.count_axis(axes, 1, 40_000)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -0.3), min(high, 1.3))
    axes.yaxis.set_major_formatter(in_percent)


def base_line(axes: plot.Axes, base: Point, store: Store) -> None:
    """The untouched base, a dashed line across, where it was run."""
    estimate = base.estimate(store)
    if estimate is not None:
        axes.axhline(estimate.mean, ls="--", lw=1.2, color=plot.INK)
        axes.annotate(plot.METHODS["base"].label, (0.01, estimate.mean), xytext=(0, -4), textcoords="offset points",
                      xycoords=("axes fraction", "data"), ha="left", va="top", fontsize=8)  # fmt: skip


def score_label(store: Store) -> str:
    """What the accuracies of a store's figures are of, for an axis."""
    leniently = ", read leniently" if store.reading == "lenient" else ""
    return f"accuracy of {store.score} answers{leniently}, test set"


def percent(axes: plot.Axes, label: str) -> None:
    """Shares on the vertical axis, as percents."""
    axes.yaxis.set_major_formatter(in_percent)
    axes.set_ylabel(label)


def in_percent(value: float, _: object = None) -> str:
    """A tick of an axis of shares."""
    return f"{value:.0%}"
