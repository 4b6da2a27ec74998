"""An adapter as an ordinary LoRA, for everything that serves one: PEFT, vLLM, llama.cpp.

``(U Σ) R Vᵀ`` is a product of two thin matrices, so nothing is approximated: ``B = (U Σ) R`` and ``A = Vᵀ``, of rank r.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any, get_args

import torch

from tinylora_lite.adapter.adapter import TinyLoraAdapter
from tinylora_lite.files.file_format import DTYPES, Precision, base_name
from tinylora_lite.files.peft_format import CONFIG_FILE, TENSOR_FILE, write_folder
from tinylora_lite.files.peft_rules import targets_of

SETTINGS: dict[str, Any] = {
    "base_model_name_or_path": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_alpha": None,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": None,
    "target_modules": None,
    "task_type": None,
    "use_dora": False,
    "use_rslora": False,
}
"""What the configuration says: as much as every reader needs, so that no version of PEFT finds a word it lacks."""


def export_lora(adapter: TinyLoraAdapter, folder: str | Path, dtype: Precision = "fp32") -> Path:
    """Writes an adapter as a standard PEFT LoRA of rank r, the same function up to the rounding of ``dtype``.

    The file holds of each module ``base_model.model.<module>.lora_A.weight [r, in]``, the factor right of R, and
    ``lora_B.weight [out, r]``, the factor left of R times R (in float64, rounded once). ``lora_alpha`` is r, so the
    scale is 1. The base stays as it is, and an update far below its rounding survives, which a merge would lose
    (:func:`~tinylora_lite.merge_report`); ``"bf16"`` rounds the update by less than 1 % of its norm.

    PEFT reads it with ``PeftModel.from_pretrained(model, folder)``; vLLM with ``LLM(..., enable_lora=True,
    max_lora_rank=8)`` and ``LoRARequest("name", 1, folder)``, where linear layers inside the blocks are adapted and no
    others; llama.cpp with ``convert_lora_to_gguf.py --base BASE --outfile FILE folder``. A base that was loaded from a
    local folder is named by that folder's name alone.

    Args:
        adapter: attached or detached; its model must still exist.
        folder: made where it is missing, replaced where it holds what this function wrote before; it appears whole or
            not at all.
        dtype: of the stored matrices: ``"fp32"``, ``"fp16"`` or ``"bf16"``.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder is a file, or holds anything else. It is untouched then.
        ValueError: an unknown dtype, a number that is not finite or that ``dtype`` cannot hold, or the model is gone.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(get_args(Precision))}, not {dtype!r}")
    folder, model = Path(folder), adapter._model()
    if model is None:
        raise ValueError("the adapter's model no longer exists, so the LoRA could not name its modules; export before")
    replaces = _check_free(folder)
    tensors = {}
    for name in adapter.names:
        factors = adapter.factors(name)
        left, R = factors.left.detach().cpu().double(), adapter.mixing(name).detach().cpu().double()
        for letter, matrix in (("A", factors.right.detach().cpu()), ("B", left @ R)):
            # A clone: two modules may share a given factor, and safetensors writes no memory twice.
            stored = matrix.to(DTYPES[dtype]).contiguous().clone()
            if not torch.isfinite(stored).all():
                finite = torch.isfinite(matrix).all()
                held = f"numbers too large for {dtype}; export as fp32" if finite else "NaN or infinity; train it again"
                raise ValueError(f"{name}: the LoRA would hold {held}")
            tensors[f"base_model.model.{name}.lora_{letter}.weight"] = stored
    names = [name for name, _ in model.named_modules() if name in adapter.names]
    settings = SETTINGS | {
        "base_model_name_or_path": base_name(model) or None,
        "lora_alpha": adapter.config.rank,
        "r": adapter.config.rank,
        "target_modules": targets_of(model, names) or "|".join(map(re.escape, names)),
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
    }
    if not replaces:
        write_folder(folder, settings, tensors)
        return folder
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as aside:
        new, old = Path(aside) / "new", Path(aside) / "old"
        write_folder(new, settings, tensors)
        folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            old.rename(folder)
            raise
    return folder


def _check_free(folder: Path) -> bool:
    """Whether an export of this function is to be replaced; raises where something else stands there."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        settings = json.loads((folder / CONFIG_FILE).read_bytes())
        # PEFT writes all its settings and a README, so a LoRA that somebody trained is never taken for an export.
        files = {path.name for path in folder.iterdir()}
        if files == {CONFIG_FILE, TENSOR_FILE} and settings.keys() == SETTINGS.keys():
            return True
    except (AttributeError, OSError, ValueError):
        pass
    raise FileExistsError(f"{folder} exists and is no LoRA that export_lora wrote; name a new folder, or move that one")
