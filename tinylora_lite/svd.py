"""The truncated SVD that TinyLoRA's frozen factors come from, with signs that every machine agrees on."""

from __future__ import annotations

import torch
from torch import Tensor


def truncated_svd(weight: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` leading singular triplets of a matrix, ``weight ≈ U @ diag(S) @ Vh``.

    Singular vectors come in pairs of free sign, and LAPACK, cuSOLVER and randomised methods choose differently.
    Here the entry of largest magnitude in each column of ``U`` is positive, so that the same numbers ``v`` mean
    the same update everywhere.

    Small matrices are decomposed exactly. Where ``rank`` is far below both sides, randomised subspace iteration
    (Halko, Martinsson and Tropp, arXiv 0909.4061) iterates until the leading singular values stand still.

    Args:
        weight: ``[out, in]``, any floating dtype; computed in float32.
        rank: how many triplets, at least 1 and at most ``min(out, in)``.
        seed: of the random start of the subspace iteration.

    Returns:
        ``U [out, rank]``, ``S [rank]`` in falling order, ``Vh [rank, in]``, all float32 on the weight's device.

    Raises:
        ValueError: ``weight`` is no matrix, or ``rank`` lies outside ``1 … min(out, in)``.
    """
    if weight.ndim != 2:
        raise ValueError(
            f"truncated_svd takes a matrix, not a tensor of shape {tuple(weight.shape)}"
        )
    smaller = min(weight.shape)
    if not 1 <= rank <= smaller:
        raise ValueError(
            f"rank must be between 1 and {smaller} for a weight of {tuple(weight.shape)}, not {rank}"
        )
    matrix = weight.detach().float()
    if smaller <= EXACT_UP_TO or rank * 8 > smaller:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        U, S, Vh = _subspace_iteration(matrix, rank, seed)
    return canonical_signs(U[:, :rank], S[:rank], Vh[:rank])


EXACT_UP_TO = 512
"""Matrices whose smaller side is at most this are decomposed exactly: it takes well under a second."""


def canonical_signs(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same decomposition, with the entry of largest magnitude in each column of ``U`` positive."""
    columns = torch.arange(U.shape[1], device=U.device)
    signs = torch.sign(U[U.abs().argmax(dim=0), columns])
    return (U * signs).contiguous(), S.contiguous(), (Vh * signs[:, None]).contiguous()


def _subspace_iteration(
    matrix: Tensor,
    rank: int,
    seed: int,
    oversampling: int = 14,
    tolerance: float = 1e-6,
    most: int = 200,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], rank + oversampling, generator=generator)
    Q, _ = torch.linalg.qr(matrix @ start.to(matrix.device))
    before = None
    for _ in range(most):
        Q, _ = torch.linalg.qr(matrix.T @ Q)
        Q, triangle = torch.linalg.qr(matrix @ Q)
        values = torch.linalg.svdvals(triangle)[:rank]
        if before is not None and (values - before).abs().max() <= tolerance * values[0]:
            break
        before = values
    U, S, Vh = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
    return Q @ U, S, Vh
