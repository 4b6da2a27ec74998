"""Calibrated directions P, in place of random ones (this project's own).

A basis is made once for each base model (``tl.calibrate``) and shared; an adapter on it holds only its own v.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


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
