"""Models by name: the shapes of some well-known ones, and any config.json. No weights, no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from tinylora_lite import nano


def _shape(width: int, layers: int, heads: int, kv_heads: int, mlp: int, vocabulary: int, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


QWEN: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": _shape(896, 24, 14, 2, 4864, 151_936, tied=True),
    "qwen2.5-1.5b": _shape(1536, 28, 12, 2, 8960, 151_936, tied=True),
    "qwen2.5-3b": _shape(2048, 36, 16, 2, 11_008, 151_936, tied=True),
    "qwen2.5-7b": _shape(3584, 28, 28, 4, 18_944, 152_064, tied=False),
    "qwen2.5-math-7b": _shape(3584, 28, 28, 4, 18_944, 152_064, tied=False) | {"max_position_embeddings": 4096},
}
QWEN3: dict[str, dict[str, Any]] = {
    "qwen3-8b": _shape(4096, 36, 32, 8, 12_288, 151_936, tied=False) | {"head_dim": 128},
}
LLAMA: dict[str, dict[str, Any]] = {
    "llama-3.2-3b": _shape(3072, 28, 24, 8, 8192, 128_256, tied=True) | {"max_position_embeddings": 131_072},
    "llama-3.1-8b": _shape(4096, 32, 32, 8, 14_336, 128_256, tied=False) | {"max_position_embeddings": 131_072},
}
NAMES = ("nano", *QWEN, *QWEN3, *LLAMA)

HELP = f"a config.json, a folder that holds one, or one of: {', '.join(NAMES)}"


def model_config(name: str) -> PretrainedConfig:
    """The configuration of a model.

    Args:
        name: one of ``NAMES``, as such or as the hub has it (``Qwen/Qwen2.5-7B-Instruct``), or the path of a
            ``config.json`` or of a folder that holds one.

    Raises:
        ValueError: no such model, or the file is no transformers configuration.
    """
    path = Path(name)
    known = name.lower().rsplit("/", 1)[-1].removesuffix("-instruct")
    if path.exists():
        return _read(path / "config.json" if path.is_dir() else path)
    if known == "nano":
        return _read(nano.CHECKPOINTS / nano.BASE / "config.json")
    if known in QWEN:
        return Qwen2Config(**QWEN[known])
    if known in QWEN3:
        return Qwen3Config(**QWEN3[known])
    if known in LLAMA:
        return LlamaConfig(**LLAMA[known])
    raise ValueError(f"no model named {name}; give the path of a config.json, or one of: {', '.join(NAMES)}")


def _read(file: Path) -> PretrainedConfig:
    if not file.is_file():
        raise ValueError(f"{file.parent} holds no config.json")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        return AutoConfig.for_model(**settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is no configuration that transformers knows ({error})") from error
