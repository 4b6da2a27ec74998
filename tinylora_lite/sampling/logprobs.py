"""Log-probabilities of completions under a model, differentiable.

Prompts that occur more than once (the groups of GRPO) are read once: their keys and values are computed for one row and
repeated for the others.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tinylora_lite.adapter.layer import rows_of
from tinylora_lite.sampling.logits import head_gives_logprobs, tokens_at_once
from tinylora_lite.sampling.rollouts import Rollouts
from tinylora_lite.utils.distributed import is_sharded

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


def completion_logprobs(model: PreTrainedModel, rollouts: Rollouts, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of the completion tokens, teacher-forced: ``[batch, tokens]`` float32, differentiable.

    Positions outside ``completion_mask`` hold values without meaning. Logits are computed of the completions alone.
    """
    ids, tokens = rollouts.completion_ids, rollouts.completion_ids.shape[1]
    attention = torch.cat([rollouts.prompt_mask, rollouts.completion_mask], dim=1)
    positions = (attention.cumsum(dim=1) - 1).clamp(min=0)
    if not _can_share_prompts(model):
        inputs = {"input_ids": torch.cat([rollouts.prompt_ids, ids[:, :-1]], dim=1), "use_cache": False}
        inputs |= {"attention_mask": attention[:, :-1], "position_ids": positions[:, :-1]}
        with rows_of(rollouts.adapters):
            return _logprobs_after(model, ids, temperature, **inputs)
    logits, cache = read_prompts(model, rollouts.prompt_ids, rollouts.prompt_mask, rollouts.adapters)
    first = torch.log_softmax(logits.float() / temperature, dim=-1).gather(1, ids[:, :1])
    if tokens == 1:
        return first
    inputs = {"input_ids": ids[:, :-1], "use_cache": True, **with_cache(model, cache)}
    inputs |= {"attention_mask": attention[:, :-1], "position_ids": positions[:, -tokens:-1]}
    with rows_of(rollouts.adapters):
        return torch.cat([first, _logprobs_after(model, ids[:, 1:], temperature, **inputs)], dim=1)


def _logprobs_after(model: PreTrainedModel, ids: Tensor, temperature: float, **inputs: Any) -> Tensor:
    """Log-probabilities of ``ids``, ``[batch, tokens]``, at the last places of what ``inputs`` hold."""
    tokens, at_once = ids.shape[1], tokens_at_once(model)
    if at_once is not None and ids.numel() > at_once:
        with head_gives_logprobs(model, ids, temperature, at_once):
            logprobs: Tensor = model(**inputs, logits_to_keep=tokens).logits[..., 0]
            return logprobs
    logits = model(**inputs, logits_to_keep=tokens).logits
    return torch.log_softmax(logits.float() / temperature, dim=-1).gather(2, ids[..., None])[..., 0]


def read_prompts(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, adapters: Tensor | None = None
) -> tuple[Tensor, Cache]:
    """Logits after each prompt, ``[batch, vocabulary]``, and a cache of all prompts; equal prompts are read once."""
    from transformers import DynamicCache  # its modules take seconds, which import tinylora_lite should not

    whose = torch.zeros_like(ids[:, :1]) if adapters is None else adapters[:, None]
    distinct, place = torch.unique(torch.cat([whose, ids, mask], dim=1), dim=0, return_inverse=True)
    distinct_adapters, distinct_ids, distinct_mask = distinct.split([1, ids.shape[1], ids.shape[1]], dim=1)
    cache = DynamicCache(config=model.config)
    with rows_of(None if adapters is None else distinct_adapters[:, 0]):
        logits = model(
            input_ids=distinct_ids,
            attention_mask=distinct_mask,
            position_ids=(distinct_mask.cumsum(dim=1) - 1).clamp(min=0),
            **with_cache(model, cache),
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
    cache.reorder_cache(place)
    return logits[place], cache


def _can_share_prompts(model: PreTrainedModel) -> bool:
    """Whether gradients can pass through a cache: not in recomputed layers, and not in recurrent or windowed ones.

    Where processes compute together, they would make different numbers of forward passes.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    recomputed = any(module.training and recomputes(module) for module in model.modules())
    return not (recomputed or is_sharded(model)) and all(
        type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers
    )


def with_cache(model: PreTrainedModel, cache: Cache) -> dict[str, Any]:
    """The argument that hands a model its cache: ``past_key_values`` before transformers 5.24, ``cache`` since."""
    renamed = "cache" in inspect.signature(type(model).forward).parameters
    return {"cache" if renamed else "past_key_values": cache}


def recomputes(module: nn.Module) -> bool:
    """Whether gradient checkpointing is on in this very module (transformers renames its own name for it)."""
    return bool(getattr(module, "gradient_checkpointing", False))
