"""A PEFT adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors``, read with suspicion, written whole.

What stands in one of TinyLoRA, for PEFT 0.20 and later: of every module ``base_model.model.<name>.tinylora_A [r, in]``,
``tinylora_B [out, r]`` and (unless ``save_projection`` is false) ``tinylora_P [u, r, r]``; and the vectors that the
modules share, ``base_model.tinylora_v.<group> [u]``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tinylora_lite.files.file_format import AdapterFileError

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"

DEFAULTS: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_v_bound": 0.02,
    "init_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "modules_to_save": None,
    "peft_type": "TINYLORA",
    "peft_version": None,
    "projection_seed": 42,
    "r": 2,
    "revision": None,
    "save_projection": True,
    "target_modules": None,
    "task_type": None,
    "tinylora_dropout": 0.0,
    "u": 64,
    "weight_tying": 0.0,
}
"""The settings of PEFT's TinyLoRA, and what PEFT takes where one is missing."""


def read_settings(folder: Path) -> dict[str, Any]:
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
    try:
        stored = json.loads(path.read_bytes())
    except (RecursionError, ValueError) as error:
        raise AdapterFileError(f"{path} is damaged: no JSON ({error})") from error
    if not isinstance(stored, dict) or not isinstance(stored.get("peft_type"), str):
        raise AdapterFileError(f"{path} is no configuration of a PEFT adapter: it names no peft_type")
    if stored["peft_type"] != "TINYLORA":
        raise AdapterFileError(
            f"{folder} holds a {stored['peft_type']} adapter, and import_peft reads TINYLORA only; "
            "load it with peft.PeftModel.from_pretrained"
        )
    settings = DEFAULTS | stored
    for name, fits in (
        ("r", _is_whole(settings["r"]) and settings["r"] >= 1),
        ("u", _is_whole(settings["u"]) and settings["u"] >= 1),
        ("projection_seed", _is_whole(settings["projection_seed"]) and abs(settings["projection_seed"]) < 2**62),
        ("weight_tying", isinstance(settings["weight_tying"], int | float) and 0 <= settings["weight_tying"] <= 1),
        ("tinylora_dropout", isinstance(settings["tinylora_dropout"], int | float)),
        ("target_modules", _are_names(settings["target_modules"])),
    ):
        if not fits:
            raise AdapterFileError(f"{path} is damaged: {name} is {settings[name]!r}")
    if settings["bias"] != "none":
        raise AdapterFileError(f"{folder} holds trained biases (bias={settings['bias']!r}), which no adapter here can")
    if settings["modules_to_save"]:
        raise AdapterFileError(
            f"{folder} holds whole trained modules (modules_to_save={settings['modules_to_save']}), "
            "which no adapter here can; load it with peft.PeftModel.from_pretrained"
        )
    if settings["tinylora_dropout"]:
        warnings.warn(
            f"{folder} was trained with tinylora_dropout={settings['tinylora_dropout']}; here no dropout is applied, "
            "which makes a difference to further training only",
            stacklevel=3,
        )
    unknown = sorted(name for name in stored if name not in DEFAULTS and name != "exclude_modules" and stored[name])
    if unknown:
        warnings.warn(
            f"{path} sets {', '.join(unknown)}, unknown to this version of tinylora_lite and passed over; if it "
            "changes what PEFT computes, the outputs differ. Compare them, or upgrade tinylora_lite",
            stacklevel=3,
        )
    return settings


class Tensors(NamedTuple):
    """What ``adapter_model.safetensors`` holds, all float32.

    Attributes:
        vectors: by group, ``[u]``.
        parts: of each module, by its name, ``"A"``, ``"B"`` and ``"P"`` as far as they stand there.
        weights: copies of the base's own weights, by their names; PEFT adds them of embeddings and heads.
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


def write_folder(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes both files; a new folder appears whole or not at all, and equal contents give equal bytes.

    Raises:
        FileExistsError: the folder is a file, or holds other things than a PEFT adapter of this kind.
    """
    folder, kind = folder.resolve(), settings["peft_type"]
    if folder.exists() and kind_of(folder) != kind:
        if not folder.is_dir() or any(folder.iterdir()):
            raise FileExistsError(f"{folder} exists and is no PEFT folder of a {kind} adapter; name a new one")
        folder.rmdir()
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        (temporary / TENSOR_FILE).write_bytes(safetensors.torch.save(dict(tensors), {"format": "pt"}))
        (temporary / CONFIG_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
        if folder.exists():
            for name in (TENSOR_FILE, CONFIG_FILE):
                os.replace(temporary / name, folder / name)
        else:
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def kind_of(folder: Path) -> Any:
    """The ``peft_type`` that a folder's configuration names, ``None`` where there is none."""
    try:
        return json.loads((folder / CONFIG_FILE).read_bytes()).get("peft_type")
    except (AttributeError, OSError, RecursionError, ValueError):
        return None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_names(value: Any) -> bool:
    names = [value] if isinstance(value, str) else value
    return isinstance(names, list) and bool(names) and all(isinstance(name, str) and name for name in names)
