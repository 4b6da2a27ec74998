"""Several processes that train one policy: each takes its share of the prompts, and what they find is put together.

Nothing here is needed where there is one process, and everything then returns what it was given. The processes are
those of ``torch.distributed`` (``accelerate launch`` or ``torchrun`` starts them); who starts them initialises it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0; 0 writes the files."""
    return dist.get_rank() if count() > 1 else 0


def share(total: int, what: str) -> slice:
    """The places of ``total`` that are this process's own: as many as any other's, in the order of the ranks.

    Raises:
        ValueError: ``total`` cannot be shared equally.
    """
    if total % count():
        raise ValueError(f"{what}={total} cannot be shared by {count()} processes; make it a multiple of {count()}")
    each = total // count()
    return slice(rank() * each, (rank() + 1) * each)


def added(tensor: Tensor) -> Tensor:
    """The sum over the processes, of the same shape and dtype everywhere; a new tensor where there are several."""
    if count() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def largest(value: float, device: torch.device) -> float:
    """The largest of the processes' values."""
    if count() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float32, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor)


def joined(tensor: Tensor) -> Tensor:
    """The processes' tensors, equal in shape, one after the other along the first axis."""
    if count() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(count())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def gathered(value: Any) -> list[Any]:
    """What every process holds, in the order of the ranks; anything that can be pickled."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def wait() -> None:
    """Goes on when every process is here."""
    if count() > 1:
        dist.barrier()
