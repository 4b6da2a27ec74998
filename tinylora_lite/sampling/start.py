"""Attention on CPUs where all rows begin alike: keys and values of the start are held, and read, once for all of them.

Without it each row reads a copy, and the gradient of every copy is made and added up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tinylora_lite.sampling.policy import PLAIN

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

_START: ContextVar[Any] = ContextVar("start")

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def can_hold_start(model: PreTrainedModel) -> bool:
    """Whether attention can be taken apart: on CPUs, where a plain model calls PyTorch's own through transformers."""
    plain = model.config.model_type in PLAIN and model.config._attn_implementation == "sdpa"
    return plain and model.device.type == "cpu"


@contextmanager
def after_start(model: PreTrainedModel, start: Cache | None) -> Iterator[None]:
    """Inside, every row of ``model`` follows ``start``, a cache of one row; ``None`` changes nothing.

    Caches and attention masks are without it, positions count it. Two threads may do so with two models, not with one.
    """
    if start is None:
        yield
        return
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("after_start", _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("after_start", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    token = _START.set(start)
    model.config._attn_implementation = "after_start"
    try:
        yield
    finally:
        model.config._attn_implementation = "sdpa"
        _START.reset(token)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    rows, heads, tokens, width = query.shape
    # The heads that share keys are further queries to them.
    query = query.reshape(rows, key.shape[1], -1, width)
    if mask is None and tokens > 1:
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
    if mask is not None:  # a row of -inf alone would have no logarithm
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
        mask = mask if tokens == 1 else mask.repeat(1, 1, query.shape[2] // tokens, 1)
    layer = _START.get().layers[module.layer_idx]
    attend: Any = _AfterStart.apply if torch.is_grad_enabled() else partial(_AfterStart.forward, None)
    of: Tensor = attend(query, key, value, layer.keys, layer.values, mask, options["scaling"])
    return of.reshape(rows, heads, tokens, width).transpose(1, 2).contiguous(), None


class _AfterStart(torch.autograd.Function):
    """Attention to the start, by all rows as if they were one, and to a row's own tokens, weighted by their masses.

    Either part's gradient is that of ordinary attention whose output and mass are those of both parts together.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, first: Tensor, held: Tensor, mask: Tensor | None, s: float
    ) -> Tensor:
        own, own_mass = flash(query, key, value, attn_mask=mask, scale=s)
        past, past_mass = (_apart(part, query) for part in flash(_together(query), first, held, scale=s))
        share = (own_mass - past_mass).sigmoid()[..., None]  # of the own tokens' mass
        output = past.to(share.dtype).lerp(own.to(share.dtype), share).to(query.dtype)
        if ctx is not None:
            ctx.s, mass = s, torch.logaddexp(own_mass, past_mass)
            ctx.save_for_backward(query, key, value, first, held, mask, output, mass)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, first, held, mask, output, mass = ctx.saved_tensors
        of = flash_backward(gradient, query, key, value, output, mass, 0.0, False, attn_mask=mask, scale=ctx.s)
        gradient, query, output, mass = map(_together, (gradient, query, output, mass))
        seen = flash_backward(gradient, query, first, held, output, mass, 0.0, False, scale=ctx.s)
        return of[0] + _apart(seen[0], of[0]), of[1], of[2], seen[1], seen[2], None, None


def _together(part: Tensor) -> Tensor:
    """``[rows, heads, queries, ...]`` as one row."""
    return part.transpose(0, 1).flatten(1, 2)[None]


def _apart(part: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`_together`."""
    return part[0].unflatten(1, (like.shape[0], like.shape[2])).transpose(0, 1)  # type: ignore[no-any-return]
