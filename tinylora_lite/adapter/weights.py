"""The weights of a base, plain or quantized: dense, decomposed, by what identifies them, and the gradient through them.

Known are the layers of bitsandbytes (4 and 8 bits) and the weights of torchao; neither library is imported before a
layer of it is at hand. Run on a CPU: all of bitsandbytes, and torchao's int8, intx, float8 and CPU int4 weights. Not
run: CUDA's kernels, and torchao's int4 layouts that exist only there; a stand-in for the kernel tests those.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from tinylora_lite.adapter.svd import Decomposition, decompose
from tinylora_lite.utils.distributed import one_thread, whole
from tinylora_lite.utils.files import cached

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FOUR_BIT, EIGHT_BIT, TORCHAO = "bitsandbytes 4-bit", "bitsandbytes 8-bit", "torchao"
AT_ONCE = 1024
CACHED_FROM = 1 << 17  # Smaller weights are not cached: decomposing them again takes milliseconds.
CURE = "load the model without quantization (dtype=torch.bfloat16), or quantized by bitsandbytes or torchao"
PACKED = "was packed for inference by bitsandbytes; load the model again and attach before its first forward pass"


def quantization_of(module: nn.Module) -> str | None:
    """What quantized a linear layer's weight; ``None`` for a plain weight and for formats that are not known here."""
    if _is_of(module, "bitsandbytes", "Linear4bit"):
        return FOUR_BIT
    # With has_fp16_weights the layer keeps a plain weight and rounds it anew in every forward pass.
    if _is_of(module, "bitsandbytes", "Linear8bitLt"):
        return None if getattr(module.state, "has_fp16_weights", False) else EIGHT_BIT
    return TORCHAO if _is_of(getattr(module, "weight", None), "torchao") else None


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """``(out, in)`` of a linear layer, however its weight is packed."""
    return module.out_features, module.in_features  # type: ignore[return-value]


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer as a plain matrix, ``[out, in]``, on the layer's device; the layer is not changed.

    Of a plain layer, its weight itself, without a copy. Of bitsandbytes, what its own functions dequantize to, in the
    dtype of the model before (4-bit) or float32 (8-bit). Of torchao, ``dequantize()`` in the dtype of the model; where
    a class has none (int4), what the layer makes of the identity matrix.

    Raises:
        ValueError: see :func:`check_weight`.
    """
    check_weight(f"this {type(module).__name__}", module)
    weight, kind = module.get_parameter("weight"), quantization_of(module)
    with torch.no_grad():
        if kind is None:
            return weight.detach()
        if kind == TORCHAO:
            return _torchao_dense(weight)
        bitsandbytes, scales = importlib.import_module("bitsandbytes.functional"), _scales(module, weight)
        if kind == FOUR_BIT:
            dense: Tensor = bitsandbytes.dequantize_4bit(weight.data, scales)
        else:
            dense = bitsandbytes.int8_vectorwise_dequant(weight.data, scales.to(weight.device))
        return dense


def check_weight(name: str, module: nn.Module, rank: int = 1) -> None:
    """Raises ``ValueError`` where a linear layer's weight cannot be had, or where a rank is above its smaller side.

    It is on the meta device, not quantized yet, packed for inference, or in a format that is not known here. Nothing is
    dequantized. The name is for the message.
    """
    weight, kind = getattr(module, "weight", None), quantization_of(module)
    layer = f"{name} is a {type(module).__name__} of {type(module).__module__}"
    if not isinstance(weight, Tensor):
        raise ValueError(f"{layer} and holds no weight, as quantized layers do; {CURE}")
    stored = type(weight.data).__name__  # DTensor where the weight is sharded
    if weight.is_meta:
        raise ValueError(f"{name} is on the meta device and has no values; load the weights before attach")
    if kind in (FOUR_BIT, EIGHT_BIT):
        if (scales := _scales(module, weight)) is None:
            cure = "bitsandbytes does that when model.to(device) is called, on a CPU too"
            raise ValueError(f"{name} is not quantized yet; {cure}")
        if getattr(scales, "packing_format_for_cpu", False):
            raise ValueError(f"{name} {PACKED}")
    elif kind is None and (weight.dtype not in FLOATING or weight.ndim != 2 or stored not in ("Tensor", "DTensor")):
        held = f"{weight.dtype} weights of shape {tuple(weight.shape)} as a {stored}"
        raise ValueError(f"{layer} and holds {held}, as quantized layers do; {CURE}")
    if rank > min(shape := weight_shape(module)):
        raise ValueError(f"rank={rank} is above the smaller side of {name}, {shape}; lower the rank")


def stored_parameters(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...], list[Tensor]]]:
    """All parameters in the order of ``named_parameters()``: name, shape, and the plain tensors that determine them.

    A quantized parameter has the shape of its dense matrix, and its packed values and scales for tensors: equal for
    equal values, whatever dtype 4-bit values are stored as. Nothing is dequantized or copied.

    Raises:
        ValueError: a 4-bit layer was packed for inference, which rounds its scales.
    """
    for name, parameter in model.named_parameters():
        shape, parts = tuple(parameter.shape), list(_inner_tensors(parameter))
        scales = None
        if _is_of(parameter, "bitsandbytes"):
            scales = _scales(model.get_submodule(name.rpartition(".")[0]), parameter)
        if getattr(scales, "packing_format_for_cpu", False):
            raise ValueError(f"{name} {PACKED}")
        if isinstance(scales, Tensor):
            parts.append(scales)
        elif scales is not None:
            shape, parts = tuple(scales.shape), [parameter.data.view(torch.uint8), scales.absmax, scales.code]
            if scales.nested:
                parts += [scales.offset, scales.state2.absmax, scales.state2.code]
        yield name, shape, parts


def train_through(model: nn.Module) -> list[RemovableHandle]:
    """Makes gradients pass through quantized layers, adapted or not, to the layers before them.

    The layers of torchao drop it without a word where they round their inputs, and raise an error where they call an
    int4 kernel. So a forward hook keeps the layer's output and sends gradients back through :func:`dense_weight`: the
    exact gradient where weights alone are quantized, the straight-through one (arXiv 1308.3432) where activations are
    rounded too. Linear4bit of bitsandbytes has a gradient of its own, except where a CPU with AVX512-BF16 packs it for
    inference, which rounds its scales as well; that packing is switched off until :func:`allow_packing`.

    Returns:
        The hooks' handles. Hooks that are registered later see the outputs unchanged.

    Raises:
        ValueError: a 4-bit layer was packed for inference already. The model is untouched then.
    """
    for name, module in model.named_modules():
        if quantization_of(module) == FOUR_BIT:
            check_weight(name, module)
    allow_packing(model, False)
    layers = [module for module in model.modules() if quantization_of(module) == TORCHAO]
    return [layer.register_forward_hook(_straight_through, with_kwargs=True) for layer in layers]


def allow_packing(model: nn.Module, allowed: bool = True) -> None:
    """Whether bitsandbytes may pack 4-bit layers for inference, on the CPUs where it does."""
    for module in model.modules():
        if quantization_of(module) == FOUR_BIT:
            able: Any = allowed and importlib.import_module("bitsandbytes.functional").has_avx512bf16()
            module.support_avx512bf16_for_cpu = able


class _ThroughDense(torch.autograd.Function):
    """An output as the layer computed it, with the gradient of ``x Wᵀ``; W is dequantized when it is needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, module: nn.Module) -> Tensor:
        ctx.module, ctx.dtype = module, x.dtype
        ctx.mark_dirty(output)  # given back without a copy, and free to be changed in place by what follows
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return (gradient @ dense_weight(ctx.module).to(gradient.dtype)).to(ctx.dtype), None, None


def _straight_through(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> Tensor:
    x = args[0] if args else kwargs["input"]
    if not (torch.is_grad_enabled() and x.requires_grad):
        return output
    return cast(Tensor, _ThroughDense.apply(x, output.detach(), module))  # type: ignore[no-untyped-call]


def _is_of(thing: object, library: str, name: str | None = None) -> bool:
    kinds = type(thing).__mro__
    return any(kind.__module__.partition(".")[0] == library and name in (None, kind.__name__) for kind in kinds)


def _scales(module: nn.Module, weight: Any) -> Any:
    """What bitsandbytes keeps beside its values, None before quantization: the state of 4-bit blocks, or row scales.

    FSDP strips the state off the weight, and an 8-bit layer's first forward pass moves the scales.
    """
    if (state := getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)) is not None:
        return state
    scales = getattr(weight, "SCB", None)
    return getattr(getattr(module, "state", None), "SCB", None) if scales is None else scales


def _torchao_dense(weight: Tensor) -> Tensor:
    if hasattr(weight, "get_original_weight"):  # NF4Tensor, whose dequantize() looks up single values
        original: Tensor = weight.get_original_weight()
        return original
    if type(weight).dequantize is Tensor.dequantize:  # torch's own, for a format of torch's own
        columns = torch.arange(weight.shape[1], device=weight.device).split(AT_ONCE)
        rows = (F.one_hot(some, weight.shape[1]).to(weight.dtype) for some in columns)
        return torch.cat([F.linear(row, weight) for row in rows]).T.contiguous()
    dense = weight.dequantize()
    scale = getattr(weight, "act_pre_scale", None)
    return dense if scale is None else dense * scale.to(dense.dtype)


def _inner_tensors(tensor: Tensor) -> Iterator[Tensor]:
    if not _is_of(tensor, "torchao"):
        yield tensor.detach()
        return
    # The protocol of torch's wrapper subclasses.
    for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
        yield from _inner_tensors(getattr(tensor, name))


@one_thread()
def base_fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's weights in hexadecimal: names, shapes, and the exact value of every entry.

    All parameters count, adapted or not, since an adapter is trained against all of them. An entry counts by its value
    as float32, so one checkpoint loaded as bfloat16, float16 or float32 has one fingerprint where the conversion was
    lossless. Of quantized weights, the packed values and scales count. 15 GB take about 20 seconds on one core.

    Raises:
        ValueError: a parameter is on the meta device and has no values.
    """
    digest = hashlib.sha256()
    for name, shape, parts in sorted(stored_parameters(model), key=lambda stored: stored[0]):
        if any(part.is_meta for part in parts):
            raise ValueError(f"{name} is on the meta device and has no values; load all weights first")
        digest.update(json.dumps([name, shape]).encode())
        for part in parts:
            _update(digest, part)
    return digest.hexdigest()


@one_thread()
def weight_fingerprint(weight: Tensor) -> str:
    """SHA-256 of one matrix in hexadecimal: its shape and the exact value of every entry as float32, as above."""
    digest = hashlib.sha256(json.dumps(list(weight.shape)).encode())
    _update(digest, weight.detach())
    return digest.hexdigest()


def cached_decompose(weight: Tensor, rank: int, seed: int = 0, cache: str | Path | None = None) -> Decomposition:
    """:func:`decompose` by way of a cache, in which equal values have one entry, whatever their dtype.

    ``cache`` is a folder, made where it is missing (``OSError`` where it cannot be written); ``None`` takes the user's
    cache, which holds no small weights.
    """
    if weight.is_meta or (cache is None and weight.numel() < CACHED_FROM):
        return decompose(weight, rank, seed)
    shapes = {"U": (weight.shape[0], rank), "S": (rank,), "Vh": (rank, weight.shape[1]), "beyond": (), "portable": ()}

    def computed() -> dict[str, Tensor]:
        found = decompose(weight, rank, seed)
        return {**{name: getattr(found, name) for name in shapes}, "portable": torch.tensor(float(found.portable))}

    # The number belongs to the method: one that finds other vectors gets another.
    key = f"svd-2-{weight_fingerprint(weight)}-{rank}-{seed}"
    found = {name: tensor.to(weight.device) for name, tensor in cached(key, shapes, computed, cache).items()}
    return Decomposition(found["U"], found["S"], found["Vh"], found["beyond"], bool(found["portable"]))


def _update(digest: hashlib._Hash, values: Tensor) -> None:
    """Upper and lower halves of the floats' bits are hashed apart, and lower halves of zeros not at all."""
    for chunk in whole(values).reshape(-1).split(1 << 22):
        chunk = chunk.cpu()
        if chunk.is_floating_point() and chunk.dtype != torch.bfloat16:
            lower, upper = chunk.float().view(torch.int16).view(-1, 2).unbind(1)
            digest.update(upper.contiguous().numpy())
            if lower.any():
                digest.update(lower.contiguous().numpy())
        else:
            digest.update(chunk.view(torch.int16 if chunk.dtype == torch.bfloat16 else chunk.dtype).numpy())
