"""What an adapted layer computes: its own output, and three thin products beside it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tinylora_lite.adapter.factors import Factors

if TYPE_CHECKING:
    from tinylora_lite.adapter.adapter import TinyLoraAdapter


class UpdateHook:
    """What the forward hooks of this library have in common: a module that has one is adapted."""


class AddUpdate(UpdateHook):
    """The forward hook of one module: adds ``x rightᵀ Rᵀ leftᵀ`` to its output; an object, so that it can be pickled.

    Attributes:
        adapter: whose numbers drive the module.
        factors: the module's own.
        group: the row of ``adapter.vectors``.
    """

    def __init__(self, adapter: TinyLoraAdapter, factors: Factors, group: int) -> None:
        self.adapter, self.factors, self.group = adapter, factors, group

    def __call__(
        self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> Tensor:
        if not self.adapter.enabled:
            return output
        # bitsandbytes calls its argument x, torch calls it input.
        x, factors = args[0] if args else next(iter(kwargs.values())), self.factors
        factors.move_to(x.device)
        R = factors.mixing(self.adapter.vectors[self.group])
        # The r-dimensional middle and v's gradient stay in float32, under autocast too: they cost nothing.
        device = x.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            if self.adapter.config.arithmetic == "float32":
                narrow = F.linear(F.linear(x.float(), factors.right), R)
                return (output + F.linear(narrow, factors.left)).to(output.dtype)
            left, right = factors.left.to(output.dtype), factors.right.to(output.dtype)
            if not self._is_fresh(module, output):
                output = output.clone()
            added: Tensor = _Added.apply(output, x.to(output.dtype), R, left, right)  # type: ignore[no-untyped-call]
            return added

    def _is_fresh(self, module: nn.Module, output: Tensor) -> bool:
        """Whether nobody else can have seen the output yet, so that it may be changed in place."""
        plain = type(module) is nn.Linear and next(iter(module._forward_hooks.values())) is self
        return plain and not output._is_view() and output.is_contiguous()


class _Added(torch.autograd.Function):
    """``output + x rightᵀ Rᵀ leftᵀ``, made where the output lies: a second tensor of its size would cost the most.

    It has a gradient, and no gradient of the gradient.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, R: Tensor, left: Tensor, right: Tensor) -> Tensor:
        narrow = F.linear(x, right).view(-1, len(right)).float()
        output.view(-1, len(left)).addmm_(F.linear(narrow, R).to(left.dtype), left.T)
        ctx.save_for_backward(narrow, R, left, right)
        ctx.mark_dirty(output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        narrow, R, left, right = ctx.saved_tensors
        # From the left: with the two or so columns of the factor on the right, BLAS takes three times as long.
        onto_left = (left.T @ gradient.reshape(-1, len(left)).T).T.float()
        of_x = None
        if ctx.needs_input_grad[1]:
            of_x = ((onto_left @ R).to(right.dtype) @ right).view(*gradient.shape[:-1], right.shape[1])
        return gradient, of_x, onto_left.T @ narrow, None, None
