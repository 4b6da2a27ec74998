"""What an adapted layer computes: its own output, and three thin products beside it; and P, the frozen directions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tinylora_lite.adapter.attached import KEPT, Hook
from tinylora_lite.adapter.config import TinyLoraConfig
from tinylora_lite.adapter.svd import Decomposition
from tinylora_lite.adapter.weights import weight_shape

if TYPE_CHECKING:
    from tinylora_lite.adapter.adapter import TinyLoraAdapter

LEFT_POWER = {"left": 1.0, "split": 0.5, "right": 0.0}
"""The power of Σ beside U, for each ``sigma``; the rest is beside Vᵀ."""


@dataclass
class Factors:
    """The frozen part of one module's update ``left @ R @ right``, float32.

    Attributes:
        left: ``[out, r]``, U with its share of Σ, times the scale.
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

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Left, right and projection."""
        return self.left, self.right, self.projection

    def mixing(self, v: Tensor) -> Tensor:
        """R of a vector ``[u]``: ``Σᵢ vᵢ Pᵢ``, ``[r, r]`` float32, under autocast too; differentiable in v."""
        with _in_float32(self.projection.device.type):
            return torch.einsum("u,ujk->jk", v.to(self.projection.device), self.projection)  # to PEFT's last bit

    def to(self, device: torch.device) -> Factors:
        """Moves the factors to a device, in place, and returns them."""
        if self.left.device != device:
            self.left, self.right, self.projection = (part.to(device) for part in self.parts)
        return self

    def check(self, name: str, module: nn.Module, config: TinyLoraConfig) -> None:
        """Raises ``ValueError`` where given factors do not fit a module, or are not finite float32."""
        r, u, (out, into) = config.rank, config.u, weight_shape(module)
        wanted = {"left": (out, r), "right": (r, into), "projection": (u, r, r)}
        for (what, of), part in zip(wanted.items(), self.parts, strict=True):
            if tuple(part.shape) != of or part.dtype != torch.float32:
                found = f"{part.dtype} of shape {tuple(part.shape)}"
                raise ValueError(f"{name}: the given factor {what} is {found}, not torch.float32 of shape {of}")
            if not torch.isfinite(part).all():
                raise ValueError(f"{name}: the given factor {what} holds NaN or infinity")


def factors_of(triplets: Decomposition, config: TinyLoraConfig, place: int, name: str) -> Factors:
    """The factors of one module from its weight's truncated SVD; ``place`` and ``name`` as :func:`projection_of`."""
    S, power = triplets.S, LEFT_POWER[config.sigma]
    return Factors(
        left=triplets.U * S**power * config.scale,
        right=S[:, None] ** (1 - power) * triplets.Vh,
        projection=projection_of(config, place, name).to(S.device),
        spectrum=torch.stack([S[-1], triplets.beyond]).cpu(),
        portable=triplets.portable,
    )


def drawn_at(config: TinyLoraConfig, modules: Sequence[nn.Module]) -> list[int]:
    """The place in tying order that each module's P is drawn at: its own, or the first with a side as short as its."""
    sides = [min(weight_shape(module)) for module in modules]
    return [sides.index(side) if config.projection == "shared" else i for i, side in enumerate(sides)]


def projection_of(config: TinyLoraConfig, place: int, name: str) -> Tensor:
    """P of a module, ``[u, r, r]`` float32, by the place it is drawn at and, in a calibrated basis, by its name."""
    if not isinstance(config.projection, str):
        return config.projection.projection(name, config.u)
    if config.projection == "identity":
        return torch.eye(config.u).reshape(config.u, config.rank, config.rank)
    drawn = random_projection(config.seed, place, config.u, config.rank)
    return drawn * (config.rank / config.u) ** 0.5 if config.projection == "shared" else drawn


def random_projection(seed: int, module: int, u: int, rank: int) -> Tensor:
    """P of one module, ``[u, r, r]`` float32, entries N(0, 1/r).

    The paper leaves the distribution open; N(0, 1/r) is PEFT's choice. The stream is Philox-4x64-10 with key ``(seed,
    module)``, its 64-bit words w taken in pairs as uniforms ``((w >> 11) + 0.5) / 2⁵³``, and Box-Muller in float64,
    cosine branch first; machines differ by one rounding of float32 at most. The first directions of a longer P are
    those of a shorter one.

    Args:
        seed: 0 … 2⁶⁴ - 1.
        module: the module's position in tying order, counted from 0, so that a module has the same P only where the
            same modules are adapted.
        u: the length of v, at least 1.
        rank: r, at least 1.

    Raises:
        ValueError: ``seed`` or ``module`` is outside 0 … 2⁶⁴ - 1.
    """
    for name, value in (("seed", seed), ("module", module)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name} must be an integer from 0 to 2**64 - 1, not {value!r}")
    count = u * rank * rank
    words = np.random.Philox(key=np.array([seed, module], dtype=np.uint64)).random_raw(count + count % 2)
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53
    radius, angle = np.sqrt(-2.0 * np.log(uniform[0::2])), 2.0 * np.pi * uniform[1::2]
    normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)[:count]
    return torch.from_numpy(normal / np.sqrt(rank)).float().reshape(u, rank, rank)


def _in_float32(device: str) -> AbstractContextManager[object]:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class AddUpdate(Hook):
    """The forward hook of one module: adds ``x rightᵀ Rᵀ leftᵀ`` to its output; an object, so that it can be pickled.

    ``group`` is the row of ``adapter.vectors`` that drives the module; with ``float32`` all of it is in float32.
    """

    adapter: TinyLoraAdapter

    def __init__(self, adapter: TinyLoraAdapter, group: int, factors: Factors, float32: bool) -> None:
        self.adapter, self.group, self.factors, self.float32 = adapter, group, factors, float32

    def __call__(
        self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> Tensor:
        if not self.adapter.enabled:
            return output
        # bitsandbytes calls its argument x, torch calls it input.
        x = args[0] if args else next(iter(kwargs.values()))
        # The r-dimensional middle and v's gradient stay in float32, under autocast too: they cost nothing.
        with _in_float32(x.device.type):
            R, left, right = self.parts(x.device, torch.float32 if self.float32 else output.dtype)
            if self.float32:
                return (output + F.linear(F.linear(F.linear(x.float(), right), R), left)).to(output.dtype)
            # Only what nothing else can have seen yet may be changed in place.
            fresh = type(module) is nn.Linear and next(iter(module._forward_hooks.values())) is self
            if not fresh or output._is_view() or not output.is_contiguous():
                output = output.clone()
            # Where nothing asks for a gradient, autograd's own part would take longer than the products.
            add: Any = _Added.apply if torch.is_grad_enabled() else partial(_Added.forward, None)
            return add(output, x.to(output.dtype), R, left, right)  # type: ignore[no-any-return]

    def parts(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """R, float32, and the factors beside it in a dtype; once where :func:`parameters_stay` says so."""
        kept = KEPT.get()
        if kept is not None and self in kept:
            return kept[self]  # type: ignore[no-any-return]
        factors = self.factors.to(device)
        found = factors.mixing(self.adapter.vectors[self.group]), factors.left.to(dtype), factors.right.to(dtype)
        if kept is not None:
            kept[self] = found
        return found


class _Added(torch.autograd.Function):
    """``output + x rightᵀ Rᵀ leftᵀ``, written over the output: a second tensor of its size would cost the most.

    It has a gradient, and no gradient of the gradient.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, R: Tensor, left: Tensor, right: Tensor) -> Tensor:
        narrow = F.linear(x, right).view(-1, len(right)).float()
        output.view(-1, len(left)).addmm_(F.linear(narrow, R).to(left.dtype), left.T)
        if ctx is not None:
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
