"""The truncated SVD that TinyLoRA's frozen factors come from, with signs that every machine agrees on.

Small matrices are decomposed exactly, in float64. Where the rank is far below both sides, ARPACK's Lanczos iteration
(Lehoucq, Sorensen and Yang 1998, through SciPy) runs on products with the weight, which stays on its device.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinylora_lite.utils.distributed import one_thread

EXACT_UP_TO = 512  # A matrix whose smaller side is at most this is decomposed exactly, well under a second.
EXACT_AT_WORST = 1024  # Up to this smaller side, so is one on which the iteration does not converge.
MOST_RESTARTS = 30  # Directions that stand out at all take one to five.
CLOSE = 1e-3  # Values closer than this, as a fraction of the largest, are told apart by products in float64.
EQUAL = 1e-5  # Values closer than this count as one, whose vectors may rotate freely.


@dataclass(frozen=True)
class Decomposition:
    """What :func:`truncated_svd` gives, and what is known beyond it.

    Attributes:
        U, S, Vh: the leading singular triplets.
        beyond: the first singular value left out, ``[]`` float32; 0 where there is none.
        portable: whether other machines find the same vectors: no two of the values kept and the first left out are
            closer than 1e-5 of the largest, and the iteration settled.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    beyond: Tensor
    portable: bool


def truncated_svd(weight: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` leading singular triplets of a matrix, ``weight ≈ U @ diag(S) @ Vh``.

    The entry of largest magnitude in each column of ``U`` is positive, so that the same v means the same update on any
    machine. Vectors whose singular values agree to five digits may rotate into each other, and no rule makes them agree
    between machines (:func:`decompose` reports it). A large matrix without leading directions, one of mere noise for
    instance, may not converge; it gets a good approximation of low rank.

    Args:
        weight: ``[out, in]``, any floating dtype.
        rank: how many triplets, at least 1 and at most ``min(out, in)``.
        seed: of the random start of the iteration.

    Returns:
        ``U [out, rank]``, ``S [rank]`` in falling order, ``Vh [rank, in]``, all float32 on the weight's device.

    Raises:
        ValueError: ``weight`` is no matrix, has no values or no floating-point ones, or holds NaN or infinity, or
            ``rank`` is no integer or is outside ``1 … min(out, in)``.
    """
    found = decompose(weight, rank, seed)
    return found.U, found.S, found.Vh


def decompose(weight: Tensor, rank: int, seed: int = 0) -> Decomposition:
    """:func:`truncated_svd` with what is known beyond it; same arguments and errors."""
    _check(weight, rank)
    # Apple's GPUs know no float64.
    matrix = weight.detach().cpu() if weight.device.type == "mps" else weight.detach()
    smaller, settled = min(matrix.shape), False
    with one_thread() if smaller <= EXACT_AT_WORST else nullcontext():
        largest = max(abs(float(bound)) for bound in matrix.aminmax())
        if not math.isfinite(largest):
            raise ValueError("the weight holds NaN or infinity and has no SVD; load the model again")
        scale = 1.0 if 1e-10 < largest < 1e10 or largest == 0 else 2.0 ** math.floor(math.log2(largest))
        matrix = matrix if scale == 1 else matrix.double() / scale  # squares stay within float32's range
        tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
        if smaller > EXACT_UP_TO and rank * 8 <= smaller:
            left, values, right, settled = _leading(tall, rank, seed)
        if not settled and smaller <= EXACT_AT_WORST:
            left, values, right = torch.linalg.svd(tall.double(), full_matrices=False)
            settled = True
    if tall is not matrix:
        left, right = right.T, left.T
    U, S, Vh = canonical_signs(left[:, :rank], values[:rank], right[:rank])
    beyond = values[rank] if rank < smaller else values.new_zeros(())
    apart = S - torch.cat([S[1:], beyond[None]]) > EQUAL * S[0]
    parts = (U, S * scale, Vh, beyond * scale)
    U, S, Vh, beyond = (part.to(weight.device, torch.float32) for part in parts)
    return Decomposition(U, S, Vh, beyond, settled and bool(apart.all()))


def canonical_signs(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same decomposition, with the entry of largest magnitude in each column of ``U`` positive.

    Of entries that tie for the largest, up to the rounding of an SVD, the first decides.
    """
    magnitudes = U.abs()
    # argmax returns the first of equals for integers too, and unlike nonzero it needs no loop over columns.
    first = (magnitudes >= (1 - 1e-4) * magnitudes.amax(dim=0)).int().argmax(dim=0)
    signs = torch.where(U.gather(0, first[None])[0] < 0, -1.0, 1.0).to(U.dtype)
    return (U * signs).contiguous(), S.contiguous(), (Vh * signs[:, None]).contiguous()


def _leading(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor, bool]:
    """``rank + 1`` leading triplets of a tall matrix, in float64, and whether the iteration converged."""
    found = _arpack(matrix.float(), rank + 1, seed)
    if found is None:
        with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
            torch.manual_seed(seed)
            left, values, right = torch.svd_lowrank(matrix.float(), q=rank + 16, niter=16)
        return left.double(), values.double(), right.T.double(), False
    if not (found[1].diff().abs() < CLOSE * found[1][0]).any():
        return *found, True
    exact = _arpack(matrix.double(), rank + 1, seed)
    return *(exact or found), exact is not None


def _arpack(matrix: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Leading triplets from products with the matrix, in its dtype; ``None`` where the iteration does not converge."""
    from scipy.sparse.linalg import ArpackError, LinearOperator, svds

    def times(matrix: Tensor, x: np.ndarray) -> np.ndarray:
        return (matrix @ torch.from_numpy(x.reshape(-1)).to(matrix)).cpu().double().numpy()

    operator = LinearOperator(
        matrix.shape, matvec=lambda x: times(matrix, x), rmatvec=lambda y: times(matrix.T, y), dtype=np.float64
    )
    start = np.random.default_rng(seed).standard_normal(matrix.shape[1])
    tolerance = 1e-5 if matrix.dtype == torch.float32 else 1e-7  # svds squares it
    try:
        left, values, right = svds(operator, k=count, v0=start, tol=tolerance, maxiter=MOST_RESTARTS)
    except ArpackError:  # it did not converge, or the matrix is zero
        return None
    order = np.argsort(-values)
    parts = (left[:, order], values[order], right[order])
    left, values, right = (torch.from_numpy(part.copy()).to(matrix.device) for part in parts)
    return left, values, right


def _check(weight: Tensor, rank: int) -> None:
    if weight.ndim != 2:
        raise ValueError(f"truncated_svd takes a matrix, not a tensor of shape {tuple(weight.shape)}")
    if weight.is_meta:
        raise ValueError("the weight is on the meta device and has no values; load it first")
    if not weight.is_floating_point():
        raise ValueError(f"the weight holds {weight.dtype}, no floating-point numbers; convert it with .float()")
    if type(rank) is not int or not 1 <= rank <= min(weight.shape):
        bounds = f"from 1 to {min(weight.shape)} for a weight of {tuple(weight.shape)}"
        raise ValueError(f"rank must be an integer {bounds}, not {rank!r}")
