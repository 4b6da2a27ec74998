"""Log-probabilities of completions under a model, differentiable.

Prompts that occur more than once (the groups of GRPO) are read once: their keys and values are computed for one row and
repeated for the others.

With a vocabulary of 152,000 the logits of a single completion of 4,096 tokens take 2.5 GB in float32, and their softmax
and its gradient as much again: more than everything else a frozen model keeps for its backward pass. So they are made
in chunks, and made again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinylora_lite.adapter.layer import rows_of
from tinylora_lite.sampling.rollouts import Rollouts
from tinylora_lite.utils.distributed import is_sharded

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

LOGITS_AT_ONCE = 1 << 27
"""How many logits exist at a time: 512 MiB in float32, 883 tokens of Qwen2.5's vocabulary."""

PLAIN_HEADS = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types of transformers whose logits are what the head puts out: nothing scales or caps them afterwards."""


def completion_logprobs(model: PreTrainedModel, rollouts: Rollouts, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of the completion tokens, teacher-forced: ``[batch, tokens]`` float32, differentiable.

    Positions outside ``completion_mask`` hold numbers without meaning. Logits are computed for the completions
    only, and of many tokens in chunks.
    """
    ids, tokens = rollouts.completion_ids, rollouts.completion_ids.shape[1]
    attention = torch.cat([rollouts.prompt_mask, rollouts.completion_mask], dim=1)
    positions = (attention.cumsum(dim=1) - 1).clamp(min=0)
    if not _can_share_prompts(model):
        with rows_of(rollouts.members):
            return _logprobs_after(
                model,
                ids,
                temperature,
                input_ids=torch.cat([rollouts.prompt_ids, ids[:, :-1]], dim=1),
                attention_mask=attention[:, :-1],
                position_ids=positions[:, :-1],
                use_cache=False,
            )
    logits, cache = read_prompts(model, rollouts.prompt_ids, rollouts.prompt_mask, rollouts.members)
    first = torch.log_softmax(logits.float() / temperature, dim=-1).gather(1, ids[:, :1])
    if tokens == 1:
        return first
    with rows_of(rollouts.members):
        following = _logprobs_after(
            model,
            ids[:, 1:],
            temperature,
            input_ids=ids[:, :-1],
            attention_mask=attention[:, :-1],
            position_ids=positions[:, -tokens:-1],
            past_key_values=cache,
            use_cache=True,
        )
    return torch.cat([first, following], dim=1)


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
    model: PreTrainedModel, ids: Tensor, mask: Tensor, members: Tensor | None = None
) -> tuple[Tensor, Cache]:
    """Logits after each prompt, ``[batch, vocabulary]``, and a cache of all prompts; equal prompts are read once."""
    from transformers import DynamicCache  # its modules take seconds, which import tinylora_lite should not

    whose = torch.zeros_like(ids[:, :1]) if members is None else members[:, None]
    distinct, place = torch.unique(torch.cat([whose, ids, mask], dim=1), dim=0, return_inverse=True)
    distinct_members, distinct_ids, distinct_mask = distinct.split([1, ids.shape[1], ids.shape[1]], dim=1)
    cache = DynamicCache(config=model.config)
    with rows_of(None if members is None else distinct_members[:, 0]):
        logits = model(
            input_ids=distinct_ids,
            attention_mask=distinct_mask,
            position_ids=(distinct_mask.cumsum(dim=1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
    cache.reorder_cache(place)
    return logits[place], cache


def chosen_logprobs(
    head: Callable[[Tensor], Tensor], hidden: Tensor, ids: Tensor, temperature: float, at_once: int
) -> Tensor:
    """The log-probability of one token after each hidden state, ``[...]`` float32, differentiable.

    Args:
        head: hidden states ``[tokens, width]`` to logits ``[tokens, vocabulary]``.
        hidden: ``[..., width]``.
        ids: ``[...]`` int64.
        temperature: divides the logits.
        at_once: tokens whose logits exist at the same time.
    """

    def logprobs(hidden: Tensor, ids: Tensor) -> Tensor:
        distribution = torch.log_softmax(head(hidden).float() / temperature, dim=-1)
        return distribution.gather(1, ids[:, None])[:, 0]

    pieces = zip(hidden.flatten(0, -2).split(at_once), ids.flatten().split(at_once), strict=True)
    chosen = [checkpoint(logprobs, states, tokens, use_reentrant=False) for states, tokens in pieces]
    return torch.cat(chosen).view(ids.shape)


def tokens_at_once(model: PreTrainedModel) -> int | None:
    """How many tokens' logits should exist at a time; ``None`` for a model whose head cannot be taken by itself.

    That is one that does something to its logits afterwards, or that has hooks on its head (an adapter's, for one).
    """
    head = model.get_output_embeddings()
    if head is None or head._forward_hooks or head._forward_pre_hooks or model.config.model_type not in PLAIN_HEADS:
        return None
    return max(1, LOGITS_AT_ONCE // int(model.config.vocab_size))


@contextmanager
def head_gives_logprobs(model: PreTrainedModel, ids: Tensor, temperature: float, at_once: int) -> Iterator[None]:
    """Inside, the ``logits`` of ``model`` are log-probabilities of ``ids``, ``[batch, tokens, 1]`` float32.

    The head is called from inside the model, where wrappers that gather weights for the forward pass expect it.
    """
    head = model.get_output_embeddings()
    replaced, forward = head.__dict__.get("forward"), head.forward
    head.forward = lambda hidden: chosen_logprobs(forward, hidden, ids, temperature, at_once)[..., None]
    try:
        yield
    finally:
        if replaced is None:
            del head.forward
        else:
            head.forward = replaced


def _can_share_prompts(model: PreTrainedModel) -> bool:
    """Whether gradients can pass through a cache: not in recomputed layers, and not in recurrent or windowed ones.

    Nor is it done where processes compute together: their numbers of forward passes would depend on their samples.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    recomputed = any(module.training and recomputes(module) for module in model.modules())
    return not (recomputed or is_sharded(model)) and all(
        type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers
    )


def recomputes(module: nn.Module) -> bool:
    """Whether gradient checkpointing is on in this very module (transformers renames its own name for it)."""
    return bool(getattr(module, "gradient_checkpointing", False))
