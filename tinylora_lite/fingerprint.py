"""What tells one base from another, and one machine's decomposition of it from another machine's."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tinylora_lite.adapter import TinyLoraAdapter


def base_fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's weights in hexadecimal: names, shapes, and the exact value of every entry.

    All parameters count, adapted or not, since an adapter is trained against all of them. An entry counts by its
    value as float32, so one checkpoint loaded as bfloat16, float16 or float32 has one fingerprint where the
    conversion was lossless, and another where it rounded. Upper and lower halves of the bits are hashed apart, and
    lower halves of zeros not at all: 15 GB of bfloat16 take about 20 seconds on one core, far less than the
    decompositions of ``attach``.

    Raises:
        ValueError: a parameter is on the meta device and has no values.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device and has no values; load all weights first")
        digest.update(json.dumps([name, list(parameter.shape)]).encode())
        for part in _exact_bytes(parameter.detach()):
            digest.update(part)
    return digest.hexdigest()


def _exact_bytes(values: Tensor, chunk_size: int = 1 << 22) -> Iterator[bytes]:
    for chunk in values.reshape(-1).split(chunk_size):
        chunk = chunk.cpu()
        if chunk.dtype == torch.bfloat16:
            yield chunk.view(torch.int16).numpy().tobytes()
        elif chunk.is_floating_point():
            halves = chunk.float().view(torch.int16).view(-1, 2)
            yield halves[:, 1].numpy().tobytes()
            if halves[:, 0].any():
                yield halves[:, 0].numpy().tobytes()
        else:
            yield chunk.numpy().tobytes()


def decomposition(adapter: TinyLoraAdapter) -> Tensor:
    """``[modules, 2]`` float32: the last kept singular value, and ``yᵀ (UΣ) M Vᵀ x`` over the norm of ``(UΣ) M Vᵀ``.

    x and y are fixed waves and M a fixed mixture of the module's P, so the second number, about 0.5 in size, changes
    with any sign or rotation of singular vectors and with any other P.
    """
    rows = []
    for name in adapter.names:
        adapted = adapter._adapted[name]
        left, right, P = (t.detach().double().cpu() for t in (adapted.left, adapted.right, adapted.projection))
        M = (torch.cos(torch.arange(len(P), dtype=torch.float64)) @ P).view(left.shape[1], right.shape[0])
        y = torch.sin(torch.arange(1, len(left) + 1, dtype=torch.float64))
        x = torch.cos(torch.arange(1, right.shape[1] + 1, dtype=torch.float64))
        norm = math.sqrt(max(float(((left.T @ left @ M) * (M @ right @ right.T)).sum()), 1e-300))
        rows.append([float(left[:, -1].norm() * right[-1].norm()), float(y @ left @ M @ (right @ x)) / norm])
    return torch.tensor(rows, dtype=torch.float32)
