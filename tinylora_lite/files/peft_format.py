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
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from tinylora_lite.files.file_format import AdapterFileError, base_name
from tinylora_lite.utils.files import atomic_write, cache_folder
from tinylora_lite.utils.record import base_gguf

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
IGNORED = {
    *("auto_mapping", "bias", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_v_bound", "init_weights"),
    *("layers_pattern", "layers_to_transform", "modules_to_save", "task_type"),
}
"""PEFT's settings that choose modules, which the tensors name as well, or that start a training."""


class PeftSettings(BaseModel):
    """The settings of PEFT's TinyLoRA that are read here, with PEFT's defaults."""

    model_config = ConfigDict(strict=True, extra="allow")

    peft_type: Literal["TINYLORA"]
    base_model_name_or_path: str | None = None
    peft_version: Any = None
    projection_seed: int = Field(default=42, gt=-(2**62), lt=2**62)
    r: int = Field(default=2, ge=1)
    revision: str | None = None
    save_projection: bool = True
    target_modules: Any = None
    u: int = Field(default=64, ge=1)
    weight_tying: float = Field(default=0.0, ge=0, le=1)


def read_settings(folder: Path) -> PeftSettings:
    """``adapter_config.json``; raises ``AdapterFileError`` where it is not that of such an adapter."""
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
    if isinstance(kind := stored_settings(folder).get("peft_type"), str) and kind != "TINYLORA":
        raise AdapterFileError(
            f"{folder} holds a {kind} adapter, not a TINYLORA; load it with peft.PeftModel.from_pretrained"
        )
    try:
        settings = PeftSettings.model_validate_json(path.read_bytes())
    except ValidationError as error:
        found = error.errors()[0]
        name = str(next(iter(found["loc"]), ""))
        what = f"it names no {name}" if found["type"] == "missing" else f"{name} is {found['input']!r}"
        raise AdapterFileError(f"{path} is damaged: {what if name else found['msg']}") from error
    extra = settings.model_extra or {}
    if (bias := extra.get("bias") or "none") != "none":  # which PEFT 0.20.0 does not even save
        raise AdapterFileError(
            f"{folder} was trained with bias={bias!r}, and no adapter here can hold biases of the base; load it with "
            "peft.PeftModel.from_pretrained"
        )
    if unknown := sorted(name for name in extra.keys() - IGNORED if extra[name]):
        warnings.warn(
            f"{path} sets {', '.join(unknown)}, which this version of tinylora_lite does not have and ignores; if it "
            "changes what PEFT computes (tinylora_dropout does so in training alone), the outputs differ",
            stacklevel=3,
        )
    return settings


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """``adapter_model.safetensors`` as it is; raises ``AdapterFileError`` where it is missing or damaged."""
    path = folder / TENSOR_FILE
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        cure = "only a pickle; save it again with safe_serialization=True" if pickled else "get the folder again"
        raise AdapterFileError(f"{folder} holds no {TENSOR_FILE}; {cure}")
    try:
        return safetensors.torch.load(path.read_bytes())
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{path} is damaged ({error})") from error


def read_tensors(folder: Path) -> tuple[dict[int, Tensor], dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """What ``adapter_model.safetensors`` holds; raises ``AdapterFileError`` where it is no TinyLoRA's.

    Returns:
        The vectors by group, as they are stored; as float32, of each module, by its name, the letters that the file
        holds, and copies of the base's own weights, by their names, as PEFT adds those of embeddings and heads.
    """
    path = folder / TENSOR_FILE
    vectors, parts, weights = {}, defaultdict[str, dict[str, Tensor]](dict), {}
    for key, tensor in stored_tensors(folder).items():
        if not torch.isfinite(tensor).all():
            raise AdapterFileError(f"{path}: {key} holds NaN or infinity; train it again")
        if match := re.fullmatch(r"base_model\.tinylora_v\.(\d{1,9})", key):
            vectors[int(match[1])] = tensor
        elif match := re.fullmatch(r"base_model\.model\.(.+)\.tinylora_([ABP])", key):
            parts[match[1]][match[2]] = tensor.float()
        elif match := re.fullmatch(r"base_model\.model\.(.+?)(?:\.base_layer)?\.weight", key):
            weights[f"{match[1]}.weight"] = tensor.float()
        else:
            raise AdapterFileError(f"{path} holds {key}, which no adapter here can hold")
    return vectors, parts, weights


def targets_of(model: nn.Module, names: Sequence[str]) -> list[str] | None:
    """The shortest list that means exactly these modules, to PEFT and to ``find_target_modules``, if there is any.

    The names are in the order of ``named_modules()``.
    """
    for targets in (list(dict.fromkeys(name.rpartition(".")[2] for name in names)), list(names)):
        ends = tuple(f".{target}" for target in targets)
        if [name for name, _ in model.named_modules() if f".{name}".endswith(ends)] == list(names):
            return targets
    return None


def settings_of_base(model: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    """What every kind of PEFT adapter says of its base: name, kind of model, and which modules are adapted."""
    ordered = [name for name, _ in model.named_modules() if name in names]
    # PEFT opens no GGUF file, and the folder of the dequantized one as it opens any other.
    config: Any = getattr(model, "config", None)
    kept = base_gguf(model) and cache_folder("gguf") is not None
    base = config._name_or_path if kept else base_name(model)
    return {
        "base_model_name_or_path": base or None,
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
    kind, stored = settings["peft_type"], stored_settings(folder)
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


def stored_settings(folder: Path) -> dict[str, Any]:
    """``adapter_config.json`` as it is; empty where it cannot be read."""
    try:
        stored = json.loads((folder / CONFIG_FILE).read_bytes())
    except (OSError, RecursionError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}
