"""A landscape of two trained parameters, read at the grid point next to any place."""

from __future__ import annotations

from itertools import product

import numpy as np

from tinylora_lite.lab.landscape import Found

Place = tuple[float, float]
START: Place = (0.0, 0.0)
"""Where every path starts: the untouched base."""


class Plane:
    """Surfaces of a landscape, as :func:`~tinylora_lite.lab.landscape.load` reads it, and the ends of paths on it."""

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
