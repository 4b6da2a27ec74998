"""The frozen directions P: random (the paper), or calibrated (this project's own).

Random directions are the same from the same seed on every machine and in every version. A calibrated basis is made
once for each base model (``tl.calibrate``) and shared; an adapter on it holds only its own few parameters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_projection(seed: int, module: int, u: int, rank: int) -> Tensor:
    """P of one module, ``[u, r, r]`` float32, entries N(0, 1/r).

    The paper leaves the distribution open; N(0, 1/r) is PEFT's choice. The stream is specified here rather than
    left to a library's default: Philox-4x64-10 with key ``(seed, module)``, its 64-bit words w taken in pairs as
    uniforms ``((w >> 11) + 0.5) / 2⁵³``, and Box-Muller in float64, cosine branch first. Two machines can differ
    by one rounding of float32 where their logarithms or cosines differ in the last bit of float64. The first
    directions of a longer P are those of a shorter one.

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


@dataclass(frozen=True, eq=False)
class Basis:
    """Calibrated directions in the space of all modules' mixing matrices R.

    Attributes:
        directions: ``[directions, modules, r, r]`` float32; those of ``calibrate`` are orthonormal over all modules
            together.
        names: the modules, in the order of ``directions``.
        sigma: where Σ was during calibration.
        provenance: how the basis was made: base, task, problems, samples, seed, spectrum. JSON values.

    Raises:
        ValueError: the directions have another shape or dtype or hold NaN or infinity, or a name occurs twice.
    """

    directions: Tensor = field(repr=False)
    names: tuple[str, ...] = field(repr=False)
    sigma: str = "left"
    provenance: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        shape = tuple(self.directions.shape)
        if len(shape) != 4 or shape[1] != len(self.names) or shape[2] != shape[3] or 0 in shape:
            raise ValueError(
                f"directions must have the shape [directions, {len(self.names)} modules, r, r], not {list(shape)}"
            )
        if self.directions.dtype != torch.float32:
            raise ValueError(f"directions must be float32, not {self.directions.dtype}; convert them with .float()")
        if not torch.isfinite(self.directions).all():
            raise ValueError("directions hold NaN or infinity; calibrate again")
        if len(set(self.names)) < len(self.names):
            raise ValueError("names must name every module once")

    @property
    def rank(self) -> int:
        """r, the rank of the adapters that the basis fits."""
        return self.directions.shape[-1]

    def check(self, rank: int, u: int, sigma: str) -> None:
        """Raises ``ValueError`` where an adapter's settings ask for what this basis does not hold."""
        for name, wanted, held in (("rank", rank, self.rank), ("sigma", sigma, self.sigma)):
            if wanted != held:
                raise ValueError(f"the basis was calibrated with {name}={held!r}; the config says {wanted!r}")
        if u > len(self.directions):
            raise ValueError(f"the basis holds {len(self.directions)} directions, fewer than u={u}")

    def check_modules(self, adapted: Collection[str], present: Collection[str]) -> None:
        """Raises ``ValueError`` where the basis belongs to another model.

        Args:
            adapted: the modules to adapt; the basis must hold them all, and may hold more.
            present: all modules of the model; they must include all of the basis.
        """
        for name in adapted:
            if name not in self.names:
                raise ValueError(f"the basis has no directions for module {name}; calibrate one on this model")
        for name in self.names:
            if name not in present:
                raise ValueError(f"the basis is of a model that has a module {name}; calibrate one on this model")

    def projection(self, name: str, u: int) -> Tensor:
        """P of one module, ``[u, r, r]`` float32: its slice of the first ``u`` directions."""
        return self.directions[:u, self.names.index(name)]

    def fingerprint(self) -> str:
        """SHA-256 of the directions and of what they belong to, in hexadecimal; the provenance does not count."""
        digest = hashlib.sha256(json.dumps([self.names, self.sigma, list(self.directions.shape)]).encode())
        digest.update(self.directions.contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()
