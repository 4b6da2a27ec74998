"""The truncated SVD that TinyLoRA's frozen factors come from, with signs that every machine agrees on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tinylora_lite.adapter.krylov import EQUAL, leading_triplets

EXACT_UP_TO = 512
"""Matrices whose smaller side is at most this are decomposed exactly: it takes well under a second."""
EXACT_AT_WORST = 1024
"""Up to this smaller side, so is a matrix on which the iteration does not settle."""


@dataclass(frozen=True)
class Decomposition:
    """The leading singular triplets of a matrix, ``weight ≈ U @ diag(S) @ Vh``.

    Attributes:
        U: ``[out, rank]`` float32, orthonormal columns with canonical signs.
        S: ``[rank]`` float32, in falling order.
        Vh: ``[rank, in]`` float32, orthonormal rows.
        beyond: the first singular value left out, ``[]`` float32; 0 where there is none.
        portable: whether other machines find the same vectors: no two of the values kept and the first left out lie
            closer than 1e-5 of the largest, and the iteration settled.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    beyond: Tensor
    portable: bool


def truncated_svd(weight: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` leading singular triplets of a matrix, ``weight ≈ U @ diag(S) @ Vh``.

    Singular vectors come in pairs of free sign, and LAPACK, cuSOLVER and randomised methods choose differently.
    Here the entry of largest magnitude in each column of ``U`` is positive, so that the same numbers ``v`` mean
    the same update everywhere. Where two singular values agree to five digits their vectors are free to
    rotate into each other, and no rule makes them agree between machines; the sum ``U @ diag(S) @ Vh`` still
    does, unless the tie is between the last value kept and the first one left out (:func:`decompose` says so).

    Small matrices are decomposed exactly, in float64. Where ``rank`` is far below both sides, block Krylov iteration
    (Musco and Musco, arXiv 1504.05477) runs in float32 until the residuals say that every vector stands still to
    1e-4 radians, and in float64 where singular values lie too close for that. A large matrix without leading
    directions, one of mere noise for instance, never settles; it gets a good approximation of low rank.

    Args:
        weight: ``[out, in]``, any floating dtype.
        rank: how many triplets, at least 1 and at most ``min(out, in)``.
        seed: of the random start of the iteration.

    Returns:
        ``U [out, rank]``, ``S [rank]`` in falling order, ``Vh [rank, in]``, all float32 on the weight's device.

    Raises:
        ValueError: ``weight`` is no matrix, has no values or no floating-point ones, or holds NaN or infinity, or
            ``rank`` is no whole number or lies outside ``1 … min(out, in)``.
    """
    found = decompose(weight, rank, seed)
    return found.U, found.S, found.Vh


def decompose(weight: Tensor, rank: int, seed: int = 0) -> Decomposition:
    """:func:`truncated_svd` with what is known beyond it; same arguments and errors."""
    _check(weight, rank)
    # Apple's GPUs know no float64.
    matrix = weight.detach().cpu() if weight.device.type == "mps" else weight.detach()
    scale = _scale(matrix)
    matrix = matrix if scale == 1 else matrix.double() / scale
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    smaller, settled = tall.shape[1], False
    if smaller > EXACT_UP_TO and rank * 8 <= smaller:
        found, settled = leading_triplets(tall, rank, seed)
        left, values, right = found.left, found.values, found.right
    if not settled and smaller <= EXACT_AT_WORST:
        left, values, right = torch.linalg.svd(tall.double(), full_matrices=False)
        settled = True
    if tall is not matrix:
        left, right = right.T, left.T
    U, S, Vh = canonical_signs(left[:, :rank], values[:rank], right[:rank])
    beyond = values[rank] if rank < smaller else values.new_zeros(())
    apart = S - torch.cat([S[1:], beyond[None]]) > EQUAL * S[0]
    portable = settled and bool(apart.all())
    parts = (U, S * scale, Vh, beyond * scale)
    U, S, Vh, beyond = (part.to(weight.device, torch.float32) for part in parts)
    return Decomposition(U, S, Vh, beyond, portable)


def _scale(matrix: Tensor) -> float:
    """What to divide by so that squares stay within float32's range; 1 for the weights of any usual model."""
    low, high = (float(bound) for bound in matrix.aminmax())
    largest = max(-low, high)
    if not math.isfinite(largest):
        raise ValueError("the weight holds NaN or infinity and has no SVD; load the model again")
    return 1.0 if 1e-10 < largest < 1e10 or largest == 0 else 2.0 ** math.floor(math.log2(largest))


def canonical_signs(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same decomposition, with the entry of largest magnitude in each column of ``U`` positive.

    Of entries that tie for the largest, up to the rounding of an SVD, the first decides.
    """
    magnitudes = U.abs()
    # argmax returns the first of equals for integers too, and unlike nonzero it needs no loop over columns.
    first = (magnitudes >= (1 - 1e-4) * magnitudes.amax(dim=0)).int().argmax(dim=0)
    negative = U.gather(0, first[None])[0] < 0
    signs = torch.where(negative, -1.0, 1.0).to(U.dtype)
    return (U * signs).contiguous(), S.contiguous(), (Vh * signs[:, None]).contiguous()


def _check(weight: Tensor, rank: int) -> None:
    if weight.ndim != 2:
        raise ValueError(f"truncated_svd takes a matrix, not a tensor of shape {tuple(weight.shape)}")
    if weight.is_meta:
        raise ValueError("the weight is on the meta device and has no values; load it first")
    if not weight.is_floating_point():
        raise ValueError(f"the weight holds {weight.dtype}, no floating-point numbers; convert it with .float()")
    smaller = min(weight.shape)
    if type(rank) is not int:
        raise ValueError(f"rank must be a whole number, not {rank!r}")
    if not 1 <= rank <= smaller:
        raise ValueError(f"rank must be between 1 and {smaller} for a weight of {tuple(weight.shape)}, not {rank}")
