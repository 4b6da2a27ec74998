"""Measured values for the text of a chapter, and tables for its page.

In the book ``{glue:text}`` reads the values by name. A notebook outside the book has no such text: values go nowhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from tinylora_lite.lab.claim import Point
from tinylora_lite.lab.estimate import Estimate
from tinylora_lite.lab.statistics import difference, estimates
from tinylora_lite.lab.store import Store

if TYPE_CHECKING:
    from IPython.display import Markdown

RULES = {"l": "---", "r": "---:"}


def put(prefix: str, values: Mapping[Any, Any]) -> None:
    """Makes numbers or words known to the text as ``PREFIX_KEY``, or as ``PREFIX`` where the key is empty."""
    try:
        glue = import_module("myst_nb").glue
    except ImportError:
        return
    for key, value in values.items():
        plain = value.item() if isinstance(value, np.generic) else value  # the text cannot format a NumPy scalar
        glue(f"{prefix}_{key}" if key != "" else prefix, plain, display=False)


def put_percent(
    prefix: str, values: Mapping[Any, float | Estimate | Point | tuple[Point, Point]], store: Store | None = None
) -> None:
    """Makes shares known to the text in percent.

    Args:
        prefix: of the names, as in :func:`put`.
        values: by key: a share; or what has a mean and an interval and becomes ``KEY_mean``, ``KEY_low`` and
            ``KEY_high``: an estimate, a point, or two points for the first one's lead over the second, seed by seed.
        store: the records of the points.

    Raises:
        ValueError: a point has fewer than two records.
    """
    for key, value in values.items():
        if isinstance(value, Point | tuple):
            if store is None:
                raise ValueError(f"{prefix}_{key} is of points, which need a store")
            value = difference(*value, store) if isinstance(value, tuple) else estimates([value], store)[0]
        if isinstance(value, Estimate):
            parts = {part: 100 * getattr(value, part) for part in ("mean", "low", "high")}
            put(f"{prefix}_{key}" if key != "" else prefix, parts)
        else:
            put(prefix, {key: 100 * value})


def table(columns: Iterable[str], rules: str, rows: Iterable[Iterable[object]]) -> Markdown:
    """A table for the page.

    Args:
        columns: the head.
        rules: for each column ``l`` or ``r``, the side that it is aligned to.
        rows: cells, of which the empty ones are ``""``.
    """
    lines = [_line(columns), f"|{'|'.join(RULES[side] for side in rules)}|", *map(_line, rows)]
    return markdown("\n".join(lines))


def markdown(text: str) -> Markdown:
    """Text for the page."""
    shown: Markdown = import_module("IPython.display").Markdown(text)
    return shown


def _line(cells: Iterable[object]) -> str:
    return "|" + "|".join(f" {cell} " if cell != "" else " " for cell in cells) + "|"
