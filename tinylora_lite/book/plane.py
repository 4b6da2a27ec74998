"""A landscape of two trained parameters, read at the grid point next to any place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinylora_lite.lab.landscape import WRITERS, Found

Place = tuple[float, float]
START: Place = (0.0, 0.0)
"""Where every path starts: the untouched base."""


class Plane:
    """Surfaces of a landscape, as :func:`~tinylora_lite.lab.landscape.load` reads it, and the ends of paths on it."""

    def __init__(self, found: Found) -> None:
        self._axes = [np.array(axis) for axis in found["settings"]["axes"]]
        shape = [len(axis) for axis in self._axes]
        self._surfaces = {name: np.reshape(found[name], shape) for name in ("reward", *WRITERS)}
        paths = found["paths"].items()
        self.ends: dict[str, list[Place]] = {name: [tuple(walk[-1]) for walk in path["v"]] for name, path in paths}

    def at(self, surface: str, place: Sequence[float]) -> float:
        """The mean reward, or a writer's loss in nats a token, at the grid point nearest to a place."""
        nearest = tuple(int(np.abs(axis - v).argmin()) for axis, v in zip(self._axes, place, strict=True))
        return float(self._surfaces[surface][nearest])

    def best(self, surface: str) -> Place:
        """Where the reward is highest, or a writer's loss lowest."""
        heights = self._surfaces[surface] * (1 if surface == "reward" else -1)
        row, column = np.unravel_index(heights.argmax(), heights.shape)
        return float(self._axes[0][row]), float(self._axes[1][column])
