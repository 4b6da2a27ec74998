"""Calibrated directions: a basis for the numbers that points where a task's reward rises.

This is the project's own method beside the paper's random projections, and never stands in for it silently.
A basis is made once per base model (``calibrate``) and shared; an adapter on it holds only its numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

if TYPE_CHECKING:
    from tinylora_lite.adapter.config import TinyLoraConfig

FORMAT = "tinylora-basis-1"
KEY = "tinylora"
"""All metadata stand in one entry, because safetensors puts several into a random order."""


@dataclass(frozen=True, eq=False)
class Basis:
    """Directions in the space of all modules' mixing matrices R.

    Attributes:
        directions: ``[directions, modules, r, r]`` float32; those of ``calibrate`` are orthonormal over all modules
            together.
        names: the modules, in the order of ``directions``.
        sigma: where Σ stood during calibration.
        provenance: how the basis was made: base, task, problems, samples, seed, spectrum. JSON values.

    Raises:
        ValueError: the directions have another shape or dtype or hold NaN or infinity, or a name stands twice.
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

    def check(self, config: TinyLoraConfig) -> None:
        """Raises ``ValueError`` where a config asks for what this basis does not hold."""
        for name, wanted, held in (("rank", config.rank, self.rank), ("sigma", config.sigma, self.sigma)):
            if wanted != held:
                raise ValueError(f"the basis was calibrated with {name}={held!r}; the config says {wanted!r}")
        if config.u > len(self.directions):
            raise ValueError(f"the basis holds {len(self.directions)} directions, fewer than u={config.u}")

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


def save_basis(basis: Basis, path: str | Path) -> Path:
    """Writes a basis as safetensors with its provenance; the file appears whole or not at all.

    Equal bases give equal bytes.

    Returns:
        The path.

    Raises:
        TypeError: the provenance holds something that JSON cannot.
    """
    path = Path(path)
    metadata = {
        "format": FORMAT,
        "names": basis.names,
        "sigma": basis.sigma,
        "provenance": basis.provenance,
        "fingerprint": basis.fingerprint(),
    }
    tensors = {"directions": basis.directions.contiguous().cpu()}
    content = safetensors.torch.save(tensors, {KEY: json.dumps(metadata, sort_keys=True)})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        # save_file would make the file unreadable to everybody else; this follows the umask.
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load_basis(path: str | Path) -> Basis:
    """Reads what :func:`save_basis` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or is no basis.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no basis file at {path}; tl.calibrate and tl.save_basis make one")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get(KEY, "{}"))
            if metadata.get("format") != FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r} instead of {FORMAT!r}")
            names, provenance = tuple(metadata["names"]), metadata["provenance"]
            # A clone: the tensor itself is the file's memory, and changes when somebody writes there.
            basis = Basis(file.get_tensor("directions").clone(), names, metadata["sigma"], provenance)
            if basis.fingerprint() != metadata["fingerprint"]:
                raise ValueError("its numbers are not those that were saved")
    except (safetensors.SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no basis file ({error}); make it again with tl.calibrate") from error
    return basis
