"""Decompositions kept on disk, each under the fingerprint of its weight: the second ``attach`` waits for none."""

from __future__ import annotations

import json
import os
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tinylora_lite.adapter.fingerprint import weight_fingerprint
from tinylora_lite.adapter.svd import Decomposition, decompose

FORMAT = "tinylora-svd-1"
"""Part of every file's name: a method that finds other vectors gets another number, and old files are left alone."""
VARIABLE = "TINYLORA_CACHE"


def cached_decompose(weight: Tensor, rank: int, seed: int = 0, cache: str | Path | None = None) -> Decomposition:
    """:func:`~tinylora_lite.adapter.svd.decompose`, from the cache where it is there, and into it where it is not.

    Equal values give one entry, whatever the dtype. A damaged entry is computed again.

    Args:
        weight: ``[out, in]``, any floating dtype.
        rank: how many triplets.
        seed: of the random start.
        cache: a folder, made where it is missing; ``None`` takes the environment variable ``TINYLORA_CACHE``, and
            where that is not set, keeps nothing.

    Raises:
        ValueError: see :func:`~tinylora_lite.truncated_svd`.
        OSError: the folder cannot be written.
    """
    folder = cache or os.environ.get(VARIABLE)
    if not folder or weight.is_meta:
        return decompose(weight, rank, seed)
    path = Path(folder) / f"{FORMAT}-{weight_fingerprint(weight)}-{rank}-{seed}.safetensors"
    found = _read(path, weight, rank)
    if found is None:
        found = decompose(weight, rank, seed)
        _write(path, found)
    return found


def _read(path: Path, weight: Tensor, rank: int) -> Decomposition | None:
    try:
        with safetensors.safe_open(path, "pt") as file:
            portable = json.loads((file.metadata() or {})["portable"])
            parts = {name: file.get_tensor(name).clone() for name in ("U", "S", "Vh", "beyond")}
    except (OSError, safetensors.SafetensorError, KeyError, ValueError):
        return None
    out_features, in_features = weight.shape
    shapes = {"U": (out_features, rank), "S": (rank,), "Vh": (rank, in_features), "beyond": ()}
    for name, part in parts.items():
        if tuple(part.shape) != shapes[name] or part.dtype != torch.float32 or not torch.isfinite(part).all():
            return None
    return Decomposition(**{name: part.to(weight.device) for name, part in parts.items()}, portable=portable is True)


def _write(path: Path, found: Decomposition) -> None:
    parts = {"U": found.U, "S": found.S, "Vh": found.Vh, "beyond": found.beyond}
    content = safetensors.torch.save(
        {name: part.cpu().contiguous() for name, part in parts.items()}, {"portable": json.dumps(found.portable)}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
