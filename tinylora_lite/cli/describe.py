"""What an adapter file or folder holds, read without its base: JSON values, under the same keys for all kinds."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tinylora_lite.files.basis import find_basis
from tinylora_lite.files.file_format import DTYPES, AdapterFileError, read_file
from tinylora_lite.files.peft_format import CONFIG_FILE, TENSOR_FILE, kind_of, read_settings, read_tensors

TINYLORA, PEFT_TINYLORA = "tinylora", "PEFT TINYLORA"

VALUES = 1024
"""So many numbers of v at most stand in a description; of more, only their norm and their extremes."""

SHORT = {dtype: short for short, dtype in DTYPES.items()}
_PEFT_SETTINGS = ("r", "u", "weight_tying", "projection_seed", "save_projection", "target_modules", "peft_version")


def describe(path: Path, basis: Path | None = None) -> dict[str, Any]:
    """What stands in an adapter file of this library, or in a folder of PEFT.

    Args:
        path: of the file or folder.
        basis: where a calibrated basis is looked for, as :func:`~tinylora_lite.load` takes it.

    Returns:
        ``file``, ``kind`` (``"tinylora"``, or ``"PEFT …"`` with PEFT's name of the kind), ``parameters``, ``dtype``,
        ``bytes``, ``settings`` and ``base``. Of a TinyLoRA also ``payload_bytes`` (of the numbers alone), ``vectors``,
        ``modules`` and ``stored_factors``: the places in tying order of the modules whose factors are stored, or in a
        folder their names. Of a file also ``format``, ``basis`` and ``checksum``.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        AdapterFileError: it is damaged, edited or foreign, or ``basis`` is not the one that it needs.
    """
    if not path.is_dir():
        return {"file": str(path)} | _file(path, basis)
    kind = kind_of(path)
    # Where no kind can be read, reading the settings says what is wrong.
    is_foreign = isinstance(kind, str) and kind != "TINYLORA"
    return {"file": str(path)} | (_foreign(path, kind) if is_foreign else _folder(path))


def _file(path: Path, basis: Path | None) -> dict[str, Any]:
    header, tensors = read_file(path)
    try:
        settings, vectors = header["settings"], tensors["vectors"]
        base = {"name": header["base"] or None, "revision": header.get("base_revision")}
        base |= {"dtype": header["base_dtype"], "sha256": header["base_sha256"]}
        calibrated = settings["projection"] not in ("random", "identity")
        return {
            "kind": TINYLORA,
            "format": header["format"],
            "checksum": "verified",
            "parameters": vectors.numel(),
            "dtype": _dtypes([vectors]),
            "payload_bytes": vectors.nbytes,
            "bytes": path.stat().st_size,
            "vectors": _vectors(vectors.float()),
            "settings": {name: value for name, value in settings.items() if value is not None},
            "basis": _basis(settings["projection"], basis, path) if calibrated else None,
            "modules": len(tensors["decomposition"]),
            "stored_factors": sorted(int(key.partition(".")[2]) for key in tensors if key.startswith("left.")),
            "base": base,
        }
    except AdapterFileError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{path} is no complete adapter file ({error!r}); save it again") from error


def _basis(fingerprint: str, given: Path | None, path: Path) -> dict[str, Any]:
    try:
        find_basis(fingerprint, given, path)
    except AdapterFileError:
        if given is not None:
            raise
        return {"fingerprint": fingerprint, "found": False}
    return {"fingerprint": fingerprint, "found": True}


def _folder(folder: Path) -> dict[str, Any]:
    settings = read_settings(folder).model_dump()
    held = read_tensors(folder)
    if not held.vectors:
        raise AdapterFileError(f"{folder} holds no vectors")
    try:
        vectors = torch.stack([held.vectors[group] for group in sorted(held.vectors)])
    except RuntimeError as error:
        raise AdapterFileError(f"{folder} holds vectors of different lengths") from error
    stored = [tensor for key, tensor in _stored(folder).items() if ".tinylora_v." in key]
    return {
        "kind": PEFT_TINYLORA,
        "parameters": vectors.numel(),
        "dtype": _dtypes(stored),
        "payload_bytes": sum(tensor.nbytes for tensor in stored),
        "bytes": _bytes(folder),
        "vectors": _vectors(vectors),
        "settings": {name: settings[name] for name in _PEFT_SETTINGS if settings[name] is not None},
        "modules": len(held.parts) or None,
        "stored_factors": [name for name, parts in held.parts.items() if "A" in parts],
        "base": {"name": settings["base_model_name_or_path"], "revision": settings["revision"]},
    }


def _foreign(folder: Path, kind: str) -> dict[str, Any]:
    settings = json.loads((folder / CONFIG_FILE).read_bytes())
    stored = _stored(folder).values()
    named = {name: settings[name] for name in ("r", "lora_alpha", "target_modules") if settings.get(name) is not None}
    return {
        "kind": f"PEFT {kind}",
        "parameters": sum(tensor.numel() for tensor in stored) if stored else None,
        "dtype": _dtypes(stored) or None,
        "bytes": _bytes(folder),
        "settings": named,
        "base": {"name": settings.get("base_model_name_or_path"), "revision": settings.get("revision")},
    }


def _vectors(vectors: Tensor) -> dict[str, Any]:
    return {
        "shape": list(vectors.shape),
        "norm": float(vectors.double().norm()),
        "smallest": float(vectors.min()),
        "largest": float(vectors.max()),
        "values": vectors.tolist() if vectors.numel() <= VALUES else None,
    }


def _stored(folder: Path) -> dict[str, Tensor]:
    """The tensors of a PEFT folder as they lie there; none where PEFT wrote a pickle."""
    path = folder / TENSOR_FILE
    try:
        return safetensors.torch.load_file(path) if path.is_file() else {}
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterFileError(f"{path} is damaged ({error}); get the folder again") from error


def _dtypes(tensors: Iterable[Tensor]) -> str:
    return ", ".join(sorted({SHORT.get(tensor.dtype, str(tensor.dtype)) for tensor in tensors}))


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("adapter_*") if path.is_file())
