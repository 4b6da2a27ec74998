"""The frozen random directions P, the same from the same seed on every machine and in every version."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


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
