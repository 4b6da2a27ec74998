"""A PEFT adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors``.

A folder with a TinyLoRA, as PEFT 0.20 and later write it, holds of every module
``base_model.model.<name>.tinylora_A [r, in]``, ``tinylora_B [out, r]`` and (unless ``save_projection`` is false)
``tinylora_P [u, r, r]``; and the vectors that the modules share, ``base_model.tinylora_v.<group> [u]``.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from tinylora_lite.files.file_format import AdapterFileError, base_name
from tinylora_lite.files.peft_rules import PeftSettings, targets_of
from tinylora_lite.utils.record import atomic_write

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"


def read_settings(folder: Path) -> PeftSettings:
    """``adapter_config.json`` with PEFT's defaults filled in, checked to be one that this library can follow.

    Raises:
        FileNotFoundError: there is no such folder.
        AdapterFileError: the file is missing or damaged, of another kind of adapter, or asks for something unknown.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder at {folder}; import_peft reads one on this machine, so download it first "
            "(huggingface_hub.snapshot_download)"
        )
    path = folder / CONFIG_FILE
    if not path.is_file():
        below = ", ".join(sorted(found.parent.name for found in folder.glob(f"*/{CONFIG_FILE}")))
        advice = f"its subfolders {below} do; give one of them" if below else "PEFT's save_pretrained writes one"
        raise AdapterFileError(f"{folder} holds no {CONFIG_FILE}; {advice}")
    if isinstance(kind := kind_of(folder), str) and kind != "TINYLORA":
        raise AdapterFileError(
            f"{folder} holds a {kind} adapter, and import_peft reads TINYLORA only; "
            "load it with peft.PeftModel.from_pretrained"
        )
    try:
        settings = PeftSettings.model_validate_json(path.read_bytes())
    except ValidationError as error:
        found = error.errors()[0]
        name = str(next(iter(found["loc"]), ""))
        what = f"it names no {name}" if found["type"] == "missing" else f"{name} is {found['input']!r}"
        raise AdapterFileError(f"{path} is damaged: {what if name else found['msg']}") from error
    for name, trained in (("bias", settings.bias != "none"), ("modules_to_save", settings.modules_to_save)):
        if trained:
            raise AdapterFileError(
                f"{folder} holds trained weights of the base ({name}={getattr(settings, name)!r}), "
                "which no adapter here can hold; load it with peft.PeftModel.from_pretrained"
            )
    if settings.tinylora_dropout:
        warnings.warn(
            f"{folder} was trained with tinylora_dropout={settings.tinylora_dropout}; here no dropout is applied, "
            "which makes a difference to further training only",
            stacklevel=3,
        )
    if unknown := sorted(name for name, value in (settings.model_extra or {}).items() if value):
        warnings.warn(
            f"{path} sets {', '.join(unknown)}, unknown to this version of tinylora_lite and ignored; if it "
            "changes what PEFT computes, the outputs differ. Compare them, or upgrade tinylora_lite",
            stacklevel=3,
        )
    return settings


class Tensors(NamedTuple):
    """What ``adapter_model.safetensors`` holds, all float32.

    Attributes:
        vectors: by group, ``[u]``.
        parts: of each module, by its name, ``"A"``, ``"B"`` and ``"P"``, as far as the file holds them.
        weights: copies of the base's own weights, by their names; PEFT adds those of embeddings and heads.
    """

    vectors: dict[int, Tensor]
    parts: dict[str, dict[str, Tensor]]
    weights: dict[str, Tensor]


def read_tensors(folder: Path) -> Tensors:
    """Reads ``adapter_model.safetensors``.

    Raises:
        AdapterFileError: the file is missing or damaged, or holds other things than such an adapter.
    """
    path = folder / TENSOR_FILE
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        cure = "only a pickle; save it again with safe_serialization=True" if pickled else "get the folder again"
        raise AdapterFileError(f"{folder} holds no {TENSOR_FILE}; {cure}")
    try:
        tensors = safetensors.torch.load(path.read_bytes())
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{path} is damaged ({error})") from error
    found = Tensors({}, defaultdict(dict), {})
    for key, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise AdapterFileError(f"{path}: {key} is {tensor.dtype}; float32, bfloat16 and float16 are read")
        if not torch.isfinite(tensor).all():
            raise AdapterFileError(f"{path}: {key} holds NaN or infinity; train it again")
        if match := re.fullmatch(r"base_model\.tinylora_v\.(0|[1-9]\d{0,8})", key):
            found.vectors[int(match[1])] = tensor.float()
        elif match := re.fullmatch(r"base_model\.model\.(.+)\.tinylora_([ABP])", key):
            found.parts[match[1]][match[2]] = tensor.float()
        elif match := re.fullmatch(r"base_model\.model\.(.+?)(?:\.base_layer)?\.weight", key):
            found.weights[f"{match[1]}.weight"] = tensor.float()
        else:
            raise AdapterFileError(f"{path} holds {key}, which is no part of a TinyLoRA adapter and cannot be left out")
    return found


def settings_of_base(model: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    """What every kind of PEFT adapter says of its base: name, kind of model, and which modules are adapted.

    Args:
        model: the base.
        names: of the adapted modules, in any order.
    """
    ordered = [name for name, _ in model.named_modules() if name in names]
    return {
        "base_model_name_or_path": base_name(model) or None,
        "target_modules": targets_of(model, ordered) or "|".join(map(re.escape, ordered)),
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
    }


def check_free(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises ``FileExistsError`` where an export with these settings would overwrite something else.

    An adapter of PEFT's TinyLoRA may be replaced, and a LoRA only where an export wrote it: PEFT itself writes more
    settings and more files, so a LoRA that somebody trained is never replaced.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    kind, stored = settings["peft_type"], _stored_settings(folder)
    files = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    ours = files == {CONFIG_FILE, TENSOR_FILE} and stored.keys() == settings.keys()
    if stored.get("peft_type") != kind or (kind == "LORA" and not ours):
        raise FileExistsError(f"{folder} exists and is no {kind} folder that may be replaced; name a new one")


def write_folder(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Writes both files; a new folder appears whole or not at all, and equal contents give equal bytes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
        new = Path(beside) / "new"
        atomic_write(new / TENSOR_FILE, safetensors.torch.save(dict(tensors), {"format": "pt"}))
        atomic_write(new / CONFIG_FILE, json.dumps(settings, indent=2, sort_keys=True))
        if folder.exists():
            for name in (TENSOR_FILE, CONFIG_FILE):
                os.replace(new / name, folder / name)
        else:
            new.rename(folder)
    return folder


def kind_of(folder: Path) -> Any:
    """The ``peft_type`` that a folder's configuration names, ``None`` where there is none."""
    return _stored_settings(folder).get("peft_type")


def _stored_settings(folder: Path) -> dict[str, Any]:
    try:
        stored = json.loads((folder / CONFIG_FILE).read_bytes())
    except (OSError, RecursionError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}
