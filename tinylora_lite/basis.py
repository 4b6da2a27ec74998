"""Calibrated directions: a basis for the numbers that points where a task's reward rises.

This is the project's own method beside the paper's random projections, and never stands in for it silently.
A basis is made once per base model (``calibrate``) and shared; an adapter on it holds only its numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from tinylora_lite.config import TinyLoraConfig

FORMAT = "tinylora-basis-1"


@dataclass(frozen=True, eq=False)
class Basis:
    """Directions in the space of all modules' mixing matrices R.

    Attributes:
        directions: ``[directions, modules, r, r]`` float32, orthonormal over all modules together.
        names: the modules, in the order of ``directions``.
        sigma: where Σ stood during calibration.
        provenance: how the basis was made: base, task, problems, samples, seed, spectrum.
    """

    directions: Tensor = field(repr=False)
    names: tuple[str, ...] = field(repr=False)
    sigma: str = "left"
    provenance: dict = field(default_factory=dict, repr=False)

    @property
    def rank(self) -> int:
        return self.directions.shape[-1]

    def check(self, config: TinyLoraConfig) -> None:
        """Raises ``ValueError`` where a config asks for what this basis does not hold."""
        for name, wanted, held in (
            ("rank", config.rank, self.rank),
            ("sigma", config.sigma, self.sigma),
        ):
            if wanted != held:
                raise ValueError(
                    f"the basis was calibrated with {name}={held!r}; the config says {wanted!r}"
                )
        if config.u > len(self.directions):
            raise ValueError(
                f"the basis holds {len(self.directions)} directions, fewer than u={config.u}"
            )

    def projection(self, name: str, u: int) -> Tensor:
        """P of one module, ``[u, r, r]``: its slice of the first ``u`` directions."""
        if name not in self.names:
            raise ValueError(
                f"the basis has no directions for module {name}: it was calibrated on another model"
            )
        return self.directions[:u, self.names.index(name)]

    def fingerprint(self) -> str:
        """SHA-256 of the directions and of what they belong to, in hexadecimal."""
        digest = hashlib.sha256(json.dumps([self.names, self.sigma]).encode())
        digest.update(self.directions.contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()


def save_basis(basis: Basis, path: str | Path) -> Path:
    """Writes a basis as safetensors with its provenance; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": FORMAT, "names": json.dumps(basis.names), "sigma": basis.sigma}
    metadata |= {"provenance": json.dumps(basis.provenance, sort_keys=True)}
    temporary = path.with_name(path.name + ".tmp")
    save_file({"directions": basis.directions.contiguous().cpu()}, temporary, metadata)
    os.replace(temporary, path)
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
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} is a safetensors file, but not a {FORMAT} file")
            directions = file.get_tensor("directions").to(torch.float32)
            names, provenance = json.loads(metadata["names"]), json.loads(metadata["provenance"])
    except (safetensors.SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is damaged or no basis file ({error}); make it again with tl.calibrate"
        ) from error
    if (
        directions.ndim != 4
        or directions.shape[1] != len(names)
        or directions.shape[2] != directions.shape[3]
    ):
        raise ValueError(
            f"{path} holds directions of shape {tuple(directions.shape)} for {len(names)} modules"
        )
    return Basis(directions, tuple(names), metadata["sigma"], provenance)
