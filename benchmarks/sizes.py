"""What 13 numbers weigh in a file, in every format that holds them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch


def sizes() -> dict[str, Any]:
    """Bytes of each file of one adapter with 13 numbers, on a model with Qwen2.5-7B's 196 modules.

    The model is narrow (Qwen2.5-7B's depth and names, width 64), since only the factors grow with the width; for
    Qwen2.5-7B itself the bytes of its wider factors are added, float32 each: ``r · (in + out)`` a module.
    """
    from transformers import Qwen2ForCausalLM

    import tinylora_lite as tl
    from tinylora_lite.planning.shapes import model_config

    wide = model_config("qwen2.5-7b")
    narrow = model_config("qwen2.5-7b")
    narrow.hidden_size, narrow.intermediate_size, narrow.num_attention_heads, narrow.vocab_size = 64, 96, 4, 99
    narrow.num_key_value_heads = 2
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(narrow)
    adapter = tl.attach(model, tl.TinyLoraConfig(rank=2, u=1, n_tie=16))
    torch.nn.init.normal_(adapter.vectors)
    counts = [tl.count_parameters(config, "lora", rank=2) for config in (narrow, wide)]
    grown = 4 * (counts[1] - counts[0])
    found: dict[str, Any] = {"numbers": adapter.num_parameters, "payload": 2 * adapter.num_parameters}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        found["tinylora"] = tl.save(adapter, folder / "a.tinylora").stat().st_size
        whole = tl.save(adapter, folder / "b.tinylora", factors=True).stat().st_size
        tl.export_peft(adapter, folder / "peft")
        tl.export_lora(adapter, folder / "lora")
        found["tinylora_with_factors"] = whole + grown
        for name in ("peft", "lora"):
            found[name] = (folder / name / "adapter_model.safetensors").stat().st_size + grown
    return found
