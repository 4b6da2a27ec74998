"""Files that appear whole or not at all, and the user's cache."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor

CACHE_LIMIT = 4 << 30
"""Bytes of each folder of the user's cache."""


def atomic_write(path: str | Path, content: str | bytes | Callable[[BinaryIO], None]) -> Path:
    """Writes a file under a temporary name and renames it, so that no reader finds half of it, and returns its path.

    Text is written as UTF-8; a function is given the file. The folder is made where it is missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            data = content.encode("utf-8") if isinstance(content, str) else content
            data(file) if callable(data) else file.write(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def cache_folder(name: str) -> Path | None:
    """The folder of that name in the user's cache, ``~/.cache/tinylora_lite`` or what ``TINYLORA_CACHE`` names.

    ``None`` where ``TINYLORA_CACHE=off`` keeps none, or there is no home.
    """
    root, home = os.environ.get("TINYLORA_CACHE"), os.environ.get("XDG_CACHE_HOME")
    home = home or os.path.expanduser("~/.cache")  # noqa: PTH111  # for a user without a home, Path's raises
    if root == "off" or (not root and home.startswith("~")):
        return None
    return (Path(root) if root else Path(home) / "tinylora_lite") / name


def cached(
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    compute: Callable[[], dict[str, Tensor]],
    folder: str | Path | None = None,
) -> dict[str, Tensor]:
    """Float32 tensors from a cache where they are there, and computed and put into it where they are not.

    An entry of other shapes or with other values than finite ones is computed again. A ``folder`` of ``None`` takes
    ``svd`` in the user's cache, which loses what was not used for longest above ``CACHE_LIMIT``; where that cannot be
    written, nothing is kept.

    Raises:
        OSError: ``folder`` was given and cannot be written.
    """
    import safetensors.torch
    import torch

    where = Path(folder) if folder else cache_folder("svd")
    if where is None:
        return compute()
    path = where / f"{name}.safetensors"
    try:
        found = safetensors.torch.load(path.read_bytes())
        with suppress(OSError):  # in a cache that may only be read
            os.utime(path)
        right = {key: tuple(tensor.shape) for key, tensor in found.items()} == dict(shapes)
        if right and all(t.dtype == torch.float32 and bool(torch.isfinite(t).all()) for t in found.values()):
            return found
    except (OSError, safetensors.SafetensorError):
        pass
    found = compute()
    try:
        atomic_write(path, safetensors.torch.save({key: t.cpu().contiguous() for key, t in found.items()}))
        entries = [] if folder else sorted(where.iterdir(), key=lambda entry: entry.stat().st_mtime, reverse=True)
        for entry, total in zip(entries, accumulate(entry.stat().st_size for entry in entries), strict=True):
            if total > CACHE_LIMIT:
                entry.unlink(missing_ok=True)
    except OSError:
        if folder:
            raise
    return found
