"""A frozen base spread over the processes, and gathered block by block while it computes (FSDP2).

Each process loads the whole base first, since its weights are decomposed; what is saved is memory in training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from tinylora_lite.utils import distributed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shard(model: PreTrainedModel) -> None:
    """Spreads the weights over the processes, in place; each block's are together only while it computes.

    To be called after :func:`~tinylora_lite.attach`, which decomposes whole weights. The adapter's own few
    numbers and factors stay whole in every process.

    Raises:
        ValueError: there is one process only, or the model's blocks cannot be told.
    """
    if distributed.world_size() == 1:
        raise ValueError("one process has nobody to share weights with; set shard=false, or use accelerate launch")
    from torch.distributed.fsdp import fully_shard

    kinds = set(model._no_split_modules or ())
    blocks = [module for module in model.modules() if type(module).__name__ in kinds]
    if not blocks:
        raise ValueError(f"{type(model).__name__} does not say which modules are its blocks; set shard=false")
    for block in blocks:
        fully_shard(block)
    fully_shard(model)


def is_sharded(model: nn.Module) -> bool:
    """Whether :func:`shard`, or FSDP2 by other hands, has spread the model's weights.

    Every forward pass is then one that all processes make together.
    """
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A weight with all of its shards together; all processes call this together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
