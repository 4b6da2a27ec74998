"""Adapters to and from PEFT's TinyLoRA format, without PEFT.

PEFT uses A, B and P as the folder holds them and computes none of them again. So any placement of Σ and any P is
exported exactly, and what PEFT wrote is used unchanged.
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
from tinylora_lite.files.file_format import AdapterFileError, model_of, storable
from tinylora_lite.files.peft_format import check_free, read_settings, read_tensors, settings_of_base, write_folder
from tinylora_lite.files.peft_rules import (
    PeftSettings,
    groups_of_ratio,
    matched_modules,
    peft_factors,
    peft_projection,
    ratio_of_groups,
    targets_of,
)


def export_peft(adapter: TinyLoraAdapter, folder: str | Path, *, projection: bool = True) -> Path:
    """Writes an adapter in PEFT's TinyLoRA format, for ``peft.PeftModel.from_pretrained`` of PEFT 0.20 and later.

    The function is the adapter's own whatever its sigma and its P (a calibrated P is written as PEFT's). PEFT computes
    in float32: outputs are equal bit for bit where the model is float32 or ``arithmetic="float32"``, elsewhere up to
    the rounding of the model's dtype. Load with PEFT's defaults: ``low_cpu_mem_usage=True`` and
    ``autocast_adapter_dtype=False`` round the adapter to the model's dtype as well.

    PEFT ties modules by a ratio only. Groups that no ratio gives are written as finer ones with equal vectors, and a
    warning says so: the function is the same, but PEFT would train the finer groups apart.

    Args:
        adapter: attached or detached; its model must still exist.
        folder: made where it is missing; where it holds a TinyLoRA of PEFT, the two files are replaced.
        projection: whether P is written. Without it PEFT draws P again from its seed, which is right only for an
            adapter whose P came from PEFT.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder is a file, or holds other things than a TinyLoRA of PEFT.
        ValueError: a value is not finite, the model is gone, or P is to be left out and is not what PEFT would draw.
    """
    folder, model, config = Path(folder), model_of(adapter), adapter.config
    group_of = dict(zip(adapter.names, adapter.groups, strict=True))
    names = [name for name, _ in model.named_modules() if name in group_of]
    drawn = _is_drawn_by_peft(adapter, model, names)
    if not (projection or drawn):
        raise ValueError("PEFT would not draw this adapter's P from a seed; leave projection=True")
    groups = [group_of[name] for name in names]
    weight_tying = ratio_of_groups(groups)
    row_of = dict(zip(groups_of_ratio(len(names), weight_tying), groups, strict=True))
    settings = PeftSettings(
        peft_type="TINYLORA",
        peft_version="0.20.0",  # the first that reads this folder as every later one does
        projection_seed=config.seed if drawn else 42,
        r=config.rank,
        save_projection=projection,
        u=config.u,
        weight_tying=weight_tying,
        **settings_of_base(model, names),
    ).model_dump()
    check_free(folder, settings)
    vectors = storable(adapter.vectors, "fp32", "the folder")
    tensors = {f"base_model.tinylora_v.{theirs}": vectors[ours].clone() for theirs, ours in row_of.items()}
    for name in names:
        factors = adapter.factors(name)
        parts = {"A": factors.right, "B": factors.left} | ({"P": factors.projection} if projection else {})
        for letter, part in parts.items():
            tensors[f"base_model.model.{name}.tinylora_{letter}"] = storable(part, "fp32", name)
    write_folder(folder, settings, tensors)
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
    drawn again by its rule. A and B that are missing are computed again as PEFT would, and a warning says what is
    uncertain then.

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
    settings = read_settings(folder)
    vectors, parts, copies = read_tensors(folder)
    try:
        names = matched_modules(model, settings)
        _check_modules(model, names, parts)
        _check_copies(model, copies)
        group_of = dict(zip(names, groups_of_ratio(len(names), settings.weight_tying), strict=True))
        wanted = dict.fromkeys(group_of.values(), (settings.u,))
        if {group: tuple(vector.shape) for group, vector in vectors.items()} != wanted:
            shapes = ", ".join(f"{group}: {list(vectors[group].shape)}" for group in sorted(vectors)) or "none"
            raise ValueError(f"its settings ask for {len(wanted)} vectors of length {settings.u}; it holds {shapes}")
        targets = targets_of(model, names)
        if targets is None:
            raise ValueError(f"no list of names means exactly the modules of {settings.target_modules!r}")
        config = TinyLoraConfig(
            rank=settings.r,
            u=settings.u,
            seed=max(settings.projection_seed, 0),
            sigma="split",
            target_modules=targets,
            groups=[group_of[target.name] for target in find_target_modules(model, targets)],
            arithmetic="float32",
        )
        adapter = attach(model, config, factors=_factors(model, names, parts, settings, folder))
    except AdapterFileError:
        raise
    except ValueError as error:
        raise AdapterFileError(f"{folder} does not fit this model: {error}") from error
    for name in names:
        if not _is_singular(adapter.factors(name), dense_weight(model.get_submodule(name))):
            adapter.detach()
            raise AdapterFileError(
                f"{folder} was made for another base: its factors are no singular vectors of {name} in this one; "
                "load the base it was trained on"
            )
    with torch.no_grad():
        adapter.vectors.copy_(torch.stack([vectors[group] for group in sorted(vectors)]))
    return adapter


def _is_drawn_by_peft(adapter: TinyLoraAdapter, model: nn.Module, names: Sequence[str]) -> bool:
    c = adapter.config
    dtypes = (dense_weight(model.get_submodule(name)).dtype for name in names)
    return c.seed < 2**62 and all(
        torch.equal(adapter.factors(name).projection.cpu(), peft_projection(c.seed, index, c.u, c.rank, dtype))
        for index, (name, dtype) in enumerate(zip(names, dtypes, strict=True))
    )


def _check_modules(model: nn.Module, names: Sequence[str], parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    if hasattr(model, "peft_config"):
        raise ValueError("the model is wrapped by PEFT; give the base itself (model.unload() returns it)")
    if not names:
        raise ValueError("its target_modules name no module of this model")
    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise ValueError(f"it adapts {name}, a {type(module).__name__}; adapters here take torch.nn.Linear only")
    if foreign := sorted(parts.keys() - set(names)):
        raise ValueError(f"it holds factors of {foreign[0]}, which its target_modules do not name in this model")
    # All modules or none have A and B, and all or none have P.
    present = {letter for held in parts.values() for letter in held}
    needed = present | (set("AB") if present & set("AB") else set())
    for name in names:
        if missing := sorted(needed - parts.get(name, {}).keys()):
            raise ValueError(f"tinylora_{missing[0]} of {name} is missing in it")


def _check_copies(model: nn.Module, copies: Mapping[str, Tensor]) -> None:
    present = dict(model.named_parameters(remove_duplicate=False))
    for name, copy in copies.items():
        if name not in present or not torch.equal(present[name].detach().float().cpu(), copy):
            raise ValueError(f"it holds a {name} of its own, which differs from the model's; no adapter here holds one")


def _factors(
    model: nn.Module,
    names: Sequence[str],
    parts: Mapping[str, Mapping[str, Tensor]],
    settings: PeftSettings,
    folder: Path,
) -> dict[str, Factors]:
    first = parts.get(names[0], {})
    if "P" not in first:
        _check_version(settings.peft_version, folder)
    if "A" not in first:
        warnings.warn(
            f"{folder} holds no factors, so they are computed again; their signs depend on the machine's SVD, and "
            "where they differ from those of the training, the adapter computes something else",
            stacklevel=3,
        )
    elif "P" not in first:
        here, there = dense_weight(model.get_submodule(names[0])).dtype, _narrowest(first["A"])
        if here != there:
            now, then = (str(dtype).removeprefix("torch.") for dtype in (here, there))
            warnings.warn(
                f"{folder} was trained on a {then} base, to which PEFT rounded the P that it left out; P is rounded to "
                f"{now} now, as PEFT would do. Better load the base in {then}",
                stacklevel=3,
            )
    found = {}
    for index, name in enumerate(names):
        held = parts.get(name, {})
        # A quantized weight is made dense for this, so only where something is missing.
        weight = dense_weight(model.get_submodule(name)) if len(held) < 3 else held["A"]
        left, right = (held["B"], held["A"]) if "A" in held else peft_factors(weight, settings.r)
        P = held.get("P")
        if P is None:
            P = peft_projection(settings.projection_seed, index, settings.u, settings.r, weight.dtype)
        found[name] = Factors(left, right, P)
    return found


def _narrowest(A: Tensor) -> torch.dtype:
    """The dtype of the base that PEFT computed A on, and rounded A to."""
    return next((d for d in (torch.bfloat16, torch.float16) if torch.equal(A, A.to(d).float())), torch.float32)


def _check_version(version: object, folder: Path) -> None:
    number = re.match(r"(\d+)\.(\d+)", str(version))
    if number is None or (int(number[1]), int(number[2])) < (0, 20):
        raise AdapterFileError(
            f"{folder} holds no P and was written by {'an unknown PEFT' if version is None else f'PEFT {version}'}; "
            "before 0.20 PEFT drew P from a seed that was another one in every process (its pull request 3180), so "
            "P is lost. Save it with save_projection=True from the process that trained it, or train it again"
        )


def _is_singular(factors: Factors, weight: Tensor) -> bool:
    """Whether the first pair of factors is one of the weight's: ``W a ∝ b``, true of any placement of Σ."""
    image, b = F.linear(factors.right[:1].to(weight.dtype), weight)[0].float(), factors.left[:, 0]
    return bool(image @ b >= 0.5 * image.norm() * b.norm())
