"""Language models by name, and the sizes that memory and time depend on; from configurations, without a weight."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

    from tinylora_lite.adapter.tying import TargetModule

SHAPES: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("models.json").read_text(encoding="utf-8"))
"""What ``AutoConfig.for_model`` takes, by the name of a model."""

NAMES = ("nano", *SHAPES)
HELP = f"a config.json, a folder that holds one, a GGUF file, a model of the hub, or one of: {', '.join(NAMES)}"


def model_config(name: str, revision: str | None = None) -> PretrainedConfig:
    """The configuration of a model.

    Args:
        name: one of ``NAMES``, as such or as the hub has it (``Qwen/Qwen2.5-7B-Instruct``), the path of a
            ``config.json`` or of a folder that holds one, a GGUF file or what names one
            (:mod:`tinylora_lite.experiment.models`), or another model of the hub.
        revision: of the hub's model.

    Raises:
        ValueError: no such model, or the file is no transformers configuration.
        OSError, ImportError: of a GGUF file, as :func:`~tinylora_lite.experiment.models.load_model` raises them.
    """
    from transformers import AutoConfig

    known = name.lower().rsplit("/", 1)[-1].removesuffix("-instruct")
    if not Path(name).exists() and known in SHAPES:
        return AutoConfig.for_model(**SHAPES[known])
    from tinylora_lite.experiment.models import checkpoint, gguf_file  # imports torch
    from tinylora_lite.files.gguf import tokenizer_folder

    if not Path(name).exists() and known == "nano":
        name = checkpoint(known)
    elif file := gguf_file(name, revision):
        name = str(tokenizer_folder(file))
    try:
        found: PretrainedConfig = AutoConfig.from_pretrained(name, revision=revision)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"no configuration of {name} ({reason}); give {HELP}") from error
    return found


@dataclass(frozen=True)
class ModelShape:
    """A decoder of blocks as Qwen2's and Llama's: seven linear layers, two norms, grouped keys and values.

    Attributes:
        config: of the model.
        parameters: all of them, shared embeddings once.
        linear: parameters in the weights of the adapted modules, which are also those that quantization shrinks.
        head: parameters in the matrix that puts out logits.
        largest: parameters in the largest adapted weight.
        sides: the sum of ``in + out`` of the adapted modules.
        targets: the adapted modules.
    """

    config: PretrainedConfig = field(repr=False)
    parameters: int
    linear: int
    head: int
    largest: int
    sides: int
    targets: tuple[TargetModule, ...] = field(repr=False)

    @property
    def layers(self) -> int:
        """How many blocks."""
        return int(self.config.num_hidden_layers)

    @property
    def attention(self) -> int:
        """The width of all heads together."""
        heads = self.config.num_attention_heads
        return int(heads * (getattr(self.config, "head_dim", None) or self.config.hidden_size // heads))

    def cache_per_token(self, element: int) -> int:
        """Bytes of the keys and values of one token, at ``element`` bytes each."""
        heads: int = self.config.num_attention_heads
        kv_heads: int = getattr(self.config, "num_key_value_heads", None) or heads
        return 2 * self.layers * kv_heads * self.attention // heads * element

    @classmethod
    def of(cls, config: PretrainedConfig) -> ModelShape:
        """Reads a transformers configuration.

        Raises:
            ValueError: it is no causal language model of such blocks.
        """
        from tinylora_lite.adapter.tying import find_target_modules

        model = without_weights(config)
        head = getattr(model, "lm_head", None)
        if head is None or not hasattr(config, "intermediate_size"):
            raise ValueError(f"no plan for a {type(model).__name__}; it has no blocks as those of Qwen2 and Llama")
        targets = find_target_modules(model)
        weights = [model.get_submodule(target.name).get_parameter("weight") for target in targets]
        return cls(
            config=config,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            linear=sum(weight.numel() for weight in weights),
            head=head.weight.numel(),
            largest=max(weight.numel() for weight in weights),
            sides=sum(sum(weight.shape) for weight in weights),
            targets=tuple(targets),
        )


def without_weights(model_or_config: nn.Module | PretrainedConfig) -> nn.Module:
    """A model as it is, or the causal language model of a configuration on the meta device.

    Raises:
        ValueError: it is neither a model nor a configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM, PretrainedConfig

    if isinstance(model_or_config, torch.nn.Module):
        return model_or_config
    if not isinstance(model_or_config, PretrainedConfig):
        raise ValueError(
            f"a model or a transformers configuration is needed, not {type(model_or_config).__name__}; "
            "AutoConfig.from_pretrained makes one of a name"
        )
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(model_or_config)
    return model
