"""What an adapted layer computes: its own output, and three thin products beside it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinylora_lite.factors import Factors

if TYPE_CHECKING:
    from tinylora_lite.adapter import TinyLoraAdapter


class AddUpdate:
    """The forward hook of one module: adds ``x rightᵀ Rᵀ leftᵀ`` to its output; an object, so that it can be pickled.

    The sum is made where the output lies: a second tensor of that size would cost more than the products.

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
        as_peft = self.adapter.config.arithmetic == "float32"
        dtype = torch.float32 if as_peft else output.dtype
        factors.move_to(x.device)
        R = factors.mixing(self.adapter.vectors[self.group])
        # The r-dimensional middle and v's gradient stay in float32, under autocast too: they cost nothing.
        device = x.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            narrow = F.linear(x.to(dtype), factors.right.to(dtype)).float()
            narrow, left = F.linear(narrow, R).to(dtype), factors.left.to(dtype)
            if as_peft:
                return (output + F.linear(narrow, left)).to(output.dtype)
            if output._is_view() or not output.is_contiguous():
                return output + F.linear(narrow, left)
            output.flatten(0, -2).addmm_(narrow.flatten(0, -2), left.T)
            return output
