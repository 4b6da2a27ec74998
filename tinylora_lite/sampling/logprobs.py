"""Log-probabilities of completions under a model, differentiable.

Prompts that occur more than once (the groups of GRPO) are read once: their keys and values are computed for one row and
repeated for the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tinylora_lite.adapter.attached import rows_of
from tinylora_lite.sampling.policy import can_share_prompts, next_logprobs, with_cache
from tinylora_lite.sampling.rollouts import Rollouts

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


def completion_logprobs(model: PreTrainedModel, rollouts: Rollouts, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of the completion tokens, teacher-forced: ``[batch, tokens]`` float32, differentiable.

    Positions outside ``completion_mask`` hold values without meaning. Logits are computed of the completions alone.
    """
    ids, tokens = rollouts.completion_ids, rollouts.completion_ids.shape[1]
    attention = torch.cat([rollouts.prompt_mask, rollouts.completion_mask], dim=1)
    positions = (attention.cumsum(dim=1) - 1).clamp(min=0)
    if not can_share_prompts(model):
        inputs = {"input_ids": torch.cat([rollouts.prompt_ids, ids[:, :-1]], dim=1), "use_cache": False}
        inputs |= {"attention_mask": attention[:, :-1], "position_ids": positions[:, :-1]}
        with rows_of(rollouts.adapters):
            return next_logprobs(model, ids, temperature, **inputs)
    logits, cache = read_prompts(model, rollouts.prompt_ids, rollouts.prompt_mask, rollouts.adapters)
    first = torch.log_softmax(logits.float() / temperature, dim=-1).gather(1, ids[:, :1])
    if tokens == 1:
        return first
    inputs = {"input_ids": ids[:, :-1], "use_cache": True, **with_cache(model, cache)}
    inputs |= {"attention_mask": attention[:, :-1], "position_ids": positions[:, -tokens:-1]}
    with rows_of(rollouts.adapters):
        return torch.cat([first, next_logprobs(model, ids[:, 1:], temperature, **inputs)], dim=1)


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
