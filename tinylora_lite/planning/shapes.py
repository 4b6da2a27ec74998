"""Language models by name, and the sizes that memory and time depend on; from configurations, without a weight."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from tinylora_lite.adapter.tying import TargetModule


def _shape(
    kind: str, width: int, layers: int, heads: int, kv_heads: int, mlp: int, vocabulary: int, tied: bool, **more: int
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    } | more


SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": _shape("qwen2", 896, 24, 14, 2, 4864, 151_936, True),
    "qwen2.5-1.5b": _shape("qwen2", 1536, 28, 12, 2, 8960, 151_936, True),
    "qwen2.5-3b": _shape("qwen2", 2048, 36, 16, 2, 11_008, 151_936, True),
    "qwen2.5-7b": _shape("qwen2", 3584, 28, 28, 4, 18_944, 152_064, False),
    "qwen2.5-math-7b": _shape("qwen2", 3584, 28, 28, 4, 18_944, 152_064, False, max_position_embeddings=4096),
    "qwen3-8b": _shape("qwen3", 4096, 36, 32, 8, 12_288, 151_936, False, head_dim=128),
    "llama-3.2-3b": _shape("llama", 3072, 28, 24, 8, 8192, 128_256, True, max_position_embeddings=131_072),
    "llama-3.1-8b": _shape("llama", 4096, 32, 32, 8, 14_336, 128_256, False, max_position_embeddings=131_072),
}
"""What ``AutoConfig.for_model`` takes, by the name of a model."""

NAMES = ("nano", *SHAPES)
HELP = f"a config.json, a folder that holds one, or one of: {', '.join(NAMES)}"


def model_config(name: str) -> PretrainedConfig:
    """The configuration of a model.

    Args:
        name: one of ``NAMES``, as such or as the hub has it (``Qwen/Qwen2.5-7B-Instruct``), or the path of a
            ``config.json`` or of a folder that holds one.

    Raises:
        ValueError: no such model, or the file is no transformers configuration.
    """
    from transformers import AutoConfig

    path = Path(name)
    known = name.lower().rsplit("/", 1)[-1].removesuffix("-instruct")
    if not path.exists() and known in SHAPES:
        return AutoConfig.for_model(**SHAPES[known])
    if not path.exists() and known == "nano":
        from tinylora_lite.experiment.models import checkpoint  # imports torch

        path = Path(checkpoint(known))
    if not path.exists():
        raise ValueError(f"no model named {name}; give the path of a config.json, or one of: {', '.join(NAMES)}")
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path} holds no config.json")
    try:
        return AutoConfig.for_model(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is no configuration that transformers knows ({error})") from error


@dataclass(frozen=True)
class ModelShape:
    """A decoder of blocks as Qwen2's and Llama's: seven linear layers, two norms, grouped keys and values.

    Attributes:
        width: of the hidden states.
        layers: blocks.
        heads, kv_heads, head_dim: of attention.
        mlp: width inside the MLP.
        vocabulary: tokens.
        positions: the longest sequence that the model was made for.
        parameters: all of them, shared embeddings once.
        linear: parameters in the weights of the adapted modules, which are also those that quantization shrinks.
        head: parameters in the matrix that puts out logits.
        largest: parameters in the largest adapted weight.
        sides: the sum of ``in + out`` of the adapted modules.
        targets: the adapted modules.
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    positions: int
    parameters: int
    linear: int
    head: int
    largest: int
    sides: int
    targets: tuple[TargetModule, ...] = field(repr=False)

    @property
    def attention(self) -> int:
        """The width of all heads together."""
        return self.heads * self.head_dim

    def cache_per_token(self, element: int) -> int:
        """Bytes of the keys and values of one token, at ``element`` bytes each."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element

    @classmethod
    def of(cls, config: PretrainedConfig) -> ModelShape:
        """Reads a transformers configuration.

        Raises:
            ValueError: it is no causal language model of such blocks.
        """
        from tinylora_lite.adapter.streaming import without_weights
        from tinylora_lite.adapter.tying import find_target_modules

        model = without_weights(config)
        head = getattr(model, "lm_head", None)
        if head is None or not hasattr(config, "intermediate_size"):
            raise ValueError(f"no plan for a {type(model).__name__}; it has no blocks as those of Qwen2 and Llama")
        targets, heads = find_target_modules(model), config.num_attention_heads
        weights = [model.get_submodule(target.name).get_parameter("weight") for target in targets]
        return cls(
            width=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            mlp=config.intermediate_size,
            vocabulary=config.vocab_size,
            positions=config.max_position_embeddings,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            linear=sum(weight.numel() for weight in weights),
            head=head.weight.numel(),
            largest=max(weight.numel() for weight in weights),
            sides=sum(sum(weight.shape) for weight in weights),
            targets=tuple(targets),
        )
