"""The truncated SVD that TinyLoRA's frozen factors come from, with signs that every machine agrees on."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT_UP_TO = 512
"""Matrices whose smaller side is at most this are decomposed exactly: it takes well under a second."""


def truncated_svd(weight: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` leading singular triplets of a matrix, ``weight ≈ U @ diag(S) @ Vh``.

    Singular vectors come in pairs of free sign, and LAPACK, cuSOLVER and randomised methods choose differently.
    Here the entry of largest magnitude in each column of ``U`` is positive, so that the same numbers ``v`` mean
    the same update everywhere. Where two singular values agree to about twelve digits their vectors are free to
    rotate into each other, and no rule makes them agree between machines; the sum ``U @ diag(S) @ Vh`` still
    does, unless the tie is between the last value kept and the first one left out.

    Small matrices are decomposed exactly. Where ``rank`` is far below both sides, a randomised block Krylov method
    (Musco and Musco, arXiv 1504.05477) iterates until the vectors stand still to five digits; where they never do, the
    matrix is decomposed exactly. All is computed in float64: in float32, rounding alone turns vectors whose singular
    values lie within 0.1 % of each other.

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
    # Apple's GPUs know no float64.
    matrix = (weight.detach().cpu() if weight.device.type == "mps" else weight.detach()).double()
    if not torch.isfinite(matrix).all():
        raise ValueError("the weight holds NaN or infinity and has no SVD; load the model again, or in another dtype")
    if smaller <= EXACT_UP_TO or rank * 8 > smaller:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        U, S, Vh = _block_krylov(matrix, rank, seed)
    U, S, Vh = canonical_signs(U[:, :rank], S[:rank], Vh[:rank])
    return U.to(weight.device, torch.float32), S.to(weight.device, torch.float32), Vh.to(weight.device, torch.float32)


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


def _block_krylov(
    matrix: Tensor,
    rank: int,
    seed: int,
    oversampling: int = 14,
    depth: int = 8,
    tolerance: float = 1e-5,
    most: int = 40,
) -> tuple[Tensor, Tensor, Tensor]:
    """Restarted: every cycle spans ``depth`` blocks from the best right singular vectors so far."""
    width = rank + oversampling
    depth = min(depth, min(matrix.shape) // width)
    # Drawn on the CPU, so that a GPU starts from the same numbers.
    start = torch.randn(width, matrix.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # Vectors are rows here: thin products from the left are three times as fast as from the right.
    block = _orthonormal_rows(start.to(matrix.device))
    for _ in range(most):
        basis, image = block, block @ matrix.T
        for _ in range(depth - 1):
            # All rows at once: where a matrix of low rank has no new direction left, Householder's QR still makes
            # rows that stand on the old ones; subtracting those and normalising would enlarge mere rounding.
            block = _orthonormal_rows(torch.cat([basis, image[-width:] @ matrix]))[-width:]
            basis, image = torch.cat([basis, block]), torch.cat([image, block @ matrix.T])
        mixture, S, Ut = torch.linalg.svd(image, full_matrices=False)
        block = mixture[:, :width].T @ basis
        # A vector's angle to the true one is at most about residual / distance to the next singular value.
        residuals = torch.linalg.vector_norm(Ut[:rank] @ matrix - S[:rank, None] * block[:rank], dim=1)
        distances = (S[:rank] - S[1 : rank + 1]).clamp(min=1e-6 * float(S[0]))
        if (residuals <= tolerance * distances).all():
            return Ut[:rank].T, S[:rank], block[:rank]
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank], S[:rank], Vh[:rank]


def _orthonormal_rows(block: Tensor) -> Tensor:
    Q: Tensor = torch.linalg.qr(block.T)[0]
    return Q.T
