"""The leading singular triplets of a large matrix in a few passes over it: block Krylov iteration.

Every block of vectors is the last one multiplied by WᵀW, and the answer is the best one in the span of all blocks
(Musco and Musco, arXiv 1504.05477). Subspace iteration looks for it in the last block alone and needs more passes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WIDTH = 16
"""Vectors multiplied at once, at least: a CPU multiplies half as many no faster."""
ROWS = 512
"""Rows of the matrix multiplied at once: small enough to be in the cache still when the way back needs them."""
SAMPLE = 8
"""One row of so many is in the sample on which a start is found."""
NOISE = 0.1
"""How much of the start is random, beside what the sample says."""
MOST_BLOCKS = 24
"""When the iteration gives up; directions that stand out at all take three to eight blocks."""
ANGLE = 1e-4
"""How far a vector may stand out of the true ones' span, in radians; equal starts stop alike everywhere."""
TURN = 3e-5
"""How far rounding may turn a vector towards its neighbours, in radians: this part differs from machine to machine."""
EQUAL = 1e-5
"""Values closer than this, as a fraction of the largest, count as one value, whose vectors may turn freely."""
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-13}
"""What rounding leaves of a residual, as a fraction of the largest value."""


@dataclass(frozen=True)
class Triplets:
    """Approximate singular triplets; ``leftᵀ · matrix`` is ``values · right`` but for a residual.

    Attributes:
        left: ``[n, k]``, orthonormal columns.
        values: ``[k]`` float64, in falling order.
        right: ``[k, m]``, orthonormal rows.
        residuals: ``[k]`` float64, norms; each residual is orthogonal to the whole span that was searched.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    residuals: Tensor

    def settled(self, rank: int) -> bool:
        """Whether the first ``rank`` vectors are within ``ANGLE`` and ``TURN`` of the true ones.

        A residual turns a vector out of the span by its size over the distance to the values out there, and towards
        a neighbour in the span only by its square over the distances; rounding turns it there by itself.
        """
        values, residuals, rounding = self.values, self.residuals[:rank], ROUNDING[self.left.dtype] * self.values[0]
        after = values[:rank] - values[1 : rank + 1]
        gaps = torch.minimum(after, torch.cat([after[:1], after[:-1]]))
        gaps = torch.where(gaps > EQUAL * values[0], gaps, values[:rank])
        outwards = residuals <= ANGLE * (values[:rank] - values[-1])
        inwards = residuals**2 + rounding * values[:rank] <= TURN * gaps * values[:rank]
        return bool((outwards & inwards).all())


def leading_triplets(matrix: Tensor, rank: int, seed: int) -> tuple[Triplets, bool]:
    """More than ``rank`` leading triplets, and whether the first ``rank`` of them settled.

    The passes are in float32; where values lie too close for that, a few in float64 follow.

    Args:
        matrix: ``[n, m]`` floating, ``n >= m``, and ``m`` far above ``rank``.
        rank: how many triplets are to settle.
        seed: of the random start.

    The matrix must be finite, and its largest entry neither so large nor so small that squares leave float32's range.
    """
    found, done = _krylov(matrix.float(), rank, _start(matrix, max(WIDTH, rank + 8), seed))
    if done and not found.settled(rank):
        found, done = _krylov(matrix, rank, found.right.double())
    return found, done and found.settled(rank)


def _start(matrix: Tensor, width: int, seed: int) -> Tensor:
    """``[width, m]`` orthonormal rows near the leading ones, by subspace iteration on a sample of the matrix's rows."""
    # Drawn on the CPU, so that a GPU starts from the same numbers.
    noise = torch.randn(width, matrix.shape[1], generator=torch.Generator().manual_seed(seed)).to(matrix.device)
    block = noise
    sample = matrix[::SAMPLE].float().contiguous()
    for _ in range(5):
        _, block = _there_and_back(sample, _orthonormal(block))
    # Products never leave the span of the sampled rows; where other rows stand across it, as in a block-diagonal
    # matrix, only noise leads there.
    return _orthonormal(_orthonormal(block) + NOISE * noise / matrix.shape[1] ** 0.5)


def _krylov(matrix: Tensor, rank: int, block: Tensor) -> tuple[Triplets, bool]:
    """As many triplets as the block has rows, in its dtype, and whether the residuals fell as far as they have to."""
    width, dtype = len(block), block.dtype
    span, backs, images = block[:0], block[:0], block.new_empty(len(matrix), 0)
    core = torch.zeros(0, 0, dtype=torch.float64, device=matrix.device)
    for _ in range(max(1, min(MOST_BLOCKS, matrix.shape[1] // width - 1))):
        block = _orthonormal(block, span)
        image, back = _there_and_back(matrix, block)
        span, backs = torch.cat([span, block]), torch.cat([backs, back])
        images, core = _append(images, core, image)
        rotation, values, mixture = torch.linalg.svd(core)
        rotation, values, mixture = rotation[:, :width].to(dtype), values[:width], mixture[:width].to(dtype)
        right, onward = mixture @ span, mixture @ backs / values[:, None].clamp(min=1e-30)
        residuals = torch.linalg.vector_norm(onward - values[:, None] * right, dim=1)
        found = Triplets(images @ rotation, values, right, residuals)
        enough = (ANGLE * (values[:rank] - values[-1])).clamp(min=ROUNDING[dtype] * values[0])
        if (residuals[:rank] <= enough).all():
            return found, True
        block = back
    return found, False


def _there_and_back(matrix: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """``matrix @ blockᵀ`` ``[n, k]`` and ``its transpose @ matrix`` ``[k, m]``, in the block's dtype and one pass."""
    image = block.new_empty(matrix.shape[0], len(block))
    back, across = torch.zeros_like(block), block.T.contiguous()
    for rows, part in zip(matrix.split(ROWS), image.split(ROWS), strict=True):
        rows = rows.to(block.dtype)
        back.addmm_(torch.mm(rows, across, out=part).T, rows)
    return image, back


def _append(images: Tensor, core: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """``images @ core``, the QR decomposition of all images so far, extended by one more."""
    old, new = len(core), image.shape[1]
    inside, factor = torch.zeros_like(images.T @ image), torch.eye(new, dtype=image.dtype, device=image.device)
    # Twice: what stands almost in the span already is mostly rounding after the first time.
    for _ in range(2):
        overlap = images.T @ image
        inside += overlap @ factor
        image, upper = torch.linalg.qr(image - images @ overlap)
        factor = upper @ factor
    extended = core.new_zeros(old + new, old + new)
    extended[:old, :old], extended[:old, old:], extended[old:, old:] = core, inside, factor
    return torch.cat([images, image], dim=1), extended


def _orthonormal(block: Tensor, span: Tensor | None = None) -> Tensor:
    """Orthonormal rows that span the block's part outside a span of orthonormal rows."""
    for _ in range(1 if span is None else 2):
        if span is not None:
            block = block - block @ span.T @ span
        block = torch.linalg.qr(block.T)[0].T
    return block.contiguous()
