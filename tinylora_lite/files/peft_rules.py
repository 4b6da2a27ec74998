"""The rules of PEFT's TinyLoRA: which modules share a vector, and which P a seed gives.

They follow the sources of PEFT 0.20.0 and 0.21.2, which agree in all of them; PEFT itself is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def groups_of_ratio(modules: int, weight_tying: float) -> list[int]:
    """The vector of every module under PEFT's ``weight_tying``, 0 (none tied) … 1 (all tied).

    Runs of equal length in the order of ``named_modules()``, and the remainder in the last one, which can be far
    longer.

    >>> groups_of_ratio(7, 0.4)
    [0, 1, 2, 3, 3, 3, 3]
    """
    groups = max(1, round(modules * (1.0 - weight_tying)))
    size = max(1, modules // groups)
    return [min(index // size, groups - 1) for index in range(modules)]


def ratio_of_groups(groups: Sequence[int]) -> float:
    """The ``weight_tying`` that ties the most modules among those that tie no two which ``groups`` keeps apart.

    PEFT has one way to make a given number of groups. Where ``groups`` was made that way, the ratio gives exactly
    these groups; otherwise it gives finer ones, at worst one for each module.

    >>> ratio_of_groups([0, 0, 1, 1, 2, 2])
    0.5
    >>> ratio_of_groups([0, 1, 0, 1])
    0.0
    """
    modules = len(groups)
    for count in range(len(set(groups)), modules):
        # The shortest decimal fraction that gives this many groups.
        shorter = (round(1 - count / modules, digits) for digits in range(18))
        ratio = next(ratio for ratio in shorter if max(1, round(modules * (1.0 - ratio))) == count)
        if len(set(zip(groups_of_ratio(modules, ratio), groups, strict=True))) == count:
            return ratio
    return 0.0


def peft_projection(seed: int, module: int, u: int, rank: int, dtype: torch.dtype) -> Tensor:
    """P of one module as PEFT 0.20 and later draw it, ``[u, r, r]`` float32.

    Args:
        seed: ``projection_seed``.
        module: the module's position in the order of ``named_modules()``, counted from 0.
        u: the length of v.
        rank: r.
        dtype: of the base's weight, to which PEFT rounds P.
    """
    generator = torch.Generator().manual_seed(seed + module)
    P = torch.normal(mean=0.0, std=1.0 / (rank**0.5), size=(u, rank, rank), generator=generator)
    return P.to(dtype).float()
