"""Adam on v, as :func:`~tinylora_lite.train_grpo` steps it, inside another trainer's loop."""

from __future__ import annotations

import math
from typing import Any

import torch

from tinylora_lite.utils import distributed


class JoinedAdam(torch.optim.Adam):
    """Adam on one tensor that every process holds.

    The processes' gradients are averaged and shortened to ``max_norm``; where there is none, because every group
    agrees, nothing moves. Trainer clears the gradients of the model's parameters only, so this one clears v's.

    Attributes:
        max_norm: the longest gradient.
        gradient_norm: of the last step, before it was shortened.
    """

    max_norm = math.inf
    gradient_norm = 0.0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step. Raises ``FloatingPointError`` where the gradient is not finite; nothing has moved then."""
        (v,) = self.param_groups[0]["params"]
        v.grad = distributed.all_reduce(torch.zeros_like(v) if v.grad is None else v.grad) / distributed.world_size()
        self.gradient_norm = torch.nn.utils.clip_grad_norm_([v], self.max_norm).item()
        if not math.isfinite(self.gradient_norm):
            raise FloatingPointError("the gradient is not finite; lower the learning rate, or load a wider dtype")
        if self.gradient_norm > 0:
            super().step(closure)
        self.zero_grad()
