"""What tells one base from another, and one machine's decomposition of it from another machine's."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tinylora_lite.adapter.quantized import stored_parameters
from tinylora_lite.utils.sharding import whole

if TYPE_CHECKING:
    from tinylora_lite.adapter.adapter import TinyLoraAdapter


def base_fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's weights in hexadecimal: names, shapes, and the exact value of every entry.

    All parameters count, adapted or not, since an adapter is trained against all of them. An entry counts by its
    value as float32, so one checkpoint loaded as bfloat16, float16 or float32 has one fingerprint where the
    conversion was lossless, and another where it rounded. Upper and lower halves of the bits are hashed apart, and
    lower halves of zeros not at all: 15 GB of bfloat16 take about 20 seconds on one core, far less than the
    decompositions of ``attach``. Of quantized weights, the packed numbers and scales count.

    Raises:
        ValueError: a parameter is on the meta device and has no values.
    """
    digest = hashlib.sha256()
    for name, shape, parts in sorted(stored_parameters(model), key=lambda stored: stored.name):
        if any(part.is_meta for part in parts):
            raise ValueError(f"{name} is on the meta device and has no values; load all weights first")
        digest.update(json.dumps([name, list(shape)]).encode())
        for part in parts:
            _update(digest, part)
    return digest.hexdigest()


def weight_fingerprint(weight: Tensor) -> str:
    """SHA-256 of one matrix in hexadecimal: its shape and the exact value of every entry as float32, as above."""
    digest = hashlib.sha256(json.dumps(list(weight.shape)).encode())
    _update(digest, weight.detach())
    return digest.hexdigest()


def _update(digest: hashlib._Hash, values: Tensor) -> None:
    for part in _exact_bytes(values):
        digest.update(part)


def _exact_bytes(values: Tensor, chunk_size: int = 1 << 22) -> Iterator[memoryview]:
    for chunk in whole(values).reshape(-1).split(chunk_size):
        chunk = chunk.cpu()
        if chunk.dtype == torch.bfloat16:
            yield chunk.view(torch.int16).numpy().data
        elif chunk.is_floating_point():
            halves = chunk.float().view(torch.int16).view(-1, 2)
            yield halves[:, 1].contiguous().numpy().data
            if halves[:, 0].any():
                yield halves[:, 0].contiguous().numpy().data
        else:
            yield chunk.numpy().data


def decomposition(adapter: TinyLoraAdapter) -> Tensor:
    """``[modules, 3]`` float32, what :func:`~tinylora_lite.load` compares: two singular values and one probe.

    The values are the last one kept and the first one left out (zeros where the factors were given). The probe is
    ``yᵀ (UΣ) M Vᵀ x`` over the norm of ``(UΣ) M Vᵀ``, with fixed waves x and y and a fixed mixture M of the module's
    P: about 0.5 in size, it changes with any sign or rotation of singular vectors and with any other P.
    """
    rows = []
    for name in adapter.names:
        factors = adapter.factors(name)
        left, right, P = (t.detach().double().cpu() for t in (factors.left, factors.right, factors.projection))
        M = torch.einsum("u,ujk->jk", torch.cos(torch.arange(len(P), dtype=torch.float64)), P)
        y = torch.sin(torch.arange(1, len(left) + 1, dtype=torch.float64))
        x = torch.cos(torch.arange(1, right.shape[1] + 1, dtype=torch.float64))
        norm = math.sqrt(max(float(((left.T @ left @ M) * (M @ right @ right.T)).sum()), 1e-300))
        rows.append([*factors.spectrum.tolist(), float(y @ left @ M @ (right @ x)) / norm])
    return torch.tensor(rows, dtype=torch.float32)
