"""The bytes of an adapter file: how they are checked, and how they name the base they belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from torch import Tensor, nn

from tinylora_lite.adapter.weights import quantization_of

FORMAT = "tinylora-adapter-1"
KEY = "tinylora"
FACTORS = ("left", "right", "projection")

Precision = Literal["fp32", "fp16", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class AdapterFileError(ValueError):
    """An adapter file that cannot be used, and why: damaged, foreign, edited, or made for another base."""


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a file that is what it was when it was written.

    Raises:
        FileNotFoundError: there is no such file.
        AdapterFileError: it is damaged, foreign or edited.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file at {path}; tl.save writes one")
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get(KEY, "null"))
            if not isinstance(header, dict):
                raise AdapterFileError(f"{path} is a safetensors file, but no adapter file of this library")
            found = header.get("format")
            if found != FORMAT:
                raise AdapterFileError(f"{path} has the format {found!r}, not {FORMAT!r}; upgrade tinylora_lite")
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        intact = header.get("checksum") == checksum(header, tensors)
    except AdapterFileError:
        raise
    except (safetensors.SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{path} is damaged or no adapter file ({error})") from error
    if not intact:
        raise AdapterFileError(f"{path} is damaged or was edited: its checksum does not fit its content; get it again")
    if not {"vectors", "decomposition"} <= tensors.keys():
        raise AdapterFileError(f"{path} holds no vectors or no decomposition")
    if tensors["vectors"].dtype not in DTYPES.values() or any(
        tensor.dtype != torch.float32 or not torch.isfinite(tensor).all()
        for name, tensor in tensors.items()
        if name != "vectors"
    ):
        raise AdapterFileError(f"{path} holds tensors of other dtypes than an adapter's, or NaN or infinity")
    if tensors["vectors"].ndim != 2 or not torch.isfinite(tensors["vectors"]).all():
        raise AdapterFileError(f"{path} holds no vectors of finite numbers")
    return header, tensors


def checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over a header (its own checksum aside) and all tensors, in hexadecimal."""
    kept = {key: value for key, value in header.items() if key != "checksum"}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def names_hash(names: tuple[str, ...]) -> str:
    """SHA-256 over the names of the adapted modules in tying order, in hexadecimal."""
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def base_name(model: nn.Module) -> str:
    """The name by which a model was loaded; of a local folder the last part alone; "" where it has none."""
    name = str(getattr(model, "name_or_path", "") or "")
    # A folder on the machine that saved is nobody's business and nobody's help.
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name


def base_dtype(model: nn.Module) -> str:
    """The dtypes of a model's parameters and what quantized them, for an error message."""
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    return ", ".join(sorted(dtypes | {kind for module in model.modules() if (kind := quantization_of(module))}))
