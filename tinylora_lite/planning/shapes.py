"""The sizes of a language model that memory and time depend on, read from its configuration: no weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from tinylora_lite.adapter.tying import Site, find_sites
from tinylora_lite.planning.counting import without_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig


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
        parameters: all numbers, shared embeddings once.
        linear: numbers in the weights of the adapted modules, which are also those that quantization shrinks.
        head: numbers in the matrix that puts out logits.
        largest: numbers in the largest adapted weight.
        block: numbers in one block.
        modules: adapted modules.
        sides: the sum of their ``in + out``.
        sites: where they stand.
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
    block: int
    modules: int
    sides: int
    sites: tuple[Site, ...] = field(repr=False)

    @property
    def multiplied(self) -> int:
        """The weights that every token is multiplied by: all linear layers, and the head."""
        return self.linear + self.head

    @property
    def attention(self) -> int:
        """The width of all heads together."""
        return self.heads * self.head_dim

    def cache_per_token(self, element: int) -> int:
        """Bytes of the keys and values of one token, at ``element`` bytes a number."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element

    @classmethod
    def of(cls, config: PretrainedConfig) -> ModelShape:
        """Reads a transformers configuration.

        Raises:
            ValueError: it is no causal language model of such blocks.
        """
        from transformers import PreTrainedModel  # takes a second, as without_weights says

        model = without_weights(config)
        sites = find_sites(model)
        weights = [model.get_submodule(site.name).get_parameter("weight") for site in sites]
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        if not isinstance(head, nn.Module) or not hasattr(config, "intermediate_size"):
            raise ValueError(f"no plan for a {type(model).__name__}; it has no blocks as those of Qwen2 and Llama")
        heads = config.num_attention_heads
        linear = sum(weight.numel() for weight in weights)
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
            linear=linear,
            head=head.get_parameter("weight").numel(),
            largest=max(weight.numel() for weight in weights),
            block=linear // config.num_hidden_layers,
            modules=len(sites),
            sides=sum(sum(weight.shape) for weight in weights),
            sites=tuple(sites),
        )
