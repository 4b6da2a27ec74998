"""What every training loop needs: a look at its inputs first, and a model in the right state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tinylora_lite.adapter.adapter import TinyLoraAdapter, adapter_of, carries_updates
from tinylora_lite.sampling.logprobs import recomputes
from tinylora_lite.sampling.sampler import modes_kept
from tinylora_lite.utils import distributed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def ready_to_train(model: PreTrainedModel, adapter: nn.Module | None) -> Iterator[None]:
    """Inside, the right parameters take gradients and dropout is off; afterwards flags and modes are as before.

    Where gradient checkpointing is on, dropout that a recomputed block calls as a function of its own stays on (OPT has
    such blocks); that of the modules inside it is off.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(adapter is None)
    try:
        with modes_kept(model):
            model.eval()
            for module in filter(recomputes, model.modules()):
                module.training = True  # transformers recomputes in training mode only
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def check_adapter(model: PreTrainedModel, adapter: TinyLoraAdapter | None) -> None:
    """Raises ``ValueError`` unless ``adapter`` is the one that the model carries."""
    carried = adapter_of(model)
    if adapter is None and carries_updates(model):
        raise ValueError("the model carries an adapter; pass it, or call its detach() to train all weights")
    if adapter is not carried:
        raise ValueError("the adapter is not attached to this model; pass the model that attach() was given")


def loss_scale(model: PreTrainedModel, count: float) -> float:
    """What a loss that was divided by ``count`` is multiplied by for its backward pass.

    In float16 the gradient of one token among 100,000 is below the smallest number; so the loss stays undivided on its
    way back, and :func:`add_gradients` divides what arrives at v in float32. Other dtypes need no scale.
    """
    return count if model.dtype == torch.float16 else 1.0


def add_gradients(parameters: list[Tensor], scale: float = 1.0) -> None:
    """The sum of the processes' gradients, divided by ``scale``: each loss was divided by the count of all together."""
    for parameter in parameters:
        if distributed.world_size() > 1:
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = distributed.all_reduce(own)
        if parameter.grad is not None and scale != 1:
            parameter.grad /= scale
