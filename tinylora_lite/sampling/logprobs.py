"""Log-probabilities of completions under a model, differentiable.

Prompts that occur more than once (the groups of GRPO) are read once, and so is what all prompts of a batch begin with
(instructions, worked examples): keys and values are computed for one row and repeated for the others, or stay as they
are where all rows can read the same (:mod:`tinylora_lite.sampling.start`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tinylora_lite.adapter.attached import rows_of
from tinylora_lite.sampling.policy import can_share_prompts, keeps_everything, last, next_logprobs, with_cache
from tinylora_lite.sampling.rollouts import Rollouts
from tinylora_lite.sampling.start import after_start, can_hold_start
from tinylora_lite.utils.distributed import is_sharded

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


WORTH_SHARING = 32
"""From how many tokens on a start that all prompts have in common is read in a forward pass of its own."""


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
    logits, cache, mask, start = read_prompts(model, rollouts.prompt_ids, rollouts.prompt_mask, rollouts.adapters)
    attention = torch.cat([mask, rollouts.completion_mask], dim=1)
    first = torch.log_softmax(logits.float() / temperature, dim=-1).gather(1, ids[:, :1])
    if tokens == 1:
        return first
    inputs = {"input_ids": ids[:, :-1], "use_cache": True, **with_cache(model, cache)}
    inputs |= {"attention_mask": attention[:, :-1], "position_ids": positions[:, -tokens:-1]}
    with rows_of(rollouts.adapters), after_start(model, start):
        return torch.cat([first, next_logprobs(model, ids[:, 1:], temperature, **inputs)], dim=1)


def read_prompts(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, adapters: Tensor | None = None
) -> tuple[Tensor, Cache, Tensor, Cache | None]:
    """Logits after each prompt, ``[batch, vocabulary]``, a cache of all prompts, and the mask of the cache's places.

    Equal prompts are read once, and so is what all of them begin with; the padding is then between that and the rest.
    That start is a cache of its own, for ``after_start``, where it can be; otherwise the cache holds it in each row.
    """
    from transformers import DynamicCache  # its modules take seconds, which import tinylora_lite should not

    whose = torch.zeros_like(ids[:, :1]) if adapters is None else adapters[:, None]
    distinct, place = torch.unique(torch.cat([whose, ids, mask], dim=1), dim=0, return_inverse=True)
    whose, ids, mask = distinct.split([1, ids.shape[1], ids.shape[1]], dim=1)
    cache, options = DynamicCache(config=model.config), {"use_cache": True, "logits_to_keep": last(1, ids.device)}
    shared = adapters is None and keeps_everything(cache) and not is_sharded(model)  # all processes read alike
    start, held = common_start(ids, mask) if shared else 0, None
    if start >= WORTH_SHARING:
        seen = mask.cumsum(dim=1)
        order = torch.where(mask == 0, 1, torch.where(seen <= start, 0, 2)).argsort(dim=1, stable=True)
        ids, mask = ids.gather(1, order), mask.gather(1, order)
        model(input_ids=ids[:1, :start], **with_cache(model, cache), **options)
        ids = ids[:, start:]
        if can_hold_start(model):
            held, cache = cache, DynamicCache(config=model.config)
        else:
            cache.batch_repeat_interleave(len(ids))
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    mask = mask if held is None else mask[:, start:]
    with rows_of(None if adapters is None else whose[:, 0]), after_start(model, held):
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        logits = model(**inputs, **with_cache(model, cache), **options).logits[:, -1]
    cache.reorder_cache(place)
    return logits[place], cache, mask[place], held


def common_start(ids: Tensor, mask: Tensor) -> int:
    """How many tokens all rows begin with, less than the shortest has; ``ids`` and ``mask`` are padded on the left."""
    shortest = int(mask.sum(dim=1).min())
    begins = (mask.cumsum(dim=1) == 1).int().argmax(dim=1)  # of places that hold the first token, the first
    starts = ids.gather(1, begins[:, None] + torch.arange(shortest - 1, device=ids.device))
    alike = (starts == starts[:1]).all(dim=0).int()
    return int(alike.cumprod(dim=0).sum()) if len(ids) > 1 else 0
