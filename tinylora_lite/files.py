"""Adapter files: a few numbers, and everything that says which model and which directions they belong to.

A file is safetensors, never pickle. What only the base can hold (its weights, their SVD) is not stored but
checked: numbers that were trained on one base mean nothing on another, and loading them there would go wrong
without a sign. The checks find accidents and careless edits; a file is not signed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from tinylora_lite.adapter import TinyLoraAdapter, attach
from tinylora_lite.basis import Basis, load_basis
from tinylora_lite.config import TinyLoraConfig
from tinylora_lite.fingerprint import base_fingerprint, decomposition
from tinylora_lite.tying import find_sites

FORMAT = "tinylora-adapter-1"
KEY = "tinylora"
SHIPPED_BASES = Path(__file__).parent / "nano" / "checkpoints"

Precision = Literal["fp32", "fp16", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class AdapterFileError(ValueError):
    """An adapter file that cannot be used, and why: damaged, foreign, edited, or made for another base."""


def save(adapter: TinyLoraAdapter, path: str | Path, dtype: Precision = "bf16") -> Path:
    """Writes an adapter; the file appears whole or not at all, and equal adapters give equal bytes.

    The file holds ``vectors``, ``[groups, u]`` in ``dtype`` (the adapter keeps its float32 numbers), and
    ``decomposition``, ``[modules, 2]`` float32: of every adapted weight the last kept singular value, the one at
    the cut, and a number that the singular vectors and P determine, so that :func:`load` notices where another
    machine decomposes a weight differently. Beside them: the settings and the seed, a hash of the modules' names,
    the base's name, its :func:`~tinylora_lite.fingerprint.base_fingerprint`, the fingerprint of a calibrated basis,
    and a checksum. 13 numbers take 26 bytes, and their file less than 4 KiB on a model of 7 billion weights.

    Args:
        adapter: attached or detached; its model must still exist.
        path: of the file; its folder is made.
        dtype: ``"bf16"`` (the paper's, 2 bytes a number), ``"fp16"`` or ``"fp32"``.

    Raises:
        ValueError: an unknown dtype, a number that is not finite or that ``dtype`` cannot hold, or the model is gone.
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
    header = {
        "format": FORMAT,
        "settings": _settings(adapter.config),
        "modules": _names_hash(adapter.names),
        "base": _base_name(model),
        "base_sha256": base_fingerprint(model),
        "base_dtype": _base_dtype(model),
    }
    header["checksum"] = _checksum(header, tensors)
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


def load(model: nn.Module, path: str | Path, basis: Basis | str | Path | None = None) -> TinyLoraAdapter:
    """Attaches the adapter that :func:`save` wrote.

    Args:
        model: the base it was trained on, in the dtype it was trained in or a wider one.
        path: of the file.
        basis: where the directions of a calibrated adapter are: a :class:`~tinylora_lite.basis.Basis`, its file, or a
            folder that holds its file; ``None`` looks beside the adapter and among those that come with the package.

    Returns:
        The adapter; its ``vectors`` are float32, equal to the stored numbers.

    Raises:
        FileNotFoundError: there is no such file.
        AdapterFileError: the file is damaged, foreign or edited, was made for another base, or its basis is not found.
            The model is untouched then.
    """
    path = Path(path)
    header, tensors = _read(path)
    vectors = tensors["vectors"].float()
    try:
        settings = dict(header["settings"])
        if settings["u"] != vectors.shape[1]:
            raise ValueError(f"vectors of shape {tuple(vectors.shape)} with u={settings['u']}")
        names = tuple(site.name for site in find_sites(model, settings["target_modules"]))
        _check_base(path, model, names, header)
        if settings["projection"] not in ("random", "identity"):
            settings["projection"] = _find_basis(settings["projection"], basis, path)
        adapter = attach(model, TinyLoraConfig(**settings))
    except AdapterFileError:
        raise
    except (KeyError, TypeError, ValueError) as error:
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


def _settings(config: TinyLoraConfig) -> dict[str, Any]:
    settings = {field.name: getattr(config, field.name) for field in fields(config)}
    if settings["target_modules"] is not None:
        settings["target_modules"] = list(settings["target_modules"])
    if isinstance(config.projection, Basis):
        settings["projection"] = config.projection.fingerprint()
    return settings


def _names_hash(names: tuple[str, ...]) -> str:
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def _base_name(model: nn.Module) -> str:
    name = str(getattr(model, "name_or_path", "") or "")
    # A folder on the machine that saved is nobody's business and nobody's help.
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name


def _base_dtype(model: nn.Module) -> str:
    return ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}))


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    kept = {key: value for key, value in header.items() if key != "checksum"}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_decomposition(path: Path, adapter: TinyLoraAdapter, stored: Tensor) -> None:
    here = decomposition(adapter)
    if stored.shape != here.shape:
        raise AdapterFileError(f"{path} is damaged: it describes {len(stored)} weights of {len(here)}")
    # What float32 and an early stop of the SVD's iteration move stays far below; a flipped sign lies far above.
    wrong = ((stored[:, 0] - here[:, 0]).abs() > 1e-2 * here[:, 0]) | ((stored[:, 1] - here[:, 1]).abs() > 0.05)
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise AdapterFileError(
            f"{path} was trained on another decomposition of {adapter.names[index]} than this machine computes (its "
            f"singular values near the cut, {here[index, 0]:.4g}, may be too close); use its LoRA export instead"
        )


def _check_base(path: Path, model: nn.Module, names: tuple[str, ...], header: Mapping[str, Any]) -> None:
    made_for = f"{path} was made for {header['base'] or 'a model without a name'}"
    if _names_hash(names) != header["modules"]:
        raise AdapterFileError(f"{made_for}, whose adapted modules are others than the {len(names)} of this model")
    if base_fingerprint(model) != header["base_sha256"]:
        here, there = _base_dtype(model), header["base_dtype"]
        cure = f"load that base in {there}, not in {here}" if here != there else "load the base it was trained on"
        raise AdapterFileError(f"{made_for}, and this model's weights differ from that base's; {cure}")


def _find_basis(wanted: str, given: Basis | str | Path | None, path: Path) -> Basis:
    if isinstance(given, Basis):
        if given.fingerprint() == wanted:
            return given
        raise AdapterFileError(f"{path} needs the basis {wanted[:12]}…; the one given is {given.fingerprint()[:12]}…")
    if given is None:
        candidates = [*sorted(path.parent.glob("*.safetensors")), *sorted(SHIPPED_BASES.glob("*/basis.safetensors"))]
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


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file at {path}; tl.save writes one")
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get(KEY, "null"))
            if not isinstance(header, dict):
                raise AdapterFileError(f"{path} is a safetensors file, but no adapter file of this library")
            found = header.get("format")
            if found != FORMAT:
                raise AdapterFileError(f"{path} has the format {found}, not {FORMAT}; upgrade tinylora_lite")
            tensors = {name: file.get_tensor(name).clone() for name in ("vectors", "decomposition")}
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise AdapterFileError(f"{path} is damaged or no adapter file ({error})") from error
    if header.get("checksum") != _checksum(header, tensors):
        raise AdapterFileError(f"{path} is damaged or was edited: its checksum does not fit its content; get it again")
    if tensors["vectors"].ndim != 2 or not torch.isfinite(tensors["vectors"]).all():
        raise AdapterFileError(f"{path} holds no vectors of finite numbers")
    return header, tensors
