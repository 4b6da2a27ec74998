"""Merging: an adapter's update added to the pristine base's weights, and how much of it survives the rounding.

The base is only read: merging in place and subtracting afterwards would leave a rounding error behind each time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinylora_lite.adapter.adapter import TinyLoraAdapter
from tinylora_lite.adapter.weights import FLOATING, dense_weight
from tinylora_lite.files.file_format import model_of

ENTRIES_AT_ONCE = 1 << 22
"""The report sums so many entries of a weight at a time, to hold no float64 copy of a whole one."""


@dataclass(frozen=True)
class MergeEffect:
    """How much of an update D survives a merge that rounds both the base W and W + D to one dtype.

    The realised update is the difference of these two roundings. Where W is exact in the dtype already, as a bf16
    checkpoint is in bf16, an entry of D below half a rounding step is lost. Where W is not, roundings up and down
    balance: ``kept`` stays near 1, and the loss shows in ``cosine``.

    Attributes:
        changed: the share of the entries that differ, 0 to 1.
        kept: the share of D that the realised update holds along D, ``⟨realised, D⟩ / ‖D‖²``; 1 where D is zero.
        cosine: of the angle between the two: 0 where nothing of D is realised, 1 where D is zero.
        size: ``‖D‖ / ‖W‖`` in Frobenius norms, before any rounding.
    """

    changed: float
    kept: float
    cosine: float
    size: float


@dataclass(frozen=True)
class MergeReport:
    """How much of an adapter's update survives a merge.

    Attributes:
        dtype: of the merged weights.
        total: over the entries of all adapted modules together.
        modules: of each module, by name, in tying order.
    """

    dtype: torch.dtype
    total: MergeEffect
    modules: dict[str, MergeEffect]


def merged_weights(adapter: TinyLoraAdapter, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """The adapted weights with their update, ``W + (U Σ) R Vᵀ``, one at a time; the base is read and never written.

    A checkpoint of the merged model, where the base is not quantized::

        state = model.state_dict() | dict(merged_weights(adapter))
        model.save_pretrained(folder, state_dict=state)

    Args:
        adapter: attached or detached, enabled or not; its model must still exist.
        dtype: of the merged weights; ``None`` takes the base weight's, or the one that a quantized weight dequantizes
            to. The sum is taken in float32 (float64 on a float64 base) and rounded once;
            :func:`merge_report` measures what rounding to bfloat16 loses.

    Yields:
        The name in ``model.named_parameters()``, and a new tensor ``[out, in]`` on the weight's device.

    Raises:
        ValueError: the model is gone, an adapted module shares its weight with another module, ``dtype`` is not
            float64, float32, bfloat16 or float16, or a merged weight is not finite in it.
    """
    modules = _modules(adapter, dtype)
    return (
        (f"{name}.weight", _merge(name, dense_weight(modules[name]), adapter.delta(name), dtype))
        for name in adapter.names
    )


def merge_report(adapter: TinyLoraAdapter, dtype: torch.dtype = torch.bfloat16) -> MergeReport:
    """How much of the update :func:`merged_weights` in ``dtype`` keeps; arguments and errors are its own."""
    modules, sums = _modules(adapter, dtype), {}
    for name in adapter.names:
        sums[name] = torch.zeros(6, dtype=torch.float64)
        weight = dense_weight(modules[name])
        rows = max(1, ENTRIES_AT_ONCE // weight.shape[1])
        for some, change in zip(weight.split(rows), adapter.delta(name).split(rows), strict=True):
            parts = (_merge(name, some, change, dtype), some.to(dtype), some, change)
            merged, base, W, D = (part.cpu().double() for part in parts)  # Apple's GPUs have no float64
            realised = merged - base
            products = [float((a * b).sum()) for a, b in ((realised, D), (realised, realised), (D, D), (W, W))]
            sums[name] += torch.tensor([W.numel(), int((realised != 0).sum()), *products], dtype=torch.float64)
    effects = {name: _effect(row) for name, row in sums.items()}
    return MergeReport(dtype, _effect(torch.stack(list(sums.values())).sum(dim=0)), effects)


def _modules(adapter: TinyLoraAdapter, dtype: torch.dtype | None) -> dict[str, nn.Module]:
    """All modules of the adapter's model by name, checked to be mergeable."""
    if dtype not in (None, *FLOATING):
        raise ValueError(f"dtype must be one of {', '.join(map(str, FLOATING))}, not {dtype}")
    modules = dict(model_of(adapter).named_modules())
    for name in adapter.names:
        parameter = modules[name].get_parameter("weight")
        holds = [o for o, m in modules.items() if any(p is parameter for p in m._parameters.values())]
        sharing = [o for o in holds if not f"{o}.".startswith(f"{name}.")]  # PEFT keeps a layer inside its own
        if sharing:
            raise ValueError(
                f"{name} shares its weight with {', '.join(sharing)}, which a merge would change too; "
                "export a LoRA, or load the model with tie_word_embeddings=False"
            )
    return modules


def _merge(name: str, weight: Tensor, delta: Tensor, dtype: torch.dtype | None) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    merged = (weight.to(wide) + delta.to(weight.device, wide)).to(dtype or weight.dtype)
    if not torch.isfinite(merged).all():
        finite = torch.isfinite(delta).all()
        cure = "merge in float32" if finite else "the adapter holds NaN or infinity; train it again"
        raise ValueError(f"{name}: the merged weight is not finite in {merged.dtype}; {cure}")
    return merged


def _effect(sums: Tensor) -> MergeEffect:
    """Of entries, changed entries, ``⟨realised, D⟩``, ``‖realised‖²``, ``‖D‖²`` and ``‖W‖²``."""
    entries, changed, product, realised, wanted, weight = sums.tolist()
    if wanted == 0:
        return MergeEffect(changed=0.0, kept=1.0, cosine=1.0, size=0.0)
    return MergeEffect(
        changed=changed / entries,
        kept=product / wanted,
        cosine=product / (realised * wanted) ** 0.5 if realised else 0.0,
        size=(wanted / weight) ** 0.5 if weight else math.inf,
    )
