"""Processes and threads. Several processes can train one policy: each takes its share of the prompts.

They are those of ``torch.distributed``; who starts them (``accelerate launch``, ``torchrun``) initialises it. Where
there is one process, everything that is shared here is what was given.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0; 0 writes the files."""
    return dist.get_rank() if world_size() > 1 else 0


def hide_progress(show: bool = True) -> bool | None:
    """The ``disable`` of a tqdm bar: hidden after the first process, where ``TQDM_DISABLE`` is set, and in a log."""
    return True if not show or rank() or os.environ.get("TQDM_DISABLE", "0") != "0" else None


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes on one thread: for small work several wait for one another, long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def shard(total: int, what: str, of: int = 1) -> slice:
    """The places of ``total`` that are this process's own, as many as any other's: a multiple of ``of``.

    Raises:
        ValueError: it cannot be.
    """
    n = world_size()
    if total % (n * of):
        raise ValueError(f"{what}={total} cannot be shared by {n} processes; make it a multiple of {n * of}")
    return slice(rank() * total // n, (rank() + 1) * total // n)


def all_reduce(tensor: Tensor) -> Tensor:
    """The sum over the processes, of the same shape and dtype everywhere; a new tensor where there are several."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def all_reduce_gradients(parameters: Iterable[Tensor], scale: float = 1.0) -> None:
    """Puts the sum of the processes' gradients, divided by ``scale``, in the place of each process's own."""
    for parameter in parameters:
        if world_size() > 1:
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = all_reduce(own)
        if parameter.grad is not None and scale != 1:
            parameter.grad /= scale


def all_gather_object(value: Any) -> list[Any]:
    """What every process holds, in the order of the ranks; anything that can be pickled."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Goes on when every process is here."""
    if world_size() > 1:
        dist.barrier()


def shard_model(model: PreTrainedModel) -> None:
    """Spreads the weights over the processes, in place; each block's are together only while it computes.

    To be called after :func:`~tinylora_lite.attach`, which decomposes whole weights. The adapter's v and factors stay
    whole in every process.

    Raises:
        ValueError: there is one process only, or the model's blocks cannot be told.
    """
    if world_size() == 1:
        raise ValueError("one process has no other to share weights with; set shard=false, or use accelerate launch")
    from torch.distributed.fsdp import fully_shard

    kinds = set(model._no_split_modules or ())
    blocks = [module for module in model.modules() if type(module).__name__ in kinds]
    if not blocks:
        raise ValueError(f"{type(model).__name__} does not say which modules are its blocks; set shard=false")
    for block in blocks:
        fully_shard(block)
    fully_shard(model)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has spread the model's weights; every forward pass is then one that all processes make together."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A weight with all of its shards together; all processes call this together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Of a tensor that every process holds whole, this process's shard where the parameter is sharded."""
    if not hasattr(parameter, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(parameter, DTensor)
    mesh = parameter.device_mesh
    replicated = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(mesh, parameter.placements)
