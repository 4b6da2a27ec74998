"""Measured values for the text of a chapter, and tables for its page.

In the book ``{glue:text}`` reads the values by name. A notebook outside the book has no such text: values go nowhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

import numpy as np

from tinylora_lite.lab.claim import Point
from tinylora_lite.lab.estimate import Estimate
from tinylora_lite.lab.statistics import difference, estimates
from tinylora_lite.lab.store import Store

RULES = {"l": "---", "r": "---:"}


class Markdown(str):
    """Text that a notebook shows as Markdown."""

    def _repr_markdown_(self) -> str:
        return self


def put(name: str, value: Any) -> None:
    """Makes a number or words known to the text; the values of a mapping as ``NAME_KEY``, or ``NAME`` for ``""``."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            put(f"{name}_{key}" if key != "" else name, each)
        return
    try:
        glue = import_module("myst_nb").glue
    except ImportError:
        return
    plain = value.item() if isinstance(value, np.generic) else value  # the text cannot format a NumPy scalar
    glue(name, plain, display=False)


def put_percent(
    prefix: str, values: Mapping[Any, float | Estimate | Point | tuple[Point, Point]], store: Store | None = None
) -> None:
    """Makes shares known to the text in percent, under the names of :func:`put`.

    What has an interval becomes ``KEY_mean``, ``KEY_low`` and ``KEY_high``: an estimate, a point of ``store``, or two
    points for the first one's lead over the second, seed by seed.
    """
    for key, value in values.items():
        if isinstance(value, Point | tuple):
            assert store is not None
            value = difference(*value, store) if isinstance(value, tuple) else estimates([value], store)[0]
        if isinstance(value, Estimate):
            put(prefix, {key: {part: 100 * getattr(value, part) for part in ("mean", "low", "high")}})
        else:
            put(prefix, {key: 100 * value})


def table(columns: Iterable[str], rules: str, rows: Iterable[Iterable[object]]) -> Markdown:
    """A table whose columns are aligned as ``rules`` say: ``l`` or ``r`` for each."""
    head, *lines = (f"| {' | '.join(map(str, cells))} |" for cells in (columns, *rows))
    return Markdown("\n".join([head, f"|{'|'.join(RULES[side] for side in rules)}|", *lines]))
