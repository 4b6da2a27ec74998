"""The weights of a base: plain or quantized, as matrices, as what identifies them, and the gradient through them.

Known are the layers of bitsandbytes (4 and 8 bits) and the weights of torchao. The layers stay as they are; neither
library is imported before a layer of it is at hand. Run on a CPU: all of bitsandbytes, and torchao's int8, intx, float8
and CPU int4 weights. Not run on hardware: CUDA's kernels, and torchao's int4 layouts that exist only there; those are
tested with a stand-in for the kernel.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from tinylora_lite.utils.distributed import whole

Quantization = Literal["bitsandbytes 4-bit", "bitsandbytes 8-bit", "torchao"]

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROWS_AT_ONCE = 1024
CURE = "load the model without quantization (dtype=torch.bfloat16), or quantized by bitsandbytes or torchao"

PACKED = "was packed for inference by bitsandbytes; load the model again and attach before its first forward pass"


class Stored(NamedTuple):
    """One parameter as it lies in memory.

    Attributes:
        name: in ``named_parameters()``.
        shape: of the parameter that it stands for, ``[out, in]`` also where 4-bit numbers are packed.
        parts: the plain tensors that determine its values; the parameter alone where it is not quantized.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Tensor, ...]


def quantization_of(module: nn.Module) -> Quantization | None:
    """What quantized a linear layer's weight; ``None`` for a plain weight and for formats that are not known here."""
    if _is_of(type(module), "bitsandbytes", "Linear4bit"):
        return "bitsandbytes 4-bit"
    if _is_of(type(module), "bitsandbytes", "Linear8bitLt"):
        # With has_fp16_weights the layer keeps a plain weight and rounds it anew in every forward pass.
        plain = getattr(getattr(module, "state", None), "has_fp16_weights", False)
        return None if plain else "bitsandbytes 8-bit"
    return "torchao" if _is_of(type(getattr(module, "weight", None)), "torchao") else None


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """``(out, in)`` of a linear layer, of the matrix that packed 4-bit numbers stand for; nothing is dequantized."""
    out_features, in_features = _shape(module, module.get_parameter("weight"))
    return out_features, in_features


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer as a plain matrix, ``[out, in]``, on the layer's device; the layer is not changed.

    Of a plain layer, its weight itself, without a copy. Of bitsandbytes, what its own functions dequantize to, in the
    dtype of the model before (4-bit) or float32 (8-bit). Of torchao, ``dequantize()`` in the dtype of the model; where
    a class has none (int4), what the layer makes of the identity matrix, which takes ``1024 · (in + out)`` numbers of
    memory besides. Not run on hardware: see the head of this file.

    Raises:
        ValueError: the weight is on the meta device, not quantized yet, or in a format that is not known here.
    """
    if problem := _problem(module):
        raise ValueError(f"this {type(module).__name__} {problem}")
    weight, kind = module.get_parameter("weight"), quantization_of(module)
    if kind is None:
        return weight.detach()
    with torch.no_grad():
        if kind == "torchao":
            return _torchao_dense(weight)
        if kind == "bitsandbytes 4-bit":
            dense: Tensor = _bitsandbytes().dequantize_4bit(weight.data, _block_state(module, weight))
        else:
            scales = _row_scales(module, weight).to(weight.device)
            dense = _bitsandbytes().int8_vectorwise_dequant(weight.data, scales)
        return dense


def check_weight(name: str, module: nn.Module, rank: int) -> None:
    """Raises ``ValueError`` where :func:`dense_weight` would, or where a rank is above the weight's smaller side.

    Nothing is dequantized.

    Args:
        name: of the module in ``named_modules()``, for the message.
        module: the linear layer.
        rank: r of the adapter.
    """
    if problem := _problem(module):
        raise ValueError(f"{name} {problem}")
    shape = weight_shape(module)
    if rank > min(shape):
        raise ValueError(f"rank={rank} is above the smaller side of {name}, {shape}; lower the rank")


def stored_parameters(model: nn.Module) -> Iterator[Stored]:
    """All parameters in the order of ``named_parameters()``, quantized ones as packed numbers and scales.

    Equal packed numbers and scales give equal parts, wherever bitsandbytes keeps the scales at the moment, and
    whatever dtype its 4-bit numbers are stored as. Nothing is dequantized, and parts are no copies.

    Raises:
        ValueError: a 4-bit layer was packed for inference, which rounds its scales.
    """
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if _is_packed(_block_state(module, parameter)):
            raise ValueError(f"{name} {PACKED}")
        yield Stored(name, _shape(module, parameter), tuple(_parts(module, parameter)))


def train_through(model: nn.Module) -> list[RemovableHandle]:
    """Makes gradients pass through quantized layers, adapted or not, to the layers before them.

    The layers of torchao pass none where they round their inputs (they drop it without a word, and what the residual
    stream carries past them is still there), and raise an error where they call an int4 kernel. So a forward hook keeps
    the layer's output and sends gradients back through :func:`dense_weight`, dequantized anew: the exact gradient
    where weights alone are quantized, the straight-through one (arXiv 1308.3432) where activations are rounded too.
    This also spares the dense copies that some of these layers keep for the backward pass.

    Linear4bit of bitsandbytes has a gradient of its own, except where a CPU with AVX512-BF16 packs it anew for
    inference, which rounds its scales as well; that packing is switched off until :func:`allow_packing`.

    Returns:
        The hooks' handles. Hooks that are registered later see the outputs unchanged.

    Raises:
        ValueError: a 4-bit layer was packed for inference already. The model is untouched then.
    """
    quantized = [(name, module, kind) for name, module in model.named_modules() if (kind := quantization_of(module))]
    for name, module, kind in quantized:
        if kind == "bitsandbytes 4-bit" and (problem := _problem(module)):
            raise ValueError(f"{name} {problem}")
    for module in _packable(model):
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return [
        module.register_forward_hook(_straight_through, with_kwargs=True)
        for _, module, kind in quantized
        if kind == "torchao"
    ]


def allow_packing(model: nn.Module) -> None:
    """Lets bitsandbytes pack 4-bit layers for inference again, on the CPUs where it does."""
    for module in _packable(model):
        module.support_avx512bf16_for_cpu = _bitsandbytes().has_avx512bf16()


def _packable(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        # Versions before 0.49 have no such packing.
        if quantization_of(module) == "bitsandbytes 4-bit" and hasattr(module, "support_avx512bf16_for_cpu"):
            yield module


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
    through: Tensor = _ThroughDense.apply(x, output.detach(), module)  # type: ignore[no-untyped-call]
    return through


def _bitsandbytes() -> Any:
    return importlib.import_module("bitsandbytes.functional")


def _is_of(kind: type, library: str, name: str | None = None) -> bool:
    return any(base.__module__.partition(".")[0] == library and name in (None, base.__name__) for base in kind.__mro__)


def _problem(module: nn.Module) -> str | None:
    """Why a weight cannot be had, as what follows the module's name in a sentence; ``None`` where it can."""
    weight = getattr(module, "weight", None)
    layer = f"a {type(module).__name__} of {type(module).__module__}"
    if not isinstance(weight, Tensor):
        return f"is {layer} and holds no weight, as quantized layers do; {CURE}"
    if weight.is_meta:
        return "is on the meta device and has no values; load the weights before attach"
    kind = quantization_of(module)
    if kind == "bitsandbytes 4-bit" and _is_packed(_block_state(module, weight)):
        return PACKED
    if kind in ("bitsandbytes 4-bit", "bitsandbytes 8-bit"):
        state = _block_state(module, weight) if kind == "bitsandbytes 4-bit" else _row_scales(module, weight)
        unfinished = "is not quantized yet; bitsandbytes does that when model.to(device) is called, on a CPU too"
        return unfinished if state is None else None
    if kind is None and (weight.dtype not in FLOATING or weight.ndim != 2):
        held = f"{weight.dtype} weights of shape {tuple(weight.shape)}"
        return f"holds {held}, as quantized layers do; {CURE} (it is {layer})"
    # A sharded weight is a subclass of torch's own, and no quantized one.
    if kind is None and type(weight.data) is not Tensor and type(weight.data).__name__ != "DTensor":
        return f"holds a {type(weight.data).__name__}, as quantized layers do; {CURE}"
    return None


def _block_state(module: nn.Module, weight: Tensor) -> Any:
    """The scales of 4-bit blocks; None before quantization. FSDP strips them off the weight; the layer has them too."""
    return getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)


def _is_packed(state: Any) -> bool:
    return bool(getattr(state, "packing_format_for_cpu", False))


def _row_scales(module: nn.Module, weight: Tensor) -> Any:
    """The largest magnitude of each row, float32; None before quantization. The first forward pass moves it."""
    scales = getattr(weight, "SCB", None)
    return getattr(getattr(module, "state", None), "SCB", None) if scales is None else scales


def _shape(module: nn.Module, parameter: Tensor) -> tuple[int, ...]:
    state = _block_state(module, parameter) if _is_of(type(parameter), "bitsandbytes") else None
    return tuple(parameter.shape if state is None else state.shape)


def _torchao_dense(weight: Tensor) -> Tensor:
    if hasattr(weight, "get_original_weight"):  # NF4Tensor, whose dequantize() looks up single numbers
        original: Tensor = weight.get_original_weight()
        return original
    if type(weight).dequantize is Tensor.dequantize:  # torch's own, for a format of torch's own
        return _image_of_identity(weight)
    dense = weight.dequantize()
    scale = getattr(weight, "act_pre_scale", None)
    return dense if scale is None else dense * scale.to(dense.dtype)


def _image_of_identity(weight: Tensor) -> Tensor:
    out_features, in_features = weight.shape
    dense = torch.empty(out_features, in_features, dtype=weight.dtype, device=weight.device)
    for start in range(0, in_features, ROWS_AT_ONCE):
        rows = torch.zeros(min(ROWS_AT_ONCE, in_features - start), in_features, dtype=dense.dtype, device=dense.device)
        rows.diagonal(start).fill_(1)
        dense[:, start : start + len(rows)] = F.linear(rows, weight).T
    return dense


def _parts(module: nn.Module, parameter: Tensor) -> Iterator[Tensor]:
    if _is_of(type(parameter), "torchao"):
        yield from _inner_tensors(parameter)
    elif _is_of(type(parameter), "bitsandbytes") and (state := _block_state(module, parameter)) is not None:
        yield from (parameter.data.view(torch.uint8), state.absmax, state.code)
        if state.nested:
            yield from (state.offset, state.state2.absmax, state.state2.code)
    elif _is_of(type(parameter), "bitsandbytes") and (scales := _row_scales(module, parameter)) is not None:
        yield from (parameter.data, scales)
    else:
        yield parameter.detach()


def _inner_tensors(tensor: Tensor) -> Iterator[Tensor]:
    if not hasattr(tensor, "__tensor_flatten__"):  # the protocol of torch's wrapper subclasses
        yield tensor.detach()
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _inner_tensors(getattr(tensor, name))


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
