"""Adapters to and from PEFT's TinyLoRA format, without PEFT.

PEFT uses A, B and P as the folder holds them and computes none of them again. So any placement of Σ and any P is
exported exactly, and what PEFT wrote is used unchanged. The rules of tying and of drawing P follow the sources of PEFT
0.20.0 and 0.21.2, which agree in them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinylora_lite.adapter.adapter import TinyLoraAdapter, attach
from tinylora_lite.adapter.config import TinyLoraConfig
from tinylora_lite.adapter.layer import Factors
from tinylora_lite.adapter.tying import find_target_modules
from tinylora_lite.adapter.weights import dense_weight
from tinylora_lite.files import peft_format
from tinylora_lite.files.file_format import AdapterFileError, model_of, storable


def export_peft(adapter: TinyLoraAdapter, folder: str | Path) -> Path:
    """Writes an adapter in PEFT's TinyLoRA format, for ``peft.PeftModel.from_pretrained`` of PEFT 0.20 and later.

    The function is the adapter's own whatever its sigma and its P (a calibrated P is written as PEFT's). PEFT computes
    in float32: outputs are equal bit for bit where the model is float32 or ``arithmetic="float32"``, elsewhere up to
    the rounding of the model's dtype. Load with PEFT's defaults: ``low_cpu_mem_usage=True`` and
    ``autocast_adapter_dtype=False`` round the adapter to the model's dtype as well.

    PEFT ties modules by a ratio only. Groups that no ratio gives are written as one vector for each module, many of
    them equal, and a warning says so: the function is the same, but PEFT would train them apart.

    Args:
        adapter: attached or detached; its model must still exist.
        folder: made where it is missing; where it holds a TinyLoRA of PEFT, the two files are replaced. It is returned.

    Raises:
        FileExistsError: the folder is a file, or holds other things than a TinyLoRA of PEFT.
        ValueError: a value is not finite, or the model is gone.
    """
    folder, model, config = Path(folder), model_of(adapter), adapter.config
    group_of = dict(zip(adapter.names, adapter.groups, strict=True))
    names = [name for name, _ in model.named_modules() if name in group_of]
    groups = [group_of[name] for name in names]
    weight_tying = ratio_of_groups(groups)
    row_of = dict(zip(groups_of_ratio(len(names), weight_tying), groups, strict=True))
    settings = {
        "peft_type": "TINYLORA",
        "peft_version": "0.20.0",  # the first that reads this folder as every later one does
        "r": config.rank,
        "u": config.u,
        "weight_tying": weight_tying,
        **peft_format.settings_of_base(model, names),
    }
    peft_format.check_free(folder, settings)
    vectors = storable(adapter.vectors, "fp32", "the folder")
    tensors = {f"base_model.tinylora_v.{theirs}": vectors[ours].clone() for theirs, ours in row_of.items()}
    for name in names:
        factors = adapter.factors(name)
        for letter, part in (("A", factors.right), ("B", factors.left), ("P", factors.projection)):
            tensors[f"base_model.model.{name}.tinylora_{letter}"] = storable(part, "fp32", name)
    peft_format.write_folder(folder, settings, tensors)
    if len(row_of) > len(vectors):
        warnings.warn(
            f"no weight_tying of PEFT ties modules as this adapter does, so {folder} holds its {len(vectors)} vectors "
            f"as {len(row_of)}, many of them equal; the function is the same, but PEFT would train them apart",
            stacklevel=2,
        )
    return folder


def import_peft(model: nn.Module, folder: str | Path) -> TinyLoraAdapter:
    """Attaches the TinyLoRA adapter that PEFT's ``save_pretrained`` (or :func:`export_peft`) wrote.

    A, B and P are used as the folder holds them, with PEFT's arithmetic, so that outputs equal PEFT's bit for bit in
    float32 and in bfloat16. Row g of ``vectors`` is PEFT's ``tinylora_v.g``. P that PEFT 0.20 or later left out is
    drawn again by its rule. The adapted modules are those whose A and B the folder holds.

    Args:
        model: the base it was trained on, in the dtype it was trained in, not wrapped by PEFT.
        folder: on this machine; PEFT writes adapters that are not named ``default`` to subfolders.

    Raises:
        FileNotFoundError: there is no such folder.
        AdapterFileError: the folder is damaged, holds another kind of adapter, does not fit the model, asks for what
            this library does not have, or was written by PEFT 0.19 without P, which cannot be drawn again. The model
            is untouched then.
    """
    folder = Path(folder)
    settings = peft_format.read_settings(folder)
    vectors, parts, copies = peft_format.read_tensors(folder)
    names = [name for name, _ in model.named_modules() if name in parts]
    try:
        _check_model(model, parts, copies)
        group_of = dict(zip(names, groups_of_ratio(len(names), settings.weight_tying), strict=True))
        if vectors.keys() != set(group_of.values()) or {tuple(v.shape) for v in vectors.values()} != {(settings.u,)}:
            shapes = ", ".join(f"{group}: {list(vectors[group].shape)}" for group in sorted(vectors)) or "none"
            wanted = len(set(group_of.values()))
            raise ValueError(f"its settings ask for {wanted} vectors of length {settings.u}; it holds {shapes}")
        targets = peft_format.targets_of(model, names)
        if targets is None:
            raise ValueError(f"no list of names means exactly its modules {', '.join(names)}")
        config = TinyLoraConfig(
            rank=settings.r,
            u=settings.u,
            sigma="split",
            target_modules=targets,
            groups=[group_of[target.name] for target in find_target_modules(model, targets)],
            arithmetic="float32",
        )
        factors = {name: _factors(parts[name], index, settings) for index, name in enumerate(names)}
        for name in names:
            if not _is_singular(factors[name], dense_weight(model.get_submodule(name))):
                raise ValueError(f"it was made for another base, as its factors are no singular vectors of {name}")
        adapter = attach(model, config, factors=factors)
    except ValueError as error:
        raise AdapterFileError(f"{folder} does not fit this model: {error}") from error
    with torch.no_grad():
        adapter.vectors.copy_(torch.stack([vectors[group] for group in sorted(vectors)]))
    return adapter


def groups_of_ratio(modules: int, weight_tying: float) -> list[int]:
    """The vector of every module under PEFT's ``weight_tying``, 0 (none tied) … 1 (all tied).

    Runs of equal length in the order of ``named_modules()``; the remainder is in the last one, which can be far longer.

    >>> groups_of_ratio(7, 0.4)
    [0, 1, 2, 3, 3, 3, 3]
    """
    groups = max(1, round(modules * (1.0 - weight_tying)))
    size = max(1, modules // groups)
    return [min(index // size, groups - 1) for index in range(modules)]


def ratio_of_groups(groups: Sequence[int]) -> float:
    """The ``weight_tying`` that gives these groups, up to their numbers; 0, which ties nothing, where none does.

    >>> ratio_of_groups([1, 1, 0, 0, 2, 2]), ratio_of_groups([0, 1, 0, 1])
    (0.5, 0.0)
    """
    count = len(set(groups))
    ratio = 1.0 - count / len(groups)
    same = len(set(zip(groups_of_ratio(len(groups), ratio), groups, strict=True))) == count
    return ratio if same else 0.0


def _check_model(model: nn.Module, parts: Mapping[str, Mapping[str, Tensor]], copies: Mapping[str, Tensor]) -> None:
    if hasattr(model, "peft_config"):
        raise ValueError("the model is wrapped by PEFT; give the base itself (model.unload() returns it)")
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    present = {"A", "B"}.union(*parts.values())  # P of all modules or of none
    for name, held in parts.items():
        if name not in modules:
            raise ValueError(f"it holds factors of {name}, which is no module of this model")
        if not isinstance(modules[name], nn.Linear):
            kind = type(modules[name]).__name__
            raise ValueError(f"it adapts {name}, a {kind}; adapters here take torch.nn.Linear only")
        if missing := sorted(present - held.keys()):
            raise ValueError(f"tinylora_{missing[0]} of {name} is missing in it")
    for name, copy in copies.items():
        if name not in parameters or not torch.equal(parameters[name].detach().float().cpu(), copy):
            raise ValueError(f"it holds a {name} of its own, which differs from the model's; no adapter here holds one")


def _factors(held: Mapping[str, Tensor], index: int, settings: peft_format.PeftSettings) -> Factors:
    """The factors of the module at ``index`` in the order of ``named_modules()``; P is drawn where it was left out."""
    if "P" in held:
        return Factors(held["B"], held["A"], held["P"])
    version = settings.peft_version
    number = re.match(r"(\d+)\.(\d+)", str(version))
    if number is None or (int(number[1]), int(number[2])) < (0, 20):
        raise ValueError(
            f"it holds no P and was written by {'an unknown PEFT' if version is None else f'PEFT {version}'}; "
            "before 0.20 PEFT drew P from a seed that was another one in every process (its pull request 3180), so "
            "P is lost. Save it with save_projection=True from the process that trained it, or train it again"
        )
    u, r, generator = settings.u, settings.r, torch.Generator().manual_seed(settings.projection_seed + index)
    P = torch.normal(mean=0.0, std=1.0 / r**0.5, size=(u, r, r), generator=generator)
    # PEFT rounded P and A to the dtype of the base.
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    dtype = next(dtype for dtype in dtypes if torch.equal(held["A"], held["A"].to(dtype).float()))
    return Factors(held["B"], held["A"], P.to(dtype).float())


def _is_singular(factors: Factors, weight: Tensor) -> bool:
    """Whether the first pair of factors is one of the weight's: ``W a ∝ b``, true of any placement of Σ."""
    a, b = factors.right[:1].to(weight), factors.left[:, 0].to(weight.device)
    if weight.shape != (len(b), a.shape[1]):
        return False
    image = F.linear(a, weight)[0].float()
    return bool(image @ b >= 0.5 * image.norm() * b.norm())
