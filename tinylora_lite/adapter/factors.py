"""What is frozen in one adapted module: the two long factors of its weight, and P between them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tinylora_lite.adapter.basis import Basis
from tinylora_lite.adapter.config import TinyLoraConfig
from tinylora_lite.adapter.projection import random_projection
from tinylora_lite.adapter.svd import Decomposition

LEFT_POWER = {"left": 1.0, "split": 0.5, "right": 0.0}


@dataclass
class Factors:
    """The frozen part of one module's update ``left @ R @ right``, float32.

    Attributes:
        left: ``[out, r]``, U with its share of Σ.
        right: ``[r, in]``, Vᵀ with its share of Σ.
        projection: P, ``[u, r, r]``.
        spectrum: ``[2]`` the last singular value kept and the first one left out; zeros where the factors were given.
        portable: whether another machine computes the same from the weight; ``False`` where they were given.
    """

    left: Tensor
    right: Tensor
    projection: Tensor
    spectrum: Tensor = field(default_factory=lambda: torch.zeros(2))
    portable: bool = False

    def mixing(self, v: Tensor) -> Tensor:
        """R of a vector ``[u]``: ``Σᵢ vᵢ Pᵢ``, ``[r, r]`` float32, under autocast too; differentiable in v."""
        with torch.autocast(self.projection.device.type, enabled=False):
            return torch.einsum("u,ujk->jk", v.to(self.projection.device), self.projection)

    def move_to(self, device: torch.device) -> None:
        """Moves the factors to a device, where they are not there yet."""
        if self.left.device != device:
            self.left, self.right = self.left.to(device), self.right.to(device)
            self.projection = self.projection.to(device)

    def check(self, name: str, shape: tuple[int, ...], config: TinyLoraConfig) -> None:
        """Raises ``ValueError`` where given factors do not fit a module of a shape, or are not finite float32."""
        r, u = config.rank, config.u
        for part, wanted in (("left", (shape[0], r)), ("right", (r, shape[1])), ("projection", (u, r, r))):
            tensor = getattr(self, part)
            if tuple(tensor.shape) != wanted or tensor.dtype != torch.float32:
                found = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                raise ValueError(f"{name}: the given factor {part} is {found}, not torch.float32 of shape {wanted}")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name}: the given factor {part} holds NaN or infinity")


def factors_of(triplets: Decomposition, config: TinyLoraConfig, index: int, name: str) -> Factors:
    """The factors that a config asks for, from the singular triplets of a weight.

    Args:
        triplets: the weight's truncated SVD.
        config: rank, u, seed, sigma and projection count.
        index: the module's place in tying order, which its random P depends on.
        name: the module's name, by which a calibrated basis knows it.
    """
    P = projection_of(config, index, name)
    S, power = triplets.S, LEFT_POWER[config.sigma]
    return Factors(
        left=triplets.U * S**power,
        right=S[:, None] ** (1 - power) * triplets.Vh,
        projection=P.to(S.device),
        spectrum=torch.stack([S[-1], triplets.beyond]).cpu(),
        portable=triplets.portable,
    )


def projection_of(config: TinyLoraConfig, index: int, name: str) -> Tensor:
    """P of a module, ``[u, r, r]`` float32; arguments as in :func:`factors_of`."""
    if isinstance(config.projection, Basis):
        P = config.projection.projection(name, config.u)
    elif config.projection == "identity":
        P = torch.eye(config.u)
    else:
        P = random_projection(config.seed, index, config.u, config.rank)
    return P.reshape(config.u, config.rank, config.rank).float()
