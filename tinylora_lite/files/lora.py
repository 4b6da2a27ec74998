"""An adapter as an ordinary LoRA, for everything that serves one: PEFT, vLLM and others.

``(U Σ) R Vᵀ`` is a product of two thin matrices, so nothing is approximated: ``B = (U Σ) R`` and ``A = Vᵀ``, of rank r.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from tinylora_lite.adapter.adapter import TinyLoraAdapter
from tinylora_lite.files.file_format import Precision, model_of, storable
from tinylora_lite.files.peft_format import check_free, settings_of_base, write_folder

SETTINGS: dict[str, Any] = {
    **dict.fromkeys(("base_model_name_or_path", "lora_alpha", "modules_to_save", "r", "target_modules", "task_type")),
    **dict.fromkeys(("fan_in_fan_out", "use_dora", "use_rslora"), False),
    "bias": "none",
    "inference_mode": True,
    "lora_dropout": 0.0,
    "peft_type": "LORA",
}
"""The configuration: what every reader needs and nothing else, so that each version of PEFT knows every key."""


def export_lora(adapter: TinyLoraAdapter, folder: str | Path, dtype: Precision = "fp32") -> Path:
    """Writes an adapter as a standard PEFT LoRA of rank r, the same function up to the rounding of ``dtype``.

    The file holds of each module ``base_model.model.<module>.lora_A.weight [r, in]``, the factor right of R, and
    ``lora_B.weight [out, r]``, the factor left of R times R (in float64, rounded once). ``lora_alpha`` is r, so the
    scale is 1. The base stays as it is, and an update far below its rounding survives, which a merge would lose
    (:func:`~tinylora_lite.merge_report`); ``"bf16"`` rounds the update by less than 1 % of its norm.

    PEFT reads it with ``PeftModel.from_pretrained(model, folder)``; vLLM with ``LLM(..., enable_lora=True,
    max_lora_rank=8)`` and ``LoRARequest("name", 1, folder)``, if only linear layers inside the blocks are adapted;
    llama.cpp reads what :func:`~tinylora_lite.export_gguf` writes. A base that was loaded from a local folder is named
    by that folder's name alone, and one from a GGUF file by the folder of its dequantized checkpoint in the user's
    cache, which ``AutoPeftModelForCausalLM`` opens on this machine.

    Args:
        adapter: attached or detached; its model must still exist.
        folder: made where it is missing, replaced where it holds what this function wrote before; it appears whole or
            not at all. It is returned.
        dtype: of the stored matrices: ``"fp32"``, ``"fp16"`` or ``"bf16"``.

    Raises:
        FileExistsError: the folder is a file, or holds anything else. It is untouched then.
        ValueError: an unknown dtype, a value that is not finite or that ``dtype`` cannot hold, or the model is gone.
    """
    folder, model = Path(folder), model_of(adapter)
    check_free(folder, SETTINGS)
    tensors = {}
    for name in adapter.names:
        for letter, matrix in zip("AB", lora_matrices(adapter, name, dtype), strict=True):
            tensors[f"base_model.model.{name}.lora_{letter}.weight"] = matrix
    rank = adapter.config.rank
    settings = SETTINGS | {"lora_alpha": rank, "r": rank} | settings_of_base(model, adapter.names)
    return write_folder(folder, settings, tensors)


def lora_matrices(adapter: TinyLoraAdapter, name: str, dtype: Precision) -> tuple[Tensor, Tensor]:
    """A ``[r, in]`` and B ``[out, r]`` of a module's update ``B A``, each rounded once to ``dtype``, on the CPU."""
    factors = adapter.factors(name)
    B = factors.left.cpu().double() @ adapter.mixing(name).cpu().double()
    A, B = (storable(matrix, dtype, f"{name}: the LoRA") for matrix in (factors.right, B))
    return A, B
