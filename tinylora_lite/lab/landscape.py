"""The landscape: with one or two numbers, the reward can be drawn for every value they can take.

It is drawn along a line for one number and as contours for two, beside the loss of worked answers, which imitation
minimises, and with the paths of training on both. ``python -m benchmarks.landscape`` computed what is stored.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from tinylora_lite.lab.figures import in_percent
from tinylora_lite.lab.store import RESULTS
from tinylora_lite.view import plot

Found = dict[str, Any]
"""A landscape as it is stored.

``settings``, the axes among them; a list with an entry for each point, in the order of ``itertools.product``, of
``reward`` (the mean at temperature 1) with its 95 % interval ``low`` to ``high``, and of ``careful`` and ``stranger``
(nats for a token of that writer's answers); ``paths``: for each method its ``settings`` and ``v``,
``[seeds, steps + 1, numbers]``; ``seconds`` and ``environment``.
"""
NAMES = ("calibrated-2", "random-2", "calibrated-1", "random-1")
"""Of the stored landscapes: the directions, and how many numbers."""
WRITERS = ("careful", "stranger")
"""Whose worked answers the loss is taken on."""
WALKERS = {
    "grpo": ("GRPO", "tinylora"),
    "es": ("evolution strategy", "calibrated"),
    "sft": ("SFT, unseen writer", "lora"),
}
LOSSES = {"careful": ("the careful writer's answers", "lora_xs"), "stranger": ("an unseen writer's", "lora")}
"""The label of each way to train, and of each writer's loss, and the method of the book that it borrows colour from."""
LEVELS = 12
"""Bands of a contour plot."""
Place = tuple[float, float]
START: Place = (0.0, 0.0)
"""Where every path of two numbers starts: the untouched base."""


def load(name: str, folder: Path = RESULTS) -> Found:
    """A stored landscape. Raises ``FileNotFoundError`` where it was not computed."""
    found: Found = json.loads(path_of(name, folder).read_text(encoding="utf-8"))
    return found


def path_of(name: str, folder: Path = RESULTS) -> Path:
    """The file of a landscape."""
    return folder / f"landscape-{name}.json"


@plot.style()
def contours(found: Found, writer: str = "stranger") -> plot.Figure:
    """The mean reward beside the loss of imitation over two numbers, with every path of training on both.

    Dark is where reinforcement, or imitation, wants to be; a path starts at v = 0 and ends at its marker. ``writer`` is
    the one whose worked answers the loss is taken on. Raises ``ValueError`` where the landscape is not of two numbers.
    """
    x, y = map(np.array, found["settings"]["axes"])
    drawn, panels = plot.panels(1, 2, 3.9, sharex=True, sharey=True)
    for axes, key, title in zip(panels, ("reward", writer), ("mean reward", "loss, nats a token"), strict=True):
        heights = np.reshape(found[key], (len(x), len(y))).T
        bands = axes.contourf(x, y, heights, LEVELS, cmap="Greys" if key == "reward" else "Greys_r")
        ticks = list(bands.levels)[:: LEVELS // 3]
        bar = drawn.colorbar(bands, ax=axes, orientation="horizontal", pad=0.02, ticks=ticks)
        if key == "reward":
            bar.ax.xaxis.set_major_formatter(in_percent)
        axes.set(title=title, xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), aspect="equal", xlabel="first number")
        axes.grid(False)
        for name, (label, method) in WALKERS.items():
            _walks(axes, found["paths"].get(name, {}).get("v", []), label, plot.METHODS[method])
    panels[0].set_ylabel("second number")
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(WALKERS), fontsize=8)
    return drawn


@plot.style()
def along(found: Found) -> plot.Figure:
    """One number: the mean reward with its interval, and below it how much each imitation's loss differs from v = 0.

    A marker on the reward is where a run of training ended, on the losses where each is least. Raises as
    :func:`contours`.
    """
    (x,) = map(np.array, found["settings"]["axes"])
    drawn, (above, below) = plot.panels(2, 1, 4.6, sharex=True)
    above.fill_between(x, found["low"], found["high"], color=plot.INK, alpha=0.12, lw=0)
    above.plot(x, found["reward"], color=plot.INK, lw=1.6)
    above.yaxis.set_major_formatter(in_percent)
    above.set(ylabel="mean reward", xlim=(x[0], x[-1]))
    for name, (label, method) in WALKERS.items():
        ends = [walk[-1][0] for walk in found["paths"].get(name, {}).get("v", [])]
        look = plot.METHODS[method]
        above.plot(ends, np.interp(ends, x, found["reward"]), look.marker, color=look.colour, label=label)
    for writer, (label, method) in LOSSES.items():
        look, change = plot.METHODS[method], np.array(found[writer]) - np.interp(0.0, x, found[writer])
        below.plot(x, change, look.line, color=look.colour, label=label)
        below.plot(x[change.argmin()], change.min(), look.marker, color=look.colour)
    below.set(ylabel="loss, less that at v = 0,\nnats a token", xlabel="the number")
    for axes in (above, below):
        axes.axvline(0.0, ls=":", lw=1.0, color=plot.INK)
        axes.legend(fontsize=8)
    return drawn


def _walks(axes: plot.Axes, walks: list[list[list[float]]], label: str, look: plot.Method) -> None:
    """Every seed of a way to train, with a white outline that is seen on any background."""
    from matplotlib.patheffects import Normal, Stroke

    casing = [Stroke(linewidth=3.0, foreground="white"), Normal()]
    for place, walk in enumerate(walks):
        v = np.array(walk)
        axes.plot(v[:, 0], v[:, 1], color=look.colour, lw=1.4, path_effects=casing)
        axes.plot(v[-1:, 0], v[-1:, 1], look.marker, color=look.colour, mec="white", label=None if place else label)


class Plane:
    """Surfaces of a landscape of two numbers, and the ends of the paths on it."""

    def __init__(self, found: Found) -> None:
        self._found = found
        self._points = np.array(list(product(*found["settings"]["axes"])))  # [points, 2]
        paths = found["paths"].items()
        self.ends: dict[str, list[Place]] = {name: [tuple(walk[-1]) for walk in path["v"]] for name, path in paths}

    def at(self, surface: str, place: Place) -> float:
        """The mean reward, or a writer's loss in nats a token, at the grid point nearest to a place."""
        return float(self._found[surface][np.linalg.norm(self._points - place, axis=1).argmin()])

    def best(self, surface: str) -> Place:
        """Where the reward is highest, or a writer's loss lowest."""
        heights = np.array(self._found[surface]) * (1 if surface == "reward" else -1)
        x, y = self._points[heights.argmax()].tolist()
        return x, y
