"""Adapter files: a few numbers, and everything that says which model and which directions they belong to.

A file is safetensors, never pickle. What only the base can hold (its weights, their SVD) is not stored but
checked: numbers that were trained on one base mean nothing on another, and loading them there would go wrong
without a sign. The checks find accidents and careless edits; a file is not signed.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from tinylora_lite.adapter.adapter import TinyLoraAdapter, attach
from tinylora_lite.adapter.basis import Basis, load_basis
from tinylora_lite.adapter.config import TinyLoraConfig
from tinylora_lite.adapter.factors import Factors
from tinylora_lite.adapter.fingerprint import base_fingerprint, decomposition
from tinylora_lite.adapter.tying import find_sites
from tinylora_lite.files.file_format import (
    DTYPES,
    FACTORS,
    FORMAT,
    KEY,
    AdapterFileError,
    Precision,
    base_dtype,
    base_name,
    checksum,
    names_hash,
    read_file,
)

SHIPPED_BASES = Path(__file__).parents[1] / "nano" / "directions"


def save(
    adapter: TinyLoraAdapter,
    path: str | Path,
    dtype: Precision = "bf16",
    *,
    factors: bool | Literal["auto"] = "auto",
    base_sha256: str | None = None,
) -> Path:
    """Writes an adapter; the file appears whole or not at all, and saving the same adapter twice gives equal bytes.

    The file holds ``vectors``, ``[groups, u]`` in ``dtype`` (the adapter keeps its float32 numbers;
    :func:`storage_loss` says what rounding takes), and ``decomposition``, ``[modules, 3]`` float32: of every adapted
    weight the singular values beside the cut and a number that the singular vectors and P determine, so that
    :func:`load` notices where another machine decomposes a weight differently. Beside them: the settings and the
    seed, a hash of the modules' names, the base's name, revision where the hub named one, and
    :func:`~tinylora_lite.adapter.fingerprint.base_fingerprint`, the fingerprint of a calibrated basis, and a checksum.
    13 numbers take 26 bytes, and their file less than 4 KiB on a model of 7 billion weights.

    The frozen factors are computed from the base again when the file is loaded. Where singular values near the cut
    are equal, machines disagree about them, and v alone would mean something else elsewhere: ``save`` then warns and
    stores the factors of those modules too, 4 bytes for each of their ``r · (in + out) + u r²`` numbers.

    Args:
        adapter: attached or detached; its model must still exist.
        path: of the file; its folder is made.
        dtype: ``"bf16"`` (the paper's, 2 bytes a number), ``"fp16"`` or ``"fp32"``.
        factors: whose factors to store: ``"auto"``, of modules where others would compute different ones; ``True``,
            of all, and loading takes no SVD; ``False``, of none.
        base_sha256: the base's fingerprint where it is known already: hashing 15 GB takes 20 seconds, and a training
            run saves often.

    Raises:
        ValueError: an unknown dtype, a number that is not finite or that ``dtype`` cannot hold, the model is gone, or
            ``factors=False`` for an adapter whose factors were given to it (one from PEFT, say).
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(get_args(Precision))}, not {dtype!r}")
    model = adapter._model()
    if model is None:
        raise ValueError("the adapter's model no longer exists, so the file could not name it; save before deleting it")
    vectors = adapter.vectors.detach().cpu().to(DTYPES[dtype])
    if not torch.isfinite(vectors).all():
        finite = torch.isfinite(adapter.vectors).all()
        held = f"numbers too large for {dtype}; save as fp32" if finite else "NaN or infinite numbers; train it again"
        raise ValueError(f"the adapter holds {held}")
    tensors = {"vectors": vectors.contiguous(), "decomposition": decomposition(adapter)}
    for index in _stored_factors(adapter, factors):
        stored = adapter.factors(adapter.names[index])
        for part in FACTORS:
            # A clone: two modules may share a given factor, and safetensors writes no memory twice.
            tensors[f"{part}.{index}"] = getattr(stored, part).detach().cpu().contiguous().clone()
    header = {
        "format": FORMAT,
        "settings": _settings(adapter.config),
        "modules": names_hash(adapter.names),
        "base": base_name(model),
        "base_revision": getattr(getattr(model, "config", None), "_commit_hash", None),
        "base_sha256": base_sha256 or base_fingerprint(model),
        "base_dtype": base_dtype(model),
    }
    header["checksum"] = checksum(header, tensors)
    # One entry: safetensors writes several in an order of the moment.
    content = safetensors.torch.save(tensors, {KEY: json.dumps(header, sort_keys=True)})
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load(
    model: nn.Module,
    path: str | Path,
    basis: Basis | str | Path | None = None,
    *,
    cache: str | Path | None = None,
) -> TinyLoraAdapter:
    """Attaches the adapter that :func:`save` wrote.

    Args:
        model: the base it was trained on, in the dtype it was trained in or a wider one.
        path: of the file.
        basis: where the directions of a calibrated adapter are: a :class:`~tinylora_lite.Basis`, its file, or a
            folder that holds its file; ``None`` looks beside the adapter and among those that come with the package.
        cache: of decompositions; see :func:`~tinylora_lite.attach`.

    Returns:
        The adapter; its ``vectors`` are float32, equal to the stored numbers.

    Raises:
        FileNotFoundError: there is no such file.
        AdapterFileError: the file is damaged, foreign or edited, was made for another base, or its basis is not found.
            The model is untouched then.
    """
    path = Path(path)
    header, tensors = read_file(path)
    vectors = tensors["vectors"].float()
    try:
        settings = dict(header["settings"])
        if settings.keys() != {field.name for field in fields(TinyLoraConfig)}:
            raise ValueError(f"its settings are {', '.join(map(str, settings))}")
        if settings["u"] != vectors.shape[1]:
            raise ValueError(f"vectors of shape {tuple(vectors.shape)} with u={settings['u']}")
        names = tuple(site.name for site in find_sites(model, settings["target_modules"]))
        _check_base(path, model, names, header)
        if settings["projection"] not in ("random", "identity"):
            settings["projection"] = find_basis(settings["projection"], basis, path)
        given = _stored_in(tensors, names)
        adapter = attach(model, TinyLoraConfig(**settings), factors=given, cache=cache)
    except AdapterFileError:
        raise
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{path} does not fit this model: {error}") from error
    try:
        if vectors.shape != adapter.vectors.shape:
            raise AdapterFileError(
                f"{path} holds vectors of shape {tuple(vectors.shape)}; "
                f"its settings ask for {tuple(adapter.vectors.shape)}"
            )
        _check_decomposition(path, adapter, tensors["decomposition"])
    except AdapterFileError:
        adapter.detach()
        raise
    with torch.no_grad():
        adapter.vectors.copy_(vectors)
    return adapter


def storage_loss(adapter: TinyLoraAdapter, dtype: Precision = "bf16") -> float:
    """What storing v in a dtype takes from it: the norm of the rounding error over the norm of v; 0 for v = 0."""
    v = adapter.vectors.detach().double().cpu()
    rounded = v.to(DTYPES[dtype]).double()
    return float((rounded - v).norm() / v.norm()) if v.any() else 0.0


def _stored_factors(adapter: TinyLoraAdapter, factors: bool | Literal["auto"]) -> list[int]:
    if factors not in (True, False, "auto"):
        raise ValueError(f'factors must be True, False or "auto", not {factors!r}')
    if factors is False and adapter.given:
        raise ValueError(
            f"the factors of {len(adapter.given)} modules were given, and no base could give them back; "
            'leave factors at "auto"'
        )
    doubtful = [name for name in adapter.names if name not in adapter.given and not adapter.factors(name).portable]
    if doubtful and factors is not True:
        others = f" (and of {len(doubtful) - 1} others)" if len(doubtful) > 1 else ""
        warnings.warn(
            f"singular values of {doubtful[0]}{others} are too close for the same vectors on every machine; "
            + ("the file may not load elsewhere" if factors is False else "its factors are stored too"),
            stacklevel=3,
        )
    wanted = {"auto": adapter.given | set(doubtful), True: set(adapter.names), False: set()}[factors]
    return [index for index, name in enumerate(adapter.names) if name in wanted]


def _stored_in(tensors: Mapping[str, Tensor], names: tuple[str, ...]) -> dict[str, Factors]:
    indices = sorted({int(key.partition(".")[2]) for key in tensors if key not in ("vectors", "decomposition")})
    wanted = {f"{part}.{index}" for part in FACTORS for index in indices if index >= 0}
    if wanted != tensors.keys() - {"vectors", "decomposition"}:
        raise ValueError(f"it holds tensors that are no adapter's: {', '.join(sorted(tensors))}")
    return {
        names[index]: Factors(tensors[f"left.{index}"], tensors[f"right.{index}"], tensors[f"projection.{index}"])
        for index in indices
    }


def _settings(config: TinyLoraConfig) -> dict[str, Any]:
    settings = {field.name: getattr(config, field.name) for field in fields(config)}
    for name in ("target_modules", "groups"):
        if settings[name] is not None:
            settings[name] = list(settings[name])
    if isinstance(config.projection, Basis):
        settings["projection"] = config.projection.fingerprint()
    return settings


def _check_decomposition(path: Path, adapter: TinyLoraAdapter, stored: Tensor) -> None:
    here = decomposition(adapter)
    if stored.shape != here.shape:
        raise AdapterFileError(
            f"{path} is damaged: it describes its weights by a table of {list(stored.shape)}, not {list(here.shape)}"
        )
    # What float32 and an early stop of the SVD's iteration move stays far below; a flipped sign lies far above.
    apart = (stored - here).abs()
    # Given factors have no singular values, and were read from this very file.
    computed = torch.tensor([name not in adapter.given for name in adapter.names])
    wrong = (computed & (apart[:, :2] > 1e-2 * here[:, :1]).any(dim=1)) | (apart[:, 2] > 0.01)
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise AdapterFileError(
            f"{path} was trained on another decomposition of {adapter.names[index]} than this machine computes (its "
            f"singular values near the cut, {here[index, 0]:.6g} and {here[index, 1]:.6g}, may be too close); save it "
            "with factors=True where it was trained, or use its LoRA export"
        )


def _check_base(path: Path, model: nn.Module, names: tuple[str, ...], header: Mapping[str, Any]) -> None:
    made_for = f"{path} was made for {header['base'] or 'a model without a name'}"
    if names_hash(names) != header["modules"]:
        raise AdapterFileError(f"{made_for}, whose adapted modules are others than the {len(names)} of this model")
    if base_fingerprint(model) != header["base_sha256"]:
        here, there = base_dtype(model), header["base_dtype"]
        cure = f"load that base in {there}, not in {here}" if here != there else "load the base it was trained on"
        raise AdapterFileError(f"{made_for}, and this model's weights differ from that base's; {cure}")


def find_basis(wanted: str, given: Basis | str | Path | None, path: Path) -> Basis:
    """The calibrated basis with a fingerprint, for the adapter file at ``path``; see :func:`load`.

    Raises:
        AdapterFileError: it is not there.
    """
    if isinstance(given, Basis):
        if given.fingerprint() == wanted:
            return given
        raise AdapterFileError(f"{path} needs the basis {wanted[:12]}…; the one given is {given.fingerprint()[:12]}…")
    if given is None:
        candidates = [*sorted(path.parent.glob("*.safetensors")), *sorted(SHIPPED_BASES.glob("*.safetensors"))]
        searched = "beside it and in the package"
    else:
        candidates = sorted(Path(given).glob("*.safetensors")) if Path(given).is_dir() else [Path(given)]
        searched = f"at {given}"
    for candidate in candidates:
        try:
            basis = load_basis(candidate)
        except (FileNotFoundError, ValueError) as error:
            if given is not None and len(candidates) == 1:
                raise AdapterFileError(f"{path} needs a calibrated basis: {error}") from error
            continue
        if basis.fingerprint() == wanted:
            return basis
    raise AdapterFileError(f"{path} needs the calibrated basis {wanted[:12]}…, not found {searched}; pass it as basis=")
