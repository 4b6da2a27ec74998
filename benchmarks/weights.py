"""Weights whose truncated SVD is known exactly, as fast to make as to read.

``W = A diag(s) Bᵀ``, where A and B are products of random sign flips and discrete cosine transforms: orthogonal,
without structure that a method could lean on, and made in seconds where a random orthogonal matrix takes minutes.
The spectrum falls as a power of the index, ``sᵢ = i^(-1/2)``: the exponents fitted to the upper half of the spectra
in the nano base's middle block run from 0.48 (down_proj) to 1.2 (o_proj), and the lowest is the hardest.
"""

from __future__ import annotations

import numpy as np
import scipy.fft
import torch
from torch import Tensor

QWEN_7B = {
    "q_proj": (3584, 3584),
    "k_proj": (512, 3584),
    "v_proj": (512, 3584),
    "o_proj": (3584, 3584),
    "gate_proj": (18944, 3584),
    "up_proj": (18944, 3584),
    "down_proj": (3584, 18944),
}
"""The seven weights of one of Qwen2.5-7B's 28 blocks, ``(out, in)``."""


def power_law(count: int, exponent: float = 0.5) -> Tensor:
    """``[count]`` float64, ``i^(-exponent)``."""
    return torch.arange(1, count + 1, dtype=torch.float64) ** -exponent


def cliff(count: int, exponent: float = 0.5, kept: int = 2, gap: float = 0.05) -> Tensor:
    """``[count]`` float64: ``kept`` values, a gap of 5 % after each, and then ``i^(-exponent)``."""
    head = (1 - gap) ** torch.arange(kept + 1, dtype=torch.float64)
    return torch.cat([head[:-1], head[-1] * power_law(count - kept, exponent)])


def with_spectrum(shape: tuple[int, int], values: Tensor, seed: int = 0) -> Tensor:
    """A matrix ``[out, in]`` float32 with the given singular values; the same seed gives the same vectors."""
    generator = np.random.default_rng(seed)
    long, short = max(shape), min(shape)
    core = _mixed(np.diag(values.numpy().astype(np.float32)), 1, generator)
    whole = np.zeros((long, short), dtype=np.float32)
    whole[:short] = core
    matrix = torch.from_numpy(_mixed(whole, 0, generator))
    return matrix if shape[0] >= shape[1] else matrix.T.contiguous()


def truncation(shape: tuple[int, int], values: Tensor, rank: int, seed: int = 0) -> Tensor:
    """The exact truncation ``UΣVᵀ`` of :func:`with_spectrum`'s matrix, to float32's rounding."""
    kept = values.clone()
    kept[rank:] = 0
    return with_spectrum(shape, kept, seed)


def _mixed(matrix: np.ndarray, axis: int, generator: np.random.Generator) -> np.ndarray:
    for _ in range(2):
        signs = generator.choice(np.array([-1, 1], dtype=np.float32), matrix.shape[axis])
        matrix = matrix * (signs[:, None] if axis == 0 else signs)
        matrix = scipy.fft.dct(matrix, axis=axis, norm="ortho")
    return matrix
