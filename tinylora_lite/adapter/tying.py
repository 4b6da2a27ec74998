"""Which modules are adapted, in which order, and which of them share one vector."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

Tying = Literal["tiled", "structured"]

MODULE_TYPES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven linear layers of a block, in the order in which tying counts them (paper, section 4)."""


@dataclass(frozen=True)
class TargetModule:
    """A module to adapt: its layer (-1 outside any), its place among ``MODULE_TYPES`` or after them, its name."""

    layer: int
    type_index: int
    name: str


def find_target_modules(model: nn.Module, target_modules: Sequence[str] | None = None) -> list[TargetModule]:
    """The modules to adapt in tying order: block by block, and q, k, v, o, gate, up, down inside one.

    Blocks are in the order of ``named_modules()``. No weight is read, so a model on the meta device will do.

    Args:
        model: its target modules are ``nn.Linear``, as the layers of bitsandbytes and torchao are too.
        target_modules: full names or last parts of names; ``None`` means those of ``MODULE_TYPES`` that there are.

    Raises:
        ValueError: a target names no linear layer of the model or one that is no ``nn.Linear``, or ``None`` finds none.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = MODULE_TYPES if target_modules is None else tuple(target_modules)
    ends = tuple(f".{target}" for target in targets)
    names = [name for name in linear if f".{name}".endswith(ends)]
    for name, module in model.named_modules():
        wraps = any(isinstance(part, nn.Linear) for part in module.modules())
        if f".{name}".endswith(ends) and "linear" in type(module).__name__.lower() and not wraps:
            raise ValueError(
                f"{name} is a {type(module).__name__} of {type(module).__module__}, no torch.nn.Linear, "
                "as in quantized models; load the model without quantization, or quantized by bitsandbytes or torchao"
            )
    missing = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if missing and (target_modules is not None or not names):
        known = ", ".join(dict.fromkeys(_type_of(name) for name in linear))
        advice = f"set target_modules to some of: {known}" if known else "it has no torch.nn.Linear at all"
        raise ValueError(f"no linear layer named {', '.join(missing)} in {type(model).__name__}; {advice}")
    types = list(dict.fromkeys([*MODULE_TYPES, *map(_type_of, names)]))
    blocks = list(dict.fromkeys(map(_block_of, names)))
    names.sort(key=lambda name: (blocks.index(_block_of(name)), types.index(_type_of(name))))
    return [TargetModule(_block_of(name)[1], types.index(_type_of(name)), name) for name in names]


def groups_of(targets: Sequence[TargetModule], n_tie: int | Literal["all"], tying: Tying) -> list[int]:
    """The group of every module, balanced so that the sizes of the runs differ by at most one (paper, section 6.5).

    ``tiled``: runs of ``n_tie`` consecutive modules, whatever their type, ``ceil(modules / n_tie)`` groups.
    ``structured``: runs of ``n_tie`` layers with each type apart, ``types · ceil(layers / n_tie)`` groups. Groups
    are numbered in the order of their first modules. ``n_tie="all"`` puts everything into one group.

    >>> targets = [TargetModule(layer, kind, "") for layer in range(2) for kind in range(3)]
    >>> groups_of(targets, 4, "tiled")
    [0, 0, 0, 1, 1, 1]
    >>> groups_of(targets, 2, "structured")
    [0, 1, 2, 0, 1, 2]
    """
    if n_tie == "all":
        return [0] * len(targets)
    kinds = [0 if tying == "tiled" else target.type_index for target in targets]
    count, seen = Counter(kinds), Counter[int]()
    numbers: dict[tuple[int, int], int] = {}
    groups = []
    for kind in kinds:
        run = seen[kind] * -(-count[kind] // n_tie) // count[kind]
        groups.append(numbers.setdefault((kind, run), len(numbers)))
        seen[kind] += 1
    return groups


def _type_of(name: str) -> str:
    return name.rpartition(".")[2]


def _block_of(name: str) -> tuple[str, int]:
    """``("model.layers.3", 3)`` of ``model.layers.3.mlp.up_proj``; names without an integer share one block, -1."""
    numbered = re.match(r"(?:.*?\.)?(\d+)(?=\.|$)", name)
    return (numbered.group(), int(numbered.group(1))) if numbered else ("", -1)
