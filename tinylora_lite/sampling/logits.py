"""Log-probabilities straight from a language model's head, some tokens at a time.

With a vocabulary of 152,000 the logits of a single completion of 4,096 tokens take 2.5 GB in float32, and their softmax
and its gradient as much again: more than everything else a frozen model keeps for its backward pass. So they are made
in chunks, and made again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_AT_ONCE = 1 << 27
"""How many logits exist at a time: 512 MiB in float32, 883 tokens of Qwen2.5's vocabulary."""

PLAIN_HEADS = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types of transformers whose logits are what the head puts out: nothing scales or caps them afterwards."""


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
