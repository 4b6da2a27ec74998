"""Which modules are adapted, in which order, and which of them share one vector."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

Tying = Literal["tiled", "structured"]

MODULE_TYPES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven linear layers of a block, in the order in which tying counts them (paper, section 4)."""


@dataclass(frozen=True)
class TargetModule:
    """A module to adapt: its layer (-1 outside any), its place among ``MODULE_TYPES``, its name in the model.

    Types that are not among the seven are numbered after them, in the order in which the model holds them.
    """

    layer: int
    type_index: int
    name: str


def find_target_modules(model: nn.Module, target_modules: Sequence[str] | None = None) -> list[TargetModule]:
    """The modules to adapt in tying order: block by block, and q, k, v, o, gate, up, down inside one.

    Blocks are in the order of ``named_modules()``. No weight is read, so a model on the meta device will do. The
    layers of bitsandbytes and torchao are ``nn.Linear`` too; those of other quantization libraries often are not.

    Args:
        model: the model.
        target_modules: full names or last parts of names; ``None`` means those of ``MODULE_TYPES`` that there are.

    Raises:
        ValueError: a target names no linear layer of the model or one that is no ``nn.Linear``, or ``None`` finds none.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = MODULE_TYPES if target_modules is None else tuple(target_modules)
    of_target = {target: [n for n in linear if f".{n}".endswith(f".{target}")] for target in targets}
    missing = [target for target, names in of_target.items() if not names]
    for name, module in model.named_modules():
        if f".{name}".endswith(tuple(f".{target}" for target in targets)) and _stands_for_linear(module):
            raise ValueError(
                f"{name} is a {type(module).__name__} of {type(module).__module__}, no torch.nn.Linear, "
                "as in quantized models; load the model without quantization, or quantized by bitsandbytes or torchao"
            )
    if missing and (target_modules is not None or len(missing) == len(targets)):
        known = ", ".join(dict.fromkeys(_type_of(name) for name in linear))
        advice = f"set target_modules to some of: {known}" if known else "it has no torch.nn.Linear at all"
        raise ValueError(f"no linear layer named {', '.join(missing)} in {type(model).__name__}; {advice}")
    chosen = set().union(*of_target.values())
    names = [name for name in linear if name in chosen]
    types = list(dict.fromkeys([*MODULE_TYPES, *map(_type_of, names)]))
    blocks = list(dict.fromkeys(map(_block_of, names)))
    names.sort(key=lambda name: (blocks.index(_block_of(name)), types.index(_type_of(name))))
    return [TargetModule(_layer_of(name), types.index(_type_of(name)), name) for name in names]


def groups_of(targets: Sequence[TargetModule], n_tie: int | Literal["all"], tying: Tying) -> list[int]:
    """The group of every module, balanced so that the sizes of the runs differ by at most one.

    ``tiled``: runs of ``n_tie`` consecutive modules, whatever their type, ``ceil(modules / n_tie)`` groups.
    ``structured``: runs of ``n_tie`` layers with each type apart, ``types · ceil(layers / n_tie)`` groups. Groups
    are numbered in the order of their first modules in the network. ``n_tie="all"`` puts everything
    into one group, whatever the tying. (Paper, section 6.5.)

    >>> targets = [TargetModule(layer, kind, "") for layer in range(2) for kind in range(3)]
    >>> groups_of(targets, 4, "tiled")
    [0, 0, 0, 1, 1, 1]
    >>> groups_of(targets, 2, "structured")
    [0, 1, 2, 0, 1, 2]
    """
    if n_tie == "all":
        return [0] * len(targets)
    if tying == "tiled":
        return _balanced_runs(len(targets), n_tie)
    positions: dict[int, list[int]] = defaultdict(list)
    for position, target in enumerate(targets):
        positions[target.type_index].append(position)
    run_of = {}
    for kind, found in positions.items():
        for position, run in zip(found, _balanced_runs(len(found), n_tie), strict=True):
            run_of[position] = (kind, run)
    numbers: dict[tuple[int, int], int] = {}
    return [numbers.setdefault(run_of[position], len(numbers)) for position in range(len(targets))]


def vector_groups(
    targets: Sequence[TargetModule], n_tie: int | Literal["all"], tying: Tying, groups: Sequence[int] | None = None
) -> tuple[int, ...]:
    """For each module, in tying order, the row of ``vectors`` that drives it: ``groups``, or what the tying gives."""
    if groups is None:
        return tuple(groups_of(targets, n_tie, tying))
    if len(groups) != len(targets):
        raise ValueError(f"groups names a vector for {len(groups)} modules; the model has {len(targets)} to adapt")
    return tuple(groups)


def _balanced_runs(count: int, n_tie: int) -> list[int]:
    groups = -(-count // n_tie)
    return [index * groups // count for index in range(count)]


def _stands_for_linear(module: nn.Module) -> bool:
    """Whether a module is some library's linear layer, and no wrapper around an ``nn.Linear``."""
    named = "linear" in type(module).__name__.lower()
    return named and not any(isinstance(part, nn.Linear) for part in module.modules())


def _type_of(name: str) -> str:
    return name.rpartition(".")[2]


def _block_of(name: str) -> str:
    """``model.layers.3`` of ``model.layers.3.mlp.up_proj``; names without a number share one block."""
    numbered = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    return numbered.group() if numbered else ""


def _layer_of(name: str) -> int:
    number = _block_of(name).rpartition(".")[2]
    return int(number) if number.isdigit() else -1
