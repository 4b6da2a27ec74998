"""Landscapes drawn: along a line for one number, as contours for two, with the paths of training on them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke

from tinylora_lite.lab.figures import PERCENT
from tinylora_lite.lab.landscape import WRITERS, Found
from tinylora_lite.view import plot


class Look(NamedTuple):
    """How a way to train, or a writer to imitate, looks: as the method of the book that it borrows colour from."""

    label: str
    method: str


WALKERS = {
    "grpo": Look("GRPO", "tinylora"),
    "es": Look("evolution strategy", "calibrated"),
    "sft": Look("SFT, unseen writer", "lora"),
}
LOSSES = {"careful": Look("the careful writer's answers", "lora_xs"), "stranger": Look("an unseen writer's", "lora")}
LEVELS = 12
"""Bands of a contour plot."""


@plot.style()
def contours(found: Found, writer: str = "stranger") -> Figure:
    """The mean reward beside the loss of imitation over two numbers, with every path of training on both.

    Dark is where reinforcement, or imitation, wants to be; a path starts at v = 0 and ends at its marker.

    Args:
        found: a landscape of two numbers, complete; :func:`~tinylora_lite.load` reads one.
        writer: whose worked answers the loss is taken on, ``"careful"`` or ``"stranger"``.

    Raises:
        ValueError: the landscape has another count of numbers, is not complete, or knows no such writer.
    """
    x, y = _axes_of(found, 2)
    if writer not in WRITERS:
        raise ValueError(f"writer must be one of {', '.join(WRITERS)}, not {writer!r}")
    drawn = Figure(figsize=(plot.WIDTH, 3.9))
    panels = drawn.subplots(1, 2, sharex=True, sharey=True)
    for axes, key, title in zip(panels, ("reward", writer), ("mean reward", "loss, nats a token"), strict=True):
        heights = np.reshape(found[key], (len(x), len(y))).T
        bands = axes.contourf(x, y, heights, LEVELS, cmap="Greys" if key == "reward" else "Greys_r")
        bar = drawn.colorbar(bands, ax=axes, orientation="horizontal", pad=0.02, ticks=bands.levels[:: LEVELS // 3])
        if key == "reward":
            bar.ax.xaxis.set_major_formatter(PERCENT)
        axes.set(title=title, xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), aspect="equal", xlabel="first number")
        axes.grid(False)
        for name, look in WALKERS.items():
            _walks(axes, found, name, look)
    panels[0].set_ylabel("second number")
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(WALKERS), fontsize=8)
    return drawn


@plot.style()
def along(found: Found) -> Figure:
    """One number: the mean reward with its interval, and below it how much each imitation's loss differs from v = 0.

    A marker on the reward is where a run of training ended, on the losses where each is least.

    Args:
        found: a landscape of one number, complete.

    Raises:
        ValueError: the landscape has another count of numbers, or is not complete.
    """
    (x,) = _axes_of(found, 1)
    drawn = Figure(figsize=(plot.WIDTH, 4.6))
    above, below = drawn.subplots(2, 1, sharex=True)
    above.fill_between(x, found["low"], found["high"], color=plot.INK, alpha=0.12, lw=0)
    above.plot(x, found["reward"], color=plot.INK, lw=1.6)
    above.yaxis.set_major_formatter(PERCENT)
    above.set(ylabel="mean reward", xlim=(x[0], x[-1]))
    for name, look in WALKERS.items():
        ends = [walk[-1][0] for walk in found["paths"].get(name, {}).get("v", [])]
        shape = plot.METHODS[look.method]
        above.plot(ends, np.interp(ends, x, found["reward"]), shape.marker, color=shape.colour, label=look.label)
    for writer, look in LOSSES.items():
        shape, change = plot.METHODS[look.method], np.array(found[writer]) - np.interp(0.0, x, found[writer])
        below.plot(x, change, shape.line, color=shape.colour, label=look.label)
        below.plot(x[change.argmin()], change.min(), shape.marker, color=shape.colour)
    below.set(ylabel="loss, less that at v = 0,\nnats a token", xlabel="the number")
    for axes in (above, below):
        axes.axvline(0.0, ls=":", lw=1.0, color=plot.INK)
        axes.legend(fontsize=8)
    return drawn


def _axes_of(found: Found, numbers: int) -> list[np.ndarray]:
    """The values of each number, ``[points]`` float64."""
    axes = [np.array(axis) for axis in found["settings"]["axes"]]
    if len(axes) != numbers:
        raise ValueError(f"the landscape has {len(axes)} numbers, and this draws {numbers}; take the other function")
    if len(found["stranger"]) < np.prod([len(axis) for axis in axes]):
        raise ValueError("the landscape is not complete; python -m tinylora_lite.lab.landscape computes the rest")
    return axes


def _walks(axes: Axes, found: Found, name: str, look: Look) -> None:
    """Every seed of a way to train, with a white outline that is seen on any background."""
    shape, casing = plot.METHODS[look.method], [Stroke(linewidth=3.0, foreground="white"), Normal()]
    for place, walk in enumerate(found["paths"].get(name, {}).get("v", [])):
        v = np.array(walk)
        axes.plot(v[:, 0], v[:, 1], color=shape.colour, lw=1.4, path_effects=casing)
        axes.plot(
            v[-1:, 0], v[-1:, 1], shape.marker, color=shape.colour, mec="white", label=None if place else look.label
        )
