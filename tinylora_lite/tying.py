"""Which modules are adapted, in which order, and which of them share one vector."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Tying = Literal["tiled", "structured"]

MODULE_TYPES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven linear layers of a block, in the order in which tying counts them (paper, section 4)."""


@dataclass(frozen=True, order=True)
class Site:
    """Where a module stands: its layer, its place among ``MODULE_TYPES``, and its name in the model."""

    layer: int
    type_index: int
    name: str


def groups_of(sites: Sequence[Site], n_tie: int, tying: Tying) -> list[int]:
    """The group of every module, balanced so that group sizes differ by at most one run.

    ``tiled``: runs of ``n_tie`` consecutive modules, whatever their type, ``ceil(modules / n_tie)`` groups.
    ``structured``: runs of ``n_tie`` layers with each type apart, ``types · ceil(layers / n_tie)`` groups. Groups
    are numbered in the order in which their first module stands in the network. (Paper, section 6.5.)

    >>> sites = [Site(layer, kind, "") for layer in range(2) for kind in range(3)]
    >>> groups_of(sites, 4, "tiled")
    [0, 0, 0, 1, 1, 1]
    >>> groups_of(sites, 2, "structured")
    [0, 1, 2, 0, 1, 2]
    """
    if tying == "tiled":
        return _balanced_runs(len(sites), n_tie)
    layers: dict[int, list[int]] = defaultdict(list)
    for site in sites:
        layers[site.type_index].append(site.layer)
    run_of = {}
    for kind, found in layers.items():
        runs = _balanced_runs(len(found), n_tie)
        run_of |= {(layer, kind): run for layer, run in zip(sorted(found), runs, strict=True)}
    numbers: dict[tuple[int, int], int] = {}
    return [
        numbers.setdefault((site.type_index, run_of[site.layer, site.type_index]), len(numbers))
        for site in sites
    ]


def _balanced_runs(count: int, n_tie: int) -> list[int]:
    groups = -(-count // n_tie)
    return [index * groups // count for index in range(count)]
