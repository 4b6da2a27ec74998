"""PEFT's TinyLoRA by its own rules: which modules, which vectors, which P and which factors.

Written after the sources of PEFT 0.20.0 and 0.21.2, which agree in all of it; PEFT itself is not needed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def matched_modules(model: nn.Module, settings: Mapping[str, Any]) -> list[str]:
    """The names that ``target_modules`` and its kin match, of any type, in PEFT's order: ``named_modules()``.

    Args:
        model: the base.
        settings: of ``adapter_config.json``: ``target_modules`` (a regular expression for whole names, a list of names
            or of last parts of names, or ``"all-linear"``), ``exclude_modules``, ``layers_to_transform`` and
            ``layers_pattern``.

    Raises:
        ValueError: a setting has a type that PEFT does not know, or is no regular expression.
    """
    targets = settings["target_modules"]
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = _all_linear(model)
    layers, patterns = settings["layers_to_transform"], settings["layers_pattern"] or ()
    layers = [layers] if isinstance(layers, int) else layers or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    try:
        targets = targets if isinstance(targets, str) else frozenset(targets)
        return [
            name
            for name, _ in model.named_modules()
            if name
            and not _names(settings.get("exclude_modules") or (), name)
            and _names(targets, name)
            # To PEFT, layers_to_transform is silent about regular expressions and full names.
            and (not layers or isinstance(targets, str) or name in targets or _layer(name, patterns) in layers)
        ]
    except (re.error, TypeError) as error:
        raise ValueError(f"target_modules or a setting beside it is none that PEFT knows ({error})") from error


def targets_of(model: nn.Module, names: Sequence[str]) -> list[str] | None:
    """The shortest list that stands for exactly these modules, to PEFT and to ``find_sites``, if there is any.

    Args:
        model: the base.
        names: of the modules, in the order of ``named_modules()``.
    """
    beside = {"layers_to_transform": None, "layers_pattern": None}
    for targets in (list(dict.fromkeys(name.rpartition(".")[2] for name in names)), list(names)):
        if matched_modules(model, beside | {"target_modules": targets}) == names:
            return targets
    return None


def _names(targets: str | Collection[str], name: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    parts = name.split(".")
    return any(".".join(parts[first:]) in targets for first in range(len(parts)))


def _layer(name: str, patterns: Sequence[str]) -> int | None:
    anywhere = [r".*?\.[^.]*\.(\d+)\."]
    for pattern in [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or anywhere:
        if found := re.match(pattern, name):
            return int(found[1])
    return None


def _all_linear(model: nn.Module) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    linear = (nn.Linear, Conv1D)
    return [name for name, part in model.named_modules() if isinstance(part, linear) and part is not head]


def groups_of_ratio(modules: int, weight_tying: float) -> list[int]:
    """The vector of every module under PEFT's ``weight_tying``, 0 (none tied) … 1 (all tied).

    Runs of equal length in PEFT's order, and the remainder in the last one, which can be far longer.

    >>> groups_of_ratio(7, 0.4)
    [0, 1, 2, 3, 3, 3, 3]
    """
    groups = max(1, round(modules * (1.0 - weight_tying)))
    size = max(1, modules // groups)
    return [min(index // size, groups - 1) for index in range(modules)]


def ratio_of_groups(groups: Sequence[int]) -> float:
    """The ``weight_tying`` that ties most among those that tie nothing which ``groups`` keeps apart.

    PEFT knows one way to make a number of groups. Where ``groups`` is that way, the ratio gives exactly these groups;
    where it is another, finer ones, at worst one for each module.

    >>> ratio_of_groups([0, 0, 1, 1, 2, 2])
    0.5
    >>> ratio_of_groups([0, 1, 0, 1])
    0.0
    """
    modules = len(groups)
    ends = [modules] * modules  # of the run of equal groups that each module stands in
    for index in range(modules - 2, -1, -1):
        ends[index] = ends[index + 1] if groups[index] == groups[index + 1] else index + 1
    for count in range(len(set(groups)), modules):
        size = modules // count
        last = size * (count - 1)
        if ends[last] == modules and all(ends[first] >= first + size for first in range(0, last, size)):
            return _shortest_ratio(modules, count)
    return 0.0


def _shortest_ratio(modules: int, count: int) -> float:
    exact = 1 - count / modules
    rounded = (round(exact, digits) for digits in range(17))
    return next((ratio for ratio in rounded if max(1, round(modules * (1.0 - ratio))) == count), exact)


def peft_projection(seed: int, module: int, u: int, rank: int, dtype: torch.dtype) -> Tensor:
    """P of one module as PEFT 0.20 and later draw it, ``[u, r, r]`` float32.

    Args:
        seed: ``projection_seed``.
        module: the module's place in PEFT's order, counted from 0.
        u: the length of v.
        rank: r.
        dtype: of the base's weight, to which PEFT rounds P.
    """
    generator = torch.Generator().manual_seed(seed + module)
    P = torch.normal(mean=0.0, std=1.0 / (rank**0.5), size=(u, rank, rank), generator=generator)
    return P.to(dtype).float()


def peft_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``B [out, r]`` and ``A [r, in]`` of one weight as PEFT computes them, float32: √Σ on both sides.

    The signs of the singular vectors are those of this machine's SVD, and everything is rounded to the weight's dtype.

    Raises:
        ValueError: the weight holds NaN or infinity.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("a weight holds NaN or infinity and has no SVD; load the model again, or in another dtype")
    U, S, Vh = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    U, S, Vh = (part.to(weight.dtype) for part in (U[:, :rank], S[:rank], Vh[:rank]))
    root = torch.sqrt(S)
    # Products round according to the layout in memory too, so it is PEFT's.
    return (U * root).contiguous().float(), (root[:, None] * Vh).contiguous().float()
