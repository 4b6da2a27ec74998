"""The rules of PEFT's TinyLoRA: which modules, which vectors, which P and which factors.

They follow the sources of PEFT 0.20.0 and 0.21.2, which agree in all of them; PEFT itself is not needed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

Text = Annotated[str, Field(min_length=1)]


class PeftSettings(BaseModel):
    """The settings of PEFT's TinyLoRA with PEFT's defaults, as ``adapter_config.json`` holds them.

    Attributes:
        target_modules: the modules to adapt: a regular expression for whole names, a list of names or of last parts of
            names, or ``"all-linear"``.
        exclude_modules: modules that are left out, named as in ``target_modules``.
        layers_to_transform: the only layers whose modules are adapted; PEFT ignores it for a regular expression.
        layers_pattern: the name of the list that holds the layers, where it is not the innermost numbered one.
        weight_tying: the share of vectors that tying saves, 0 (none tied) to 1 (all tied).
    """

    model_config = ConfigDict(strict=True, extra="allow")

    peft_type: Literal["TINYLORA"]
    target_modules: Text | Annotated[list[Text], Field(min_length=1)]
    auto_mapping: Any = None
    base_model_name_or_path: str | None = None
    bias: str = "none"
    exclude_modules: str | list[str] | None = Field(default=None, exclude=True)  # no setting of PEFT's own class
    fan_in_fan_out: bool = False
    inference_mode: bool = True
    init_v_bound: float = 0.02
    init_weights: bool | str = True
    layers_pattern: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    modules_to_save: list[str] | None = None
    peft_version: Any = None
    projection_seed: int = Field(default=42, gt=-(2**62), lt=2**62)
    r: int = Field(default=2, ge=1)
    revision: str | None = None
    save_projection: bool = True
    task_type: str | None = None
    tinylora_dropout: float = 0.0
    u: int = Field(default=64, ge=1)
    weight_tying: float = Field(default=0.0, ge=0, le=1)


def matched_modules(model: nn.Module, settings: PeftSettings) -> list[str]:
    """The names of the modules that the settings adapt, of any type, in PEFT's order: that of ``named_modules()``.

    Raises:
        ValueError: a setting is no regular expression.
    """
    targets, layers, patterns = settings.target_modules, settings.layers_to_transform, settings.layers_pattern or ()
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = _all_linear(model)
    layers = [layers] if isinstance(layers, int) else layers or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    try:
        return [
            name
            for name, _ in model.named_modules()
            if name
            and not _matches(settings.exclude_modules or (), name)
            and _matches(targets, name)
            # PEFT ignores layers_to_transform for full names too.
            and (not layers or isinstance(targets, str) or name in targets or _layer(name, patterns) in layers)
        ]
    except re.error as error:
        raise ValueError(f"target_modules or a setting beside it is no regular expression ({error})") from error


def targets_of(model: nn.Module, names: Sequence[str]) -> list[str] | None:
    """The shortest list that means exactly these modules, to PEFT and to ``find_target_modules``, if there is any.

    Args:
        model: the base.
        names: of the modules, in the order of ``named_modules()``.
    """
    for targets in (list(dict.fromkeys(name.rpartition(".")[2] for name in names)), list(names)):
        if matched_modules(model, PeftSettings(peft_type="TINYLORA", target_modules=targets)) == names:
            return targets
    return None


def _matches(targets: str | Collection[str], name: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    parts = name.split(".")
    return any(".".join(parts[first:]) in targets for first in range(len(parts)))


def _layer(name: str, patterns: Collection[str]) -> int | None:
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
        module: the module's position in PEFT's order, counted from 0.
        u: the length of v.
        rank: r.
        dtype: of the base's weight, to which PEFT rounds P.
    """
    generator = torch.Generator().manual_seed(seed + module)
    P = torch.normal(mean=0.0, std=1.0 / (rank**0.5), size=(u, rank, rank), generator=generator)
    return P.to(dtype).float()


def peft_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``B [out, r]`` and ``A [r, in]`` of one weight as PEFT computes them, float32: √Σ on both sides.

    The signs of the singular vectors are those of this machine's SVD. All factors are rounded to the weight's dtype.

    Raises:
        ValueError: the weight holds NaN or infinity.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("a weight holds NaN or infinity and has no SVD; load the model again, or in another dtype")
    U, S, Vh = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    U, S, Vh = (part.to(weight.dtype) for part in (U[:, :rank], S[:rank], Vh[:rank]))
    root = torch.sqrt(S)
    # The layout in memory changes how products round, so it is PEFT's.
    return (U * root).contiguous().float(), (root[:, None] * Vh).contiguous().float()
