"""The bytes of this library's files: how values are stored and checked, and how an adapter's file names its base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
import torch
from torch import Tensor, nn

from tinylora_lite.adapter.adapter import TinyLoraAdapter
from tinylora_lite.adapter.weights import quantization_of
from tinylora_lite.utils.files import atomic_write

FORMAT = "tinylora-adapter-1"
KEY = "tinylora"
"""The one entry of the metadata, because safetensors writes several in a random order."""
FACTORS = ("left", "right", "projection")

Precision = Literal["fp32", "fp16", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class AdapterFileError(ValueError):
    """An adapter file that cannot be used, and why: damaged, foreign, edited, or made for another base."""


def write_safetensors(path: str | Path, header: Mapping[str, Any], tensors: dict[str, Tensor]) -> Path:
    """Writes safetensors with a header; the file appears whole or not at all, and equal contents give equal bytes."""
    return atomic_write(path, safetensors.torch.save(tensors, {KEY: json.dumps(header, sort_keys=True)}))


def read_safetensors(path: Path, form: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What :func:`write_safetensors` wrote; raises ``ValueError`` where the file is damaged or of another format.

    Of other files, which may be checkpoints of many gigabytes, only the header is read.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get(KEY, "{}"))
            if (found := header.get("format")) != form:
                raise ValueError(f"its format is {found!r}, not {form!r}; a later tinylora_lite may know it")
            # Clones: the tensors themselves are the file's memory, and change when somebody writes there.
            return header, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, AttributeError, RuntimeError, TypeError) as error:
        raise ValueError(str(error)) from error


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of an adapter file; raises ``AdapterFileError`` where it is not what was written."""
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file at {path}; tl.save writes one")
    try:
        header, tensors = read_safetensors(path, FORMAT)
    except ValueError as error:
        raise AdapterFileError(f"{path} is damaged or no adapter file of this library ({error})") from error
    if header.get("checksum") != checksum(header, tensors):
        raise AdapterFileError(f"{path} is damaged or was edited: its checksum does not fit its content; get it again")
    kinds = {"base": str, "base_sha256": str, "modules": str, "settings": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(header.get(name), kind)]
    wrong += [name for name in ("vectors", "decomposition") if name not in tensors or tensors[name].ndim != 2]
    wrong += [n for n, t in tensors.items() if t.dtype not in DTYPES.values() or not torch.isfinite(t).all()]
    if wrong:
        raise AdapterFileError(f"{path} lacks {', '.join(wrong)}, or it is not finite or of a bad type; save it again")
    return header, tensors


def storable(tensor: Tensor, dtype: Precision, what: str) -> Tensor:
    """The values of a tensor in the dtype of a file, on the CPU; raises ``ValueError`` where it cannot hold them.

    In memory of their own: two modules may share a given factor, and safetensors writes no memory twice.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(get_args(Precision))}, not {dtype!r}")
    stored = tensor.detach().cpu().to(DTYPES[dtype]).contiguous().clone()
    if not torch.isfinite(stored).all():
        finite = torch.isfinite(tensor).all()
        problem = f"values too large for {dtype}; use fp32" if finite else "NaN or infinity; train the adapter again"
        raise ValueError(f"{what} would hold {problem}")
    return stored


def model_of(adapter: TinyLoraAdapter) -> nn.Module:
    """The model that an adapter was attached to. Raises ``ValueError`` where it no longer exists."""
    model = adapter._model()
    if model is None:
        raise ValueError("the adapter's model no longer exists; keep the model until the adapter is written or merged")
    return model


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
    # The path of a local folder means nothing on another machine and may be private.
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name


def base_dtype(model: nn.Module) -> str:
    """The dtypes of a model's parameters and what quantized them, for an error message."""
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    return ", ".join(sorted(dtypes | {kind for module in model.modules() if (kind := quantization_of(module))}))
