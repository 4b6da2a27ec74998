"""Quantized bases, loaded as a user loads them: an adapter on one does what it does on the matrices it stands for."""

import copy
import functools
import sys

import pytest
import torch
from scipy.stats import norm
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen2ForCausalLM

from tinylora_lite import AdapterFileError, TinyLoraConfig, attach, attach_population, load, save
from tinylora_lite.adapter.attached import rows_of
from tinylora_lite.adapter.tying import MODULE_TYPES, find_target_modules
from tinylora_lite.adapter.weights import (
    base_fingerprint,
    check_weight,
    dense_weight,
    quantization_of,
    stored_parameters,
    train_through,
    weight_shape,
)

TOKENS = torch.tensor([[5, 9, 2, 40, 7, 7, 31, 3]])
CONFIG = TinyLoraConfig(rank=2, u=3, n_tie=5)

WEIGHT_ONLY = ["nf4", "nf4, scales quantized too", "fp4", "bnb int8"]
WEIGHT_ONLY += ["torchao int8", "torchao int8 in groups", "torchao int4", "torchao float8", "torchao int4 kernel"]
ROUNDED_INPUTS = ["torchao int8, inputs too", "torchao int4, inputs int8"]


def bitsandbytes_config(name):
    pytest.importorskip("bitsandbytes")
    if name == "bnb int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=name[:3],
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant="scales" in name,
    )


def torchao_config(name):
    pytest.importorskip("torchao")
    from torchao import quantization as ao
    from torchao.prototype.quantization.int4 import inference_workflow as cpu_int4
    from transformers import TorchAoConfig

    group = ao.PerGroup(32)
    configs = {
        "torchao int8": lambda: ao.Int8WeightOnlyConfig(),
        "torchao int8 in groups": lambda: ao.Int8WeightOnlyConfig(granularity=group),
        "torchao int4": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=group),
        "torchao float8": lambda: ao.Float8WeightOnlyConfig(),
        "torchao int4 kernel": lambda: cpu_int4.PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False),
        "torchao int8, inputs too": lambda: ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
        "torchao int4, inputs int8": lambda: ao.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=group
        ),
    }
    return TorchAoConfig(configs[name]())


@pytest.fixture(scope="module")
def dense(make_model) -> Qwen2ForCausalLM:
    # Rows of 64 and more, and columns in multiples of 32: what 4-bit blocks and int4 kernels ask for.
    return make_model(hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def checkpoint(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    dense.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(checkpoint):
    """``quantized(name)``: the dense model's checkpoint, quantized while it is loaded, in training mode; a copy."""

    @functools.cache
    def loaded(name, dtype):
        config = torchao_config(name) if name.startswith("torchao") else bitsandbytes_config(name)
        # In evaluation mode bitsandbytes rounds the inputs of its 8-bit layers to 8 bits as well.
        return AutoModelForCausalLM.from_pretrained(
            checkpoint, quantization_config=config, dtype=dtype, device_map="cpu"
        ).train()

    return lambda name, dtype=torch.float32: copy.deepcopy(loaded(name, dtype))


def targets(model):
    return {name: m for name, m in model.named_modules() if name.rpartition(".")[2] in MODULE_TYPES}


def twin_of(model, dense):
    """The dense model with the matrices that a quantized one stands for."""
    twin = copy.deepcopy(dense).train()
    with torch.no_grad():
        for name, module in targets(model).items():
            twin.get_submodule(name).weight.copy_(dense_weight(module))
    return twin


def adapted(model, config=CONFIG):
    """Logits and v's gradient of an adapter whose v is not zero."""
    adapter = attach(model, config)
    with torch.no_grad():
        adapter.vectors.copy_(torch.randn(adapter.vectors.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    logits = model(TOKENS).logits
    F.cross_entropy(logits[0, :-1], TOKENS[0, 1:]).backward()
    return logits.detach(), adapter.vectors.grad, adapter


def relative(found, wanted):
    return float(((found.double() - wanted.double()).norm() / wanted.double().norm()).detach())


def stored(model):
    return [(name, shape, [part.clone() for part in parts]) for name, shape, parts in stored_parameters(model)]


def same(before, after):
    return all(
        name == other and shape == changed and all(torch.equal(a, b) for a, b in zip(parts, others, strict=True))
        for (name, shape, parts), (other, changed, others) in zip(before, after, strict=True)
    )


def nearest(values, levels):
    return levels[(values[..., None] - levels).abs().argmin(-1)]


def four_bit(weight, levels):
    blocks = weight.reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    return (nearest(blocks / largest, levels) * largest).view_as(weight)


def normal_float_levels():
    """NF4 (QLoRA, arXiv 2305.14314, appendix E): quantiles of the normal distribution, 8 above zero and 7 below."""
    outermost = (1 - 1 / 32 + 1 - 1 / 30) / 2
    above = norm.ppf(torch.linspace(outermost, 0.5, 9, dtype=torch.float64)[:-1].numpy())
    below = -norm.ppf(torch.linspace(outermost, 0.5, 8, dtype=torch.float64)[:-1].numpy())
    levels = torch.tensor([*below, 0.0, *above]).sort().values
    return (levels / levels.max()).float()


def affine(weight, group, lowest, highest):
    blocks = weight.reshape(-1, group)
    scale = blocks.abs().amax(1, keepdim=True) / ((highest - lowest) / 2)
    return ((blocks / scale).round().clamp(lowest, highest) * scale).view_as(weight)


def row_wise_int8(weight):
    largest = weight.half().float().abs().amax(1, keepdim=True)
    return (weight.half().float() * 127 / largest).round() * largest / 127


FORMULAS = {
    "nf4": lambda w: four_bit(w, normal_float_levels()),
    "fp4": lambda w: four_bit(w, torch.tensor([s * m / 12 for m in (0, 0.0625, 2, 3, 4, 6, 8, 12) for s in (1, -1)])),
    "bnb int8": row_wise_int8,
    "torchao int8": lambda w: affine(w, w.shape[1], -128, 127),
    "torchao int4": lambda w: affine(w, 32, -8, 7),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_dense_weight_is_what_the_format_is_published_to_hold(name, quantized, dense):
    for target, module in targets(quantized(name)).items():
        wanted = FORMULAS[name](dense.get_submodule(target).weight.detach())
        # A value halfway between two levels may fall to either side, as the largest of each row does in torchao.
        assert torch.isclose(dense_weight(module), wanted, rtol=1e-5, atol=1e-6).float().mean() > 0.99


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_the_dense_weight_is_what_the_layer_multiplies_by(name, quantized):
    model = quantized(name)
    assert len(targets(model)) == 14
    for module in targets(model).values():
        weight = dense_weight(module)
        assert type(weight) is torch.Tensor
        assert weight.is_floating_point()
        assert tuple(weight.shape) == weight_shape(module) == (module.out_features, module.in_features)
        x = torch.randn(3, module.in_features)
        assert relative(module(x), F.linear(x, weight, module.bias)) < 2e-6


@pytest.mark.parametrize("name", ["nf4", "bnb int8", "torchao int8"])
def test_half_precision(name, quantized):
    logits, gradient, _ = adapted(quantized(name, torch.bfloat16))
    assert logits.dtype == torch.bfloat16
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all()
    assert gradient.count_nonzero() == gradient.numel()


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_an_adapter_computes_and_learns_as_on_the_dense_matrices(name, quantized, dense):
    model = quantized(name)
    twin = twin_of(model, dense)
    before, plain = stored(model), model(TOKENS).logits.detach()
    logits, gradient, adapter = adapted(model)
    wanted, wanted_gradient, _ = adapted(twin)
    assert relative(logits, wanted) < 1e-5
    assert relative(gradient, wanted_gradient) < 1e-4
    assert relative(plain, wanted) > 1e-2

    adapter.detach()
    assert same(before, stored(model))
    assert torch.equal(plain, model(TOKENS).logits)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("only", [None, ["q_proj"]])
@pytest.mark.parametrize("name", [*ROUNDED_INPUTS, "bnb int8"])
def test_gradients_pass_layers_that_round_their_inputs(name, only, quantized, dense):
    """The adapted ones and the others. What the residual stream carries alone would be far off."""
    model = quantized(name)
    config = TinyLoraConfig(rank=2, u=3, n_tie=5, target_modules=only)
    twin = twin_of(model, dense)
    logits, gradient, _ = adapted(model.eval() if name == "bnb int8" else model, config)
    wanted, wanted_gradient, _ = adapted(twin, config)
    assert 1e-4 < relative(logits, wanted) < 0.1
    assert relative(gradient, wanted_gradient) < 0.15


@pytest.mark.parametrize("name", ["torchao int8", "torchao int4 kernel", *ROUNDED_INPUTS])
def test_a_gradient_through_one_layer_is_that_of_its_dense_weight(name, quantized):
    model = quantized(name).requires_grad_(False)
    module = model.model.layers[0].mlp.down_proj
    x, upstream = torch.randn(2, 3, 128, requires_grad=True), torch.randn(2, 3, 64)
    plain = module(x).detach()
    handles = train_through(model)
    output = module(x)
    assert torch.equal(output, plain)
    (gradient,) = torch.autograd.grad(output.relu_(), x, upstream)
    assert torch.allclose(gradient, (upstream * (plain > 0)) @ dense_weight(module), atol=1e-6)
    assert not module(x.detach()).requires_grad
    with torch.no_grad():
        assert not module(input=x).requires_grad
    for handle in handles:
        handle.remove()
    assert not any(m._forward_hooks for m in model.modules())


def test_gradient_checkpointing(quantized):
    _, wanted, _ = adapted(quantized("torchao int8, inputs too"))
    model = quantized("torchao int8, inputs too")
    model.gradient_checkpointing_enable()
    _, gradient, _ = adapted(model)
    assert relative(gradient, wanted) < 1e-6


@pytest.mark.parametrize("name", ["nf4, scales quantized too", "bnb int8", "torchao int8, inputs too"])
def test_a_copy_of_an_adapted_model(name, quantized):
    model = quantized(name)
    logits, gradient, adapter = adapted(model)
    adapter.vectors.grad = None
    twin = copy.deepcopy(model)
    adapter.detach()
    again = twin(TOKENS).logits
    assert torch.equal(again, logits)
    F.cross_entropy(again[0, :-1], TOKENS[0, 1:]).backward()
    found = [p.grad for m in twin.modules() for h in m._forward_hooks.values() for p in grads_of(h)]
    assert relative(found[0], gradient) < 1e-6
    assert adapter.vectors.grad is None


def grads_of(hook):
    adapter = getattr(hook, "adapter", None)
    return [] if adapter is None else [adapter.vectors]


@pytest.mark.parametrize("name", [*WEIGHT_ONLY, *ROUNDED_INPUTS])
def test_what_is_stored_has_the_shapes_of_the_dense_model_and_survives_a_forward_pass(name, quantized, dense):
    model = quantized(name)
    before, first = stored(model), base_fingerprint(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in dense.named_parameters()}
    assert {name: shape for name, shape, _ in before} == shapes
    model(TOKENS)
    model.eval()(TOKENS)
    assert same(before, stored(model))
    assert base_fingerprint(model) == base_fingerprint(quantized(name)) == first != base_fingerprint(dense)


@pytest.mark.parametrize("name", ["nf4, scales quantized too", "bnb int8", "torchao int4"])
def test_a_saved_quantized_model_is_the_same_base(name, quantized, tmp_path):
    model = quantized(name)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert base_fingerprint(again) == base_fingerprint(model)


@pytest.mark.parametrize("name", ["nf4, scales quantized too", "bnb int8", "torchao int8", "torchao int4 kernel"])
def test_every_part_counts_in_the_fingerprint(name, quantized):
    model = quantized(name)
    first = base_fingerprint(model)
    (parts,) = [parts for name, _, parts in stored_parameters(model) if name.endswith("layers.1.mlp.up_proj.weight")]
    assert len(parts) == (6 if "scales" in name else 3 if name == "torchao int8" else 2)
    for part in parts:
        flat = part.view(torch.uint8).reshape(-1) if part.ndim else part.reshape(1).view(torch.uint8)
        flat[-1] ^= 1
        assert base_fingerprint(model) != first
        flat[-1] ^= 1
    assert base_fingerprint(model) == first


def test_the_dtype_in_which_four_bit_numbers_are_stored_does_not_count(dense):
    bnb = pytest.importorskip("bitsandbytes")

    def model(storage):
        layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4", quant_storage=storage)
        layer.load_state_dict(dense.model.layers[0].self_attn.k_proj.state_dict())
        return nn.Sequential(layer).to("cpu")

    for storage in (torch.bfloat16, torch.float16, torch.float32):
        assert model(storage)[0].weight.dtype == storage
        assert base_fingerprint(model(storage)) == base_fingerprint(model(torch.uint8))


def test_an_adapter_file_knows_its_quantized_base(quantized, dense, tmp_path):
    model = quantized("nf4")
    logits, _, adapter = adapted(model)
    path = save(adapter, tmp_path / "a.tinylora", "fp32")
    other = quantized("nf4")
    load(other, path)
    assert torch.equal(other(TOKENS).logits, logits)
    for wrong in (quantized("bnb int8"), copy.deepcopy(dense)):
        with pytest.raises(AdapterFileError, match="this model's weights differ from that base's"):
            load(wrong, path)


def test_layers_replaced_by_hand(dense):
    bnb = pytest.importorskip("bitsandbytes")
    model = copy.deepcopy(dense)
    for name, module in targets(dense).items():
        if "self_attn" in name:
            layer = bnb.nn.Linear4bit(module.in_features, module.out_features, module.bias is not None)
        else:
            layer = bnb.nn.Linear8bitLt(module.in_features, module.out_features, False, has_fp16_weights=False)
        layer.load_state_dict(module.state_dict())
        model.set_submodule(name, layer)
    with pytest.raises(ValueError, match=r"q_proj is not quantized yet; .* when model\.to\(device\) is called"):
        attach(model)
    with pytest.raises(ValueError, match=r"^this Linear8bitLt is not quantized yet"):
        dense_weight(model.model.layers[0].mlp.up_proj)
    model = model.to("cpu").train()
    assert [quantization_of(m) for m in targets(model).values()][3:5] == ["bitsandbytes 4-bit", "bitsandbytes 8-bit"]
    logits, gradient, _ = adapted(model)
    wanted, wanted_gradient, _ = adapted(twin_of(model, dense))
    assert relative(logits, wanted) < 1e-5
    assert relative(gradient, wanted_gradient) < 1e-4


def test_an_eight_bit_layer_that_keeps_its_weights_is_a_plain_one(dense):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=True).to("cpu")
    assert quantization_of(layer) is None
    assert torch.equal(dense_weight(layer), layer.weight.data)


def test_normal_float_of_torchao(dense):
    pytest.importorskip("torchao")
    from torchao.quantization.quantize_.workflows import to_nf4

    layer = copy.deepcopy(dense.model.layers[0].mlp.up_proj).requires_grad_(False)
    weight, layer.weight = layer.weight, nn.Parameter(to_nf4(layer.weight, 64, 128), requires_grad=False)
    assert quantization_of(layer) == "torchao"
    assert weight_shape(layer) == (128, 64)
    assert 0.01 < relative(dense_weight(layer), weight) < 0.15
    x = torch.randn(3, 64)
    assert relative(layer(x), x @ dense_weight(layer).T) < 1e-6


def test_a_scale_on_the_inputs_belongs_to_the_weight(quantized):
    """As SmoothQuant and AWQ leave one."""
    layer = quantized("torchao int8").model.layers[0].mlp.up_proj
    layer.weight.act_pre_scale = torch.rand(64) + 0.5
    x = torch.randn(3, 64)
    assert relative(layer(x), x @ dense_weight(layer).T) < 1e-6


@pytest.fixture
def cuda_int4():
    """A layer with torchao's own Int4Tensor, whose kernel exists for CUDA alone, and a stand-in for that kernel.

    Not run on hardware. The stand-in multiplies by ``number · scale + zero`` in groups of 32, the low half of a byte
    first, and like the kernel it has no gradient.
    """
    pytest.importorskip("torchao")
    from torchao.quantization import Int4Tensor

    def matrix(packed, scale, zero):
        numbers = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).float()
        return numbers * scale.T.repeat_interleave(32, 1).float() + zero.T.repeat_interleave(32, 1).float()

    library = torch.library.Library("mslk", "FRAGMENT")
    library.define("bf16i4bf16_rowwise(Tensor x, Tensor weight, Tensor scale, Tensor zero) -> Tensor")
    library.impl("bf16i4bf16_rowwise", lambda x, *weight: (x.float() @ matrix(*weight).T).to(x.dtype), "CPU")
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (48, 1088 // 2), dtype=torch.uint8, generator=generator)
    scale, zero = (torch.randn(1088 // 32, 48, generator=generator).bfloat16() for _ in range(2))
    layer = nn.Linear(1088, 48, bias=False)
    layer.weight = nn.Parameter(Int4Tensor(packed, scale, zero, [1, 32], torch.Size([48, 1088])), requires_grad=False)
    yield layer, matrix(packed, scale, zero).bfloat16()
    library._destroy()


def test_an_int4_weight_of_cuda(cuda_int4):
    layer, wanted = cuda_int4
    assert weight_shape(layer) == (48, 1088)
    assert torch.equal(dense_weight(layer), wanted)
    train_through(layer)
    x = torch.randn(3, 1088, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, wanted.sum(0).expand(3, -1), atol=0.5)
    assert relative(x.grad, wanted.float().sum(0).expand(3, -1)) < 0.01


def pack_for_inference(model):
    """What Linear4bit does to itself in a forward pass on a CPU with AVX512-BF16."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)


@pytest.mark.parametrize("population", [False, True])
def test_four_bit_layers_are_not_packed_for_inference_under_an_adapter(quantized, population):
    """On every machine as on one with AVX512-BF16, where packing would round the scales and cut the gradient."""
    model = quantized("nf4").eval()
    layer = model.model.layers[1].mlp.up_proj
    for module in targets(model).values():
        module.support_avx512bf16_for_cpu = True
    config = TinyLoraConfig(target_modules=["q_proj"])
    adapter = attach_population(model, [config] * 2) if population else attach(model, config)
    before = stored(model)
    with torch.no_grad(), rows_of(torch.zeros(len(TOKENS), dtype=torch.long) if population else None):
        model(TOKENS)
    assert same(before, stored(model))
    assert not hasattr(layer.weight.quant_state, "packing_format_for_cpu")
    adapter.detach()
    from bitsandbytes.functional import has_avx512bf16

    assert layer.support_avx512bf16_for_cpu == has_avx512bf16()


@pytest.mark.parametrize("only", [None, ["q_proj"]])
def test_a_layer_packed_for_inference_is_refused(only, quantized):
    model = quantized("nf4")
    pack_for_inference(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    message = r"layers\.1\.mlp\.up_proj was packed for inference .*; load the model again"
    with pytest.raises(ValueError, match=message):
        attach(model, TinyLoraConfig(target_modules=only))
    with pytest.raises(ValueError, match=r"up_proj\.weight was packed for inference"):
        base_fingerprint(model)
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert not any(module._forward_hooks for module in model.modules())


class Packed(nn.Linear):
    """A stand-in for the layers of libraries that are not known here."""

    def __init__(self, weight):
        super().__init__(4, 4)
        del self.weight
        if weight is not None:
            self.weight = nn.Parameter(weight, requires_grad=False)


class Tile(torch.Tensor):
    """A stand-in for a tensor of such a library, which calls itself float32."""


KNOWN = r"load the model without quantization \(dtype=torch\.bfloat16\), or quantized by bitsandbytes or torchao"
UNKNOWN = {
    "packed": (torch.zeros(8, 1, dtype=torch.uint8), r"holds torch.uint8 weights of shape \(8, 1\)"),
    "float8": (torch.zeros(4, 4).to(torch.float8_e4m3fn), r"holds torch.float8_e4m3fn weights"),
    "a tensor's subclass": (torch.zeros(4, 4).as_subclass(Tile), "holds torch.float32 weights of shape .* as a Tile"),
    "nothing": (None, "holds no weight"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_unknown_format_names_its_class_and_the_cure(case):
    weight, message = UNKNOWN[case]
    layer = Packed(weight)
    assert quantization_of(layer) is None
    with pytest.raises(ValueError, match=f"^a.b is a Packed of .* and {message}.*, as quantized layers do; {KNOWN}$"):
        check_weight("a.b", layer, 1)
    with pytest.raises(ValueError, match=f"^this Packed is a Packed of .* and {message}.*{KNOWN}$"):
        dense_weight(layer)


def test_an_fp8_layer_of_transformers_is_named(dense):
    from transformers.integrations.finegrained_fp8 import FP8Linear

    model = copy.deepcopy(dense)
    model.model.layers[0].self_attn.q_proj = FP8Linear(64, 64)
    with pytest.raises(ValueError, match=rf"q_proj is a FP8Linear of .* and holds torch\.float8_e4m3fn .*{KNOWN}"):
        attach(model)


def test_weights_without_values_or_with_too_few():
    with pytest.raises(ValueError, match=r"^a\.b is on the meta device and has no values; load the weights"):
        check_weight("a.b", nn.Linear(4, 4, device="meta"), 1)
    check_weight("a.b", nn.Linear(4, 8), 4)
    with pytest.raises(ValueError, match=r"^rank=5 is above the smaller side of a\.b, \(8, 4\); lower the rank$"):
        check_weight("a.b", nn.Linear(4, 8), 5)


class WQLinear(nn.Module):
    """A stand-in for the layers of AWQ and GPTQ, which are no ``nn.Linear``."""


def test_one_layer_of_an_unknown_kind_among_linear_ones_is_not_passed_over(dense):
    model = copy.deepcopy(dense)
    model.model.layers[1].mlp.up_proj = WQLinear()
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.up_proj is a WQLinear of .*, no torch\.nn\.Linear.*torchao$"
    ):
        find_target_modules(model)
    assert len(find_target_modules(model, ["q_proj"])) == 2


def test_plain_models_need_neither_library(make_model, monkeypatch):
    for library in ("bitsandbytes", "torchao"):
        monkeypatch.setitem(sys.modules, library, None)
    model = make_model()
    weight = model.model.layers[0].mlp.up_proj.weight
    assert dense_weight(model.model.layers[0].mlp.up_proj).data_ptr() == weight.data_ptr()
    assert [(name, shape) for name, shape, _ in stored_parameters(model)] == [
        (name, tuple(parameter.shape)) for name, parameter in model.named_parameters()
    ]
    first = base_fingerprint(model)
    assert train_through(model) == []
    attach(model).detach()
    assert base_fingerprint(model) == first
