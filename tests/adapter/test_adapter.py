"""The adapter: exactly W' = W + (U Σ) R Vᵀ, beside a model that stays as it is."""

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tinylora_lite import Basis, TinyLoraConfig, attach, lora_xs
from tinylora_lite.adapter.attached import adapter_of
from tinylora_lite.adapter.layer import random_projection
from tinylora_lite.adapter.tying import MODULE_TYPES, find_target_modules, groups_of

TOKENS = torch.arange(2, 18).reshape(2, 8)


def make_basis(model, directions=5, rank=2, sigma="left") -> Basis:
    names = tuple(target.name for target in find_target_modules(model))
    flat = torch.randn(directions, len(names), rank, rank, generator=torch.Generator().manual_seed(0))
    return Basis(flat / flat.flatten(1).norm(dim=1)[:, None, None, None], names, sigma)


def set_vectors(adapter, scale=0.3, seed=0):
    with torch.no_grad():
        adapter.vectors.copy_(scale * torch.randn(adapter.vectors.shape, generator=torch.Generator().manual_seed(seed)))


def reference_update(weight, R, sigma):
    """``[out, in]`` float64, from LAPACK's SVD and the formula."""
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    signs = U[U.abs().argmax(dim=0), torch.arange(len(S))].sign()
    r = len(R)
    U, S, Vh = (U * signs)[:, :r], S[:r], (Vh * signs[:, None])[:r]
    middle = {
        "left": S[:, None] * R,
        "split": S[:, None].sqrt() * R * S.sqrt(),
        "right": R * S,
    }[sigma]
    return U @ middle @ Vh


def reference_logits(model, config, v):
    """Logits in float64 from weights that are really changed; differentiable in v ``[groups, u]``."""
    targets = find_target_modules(model, config.target_modules)
    weights = dict(model.named_parameters())
    changed = {}
    for index, (target, group) in enumerate(zip(targets, groups_of(targets, config.n_tie, config.tying), strict=True)):
        if config.projection == "random":
            P = random_projection(config.seed, index, config.u, config.rank)
        elif config.projection == "identity":
            P = torch.eye(config.u).reshape(config.u, config.rank, config.rank)
        else:
            P = config.projection.directions[: config.u, config.projection.names.index(target.name)]
        weight = weights[f"{target.name}.weight"].detach().double()
        R = torch.einsum("i,ijk->jk", v[group], P.double())
        changed[f"{target.name}.weight"] = weight + reference_update(weight, R, config.sigma)
    double = copy.deepcopy(model).double()
    return functional_call(double, changed, (TOKENS,)).logits


def snapshot(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return state, {name: p.requires_grad for name, p in model.named_parameters()}


def same(before, model):
    state, flags = before
    now = model.state_dict()
    return (
        list(state) == list(now)
        and all(torch.equal(state[name], now[name]) for name in state)
        and flags == {name: p.requires_grad for name, p in model.named_parameters()}
    )


CONFIGS = {
    "the default": {},
    "tiled": {"rank": 3, "u": 2, "n_tie": 4, "seed": 5},
    "structured": {"rank": 1, "u": 3, "n_tie": 2, "tying": "structured"},
    "one v for all": {"u": 13, "n_tie": "all"},
    "some modules": {"target_modules": ["q_proj", "down_proj"]},
    "identity": {"u": 4, "projection": "identity"},
    "basis": {"u": 3, "n_tie": 5, "projection": make_basis},
}


@pytest.mark.parametrize("sigma", ["left", "split", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_forward_and_gradient_are_those_of_the_formula(model, name, sigma):
    settings = dict(CONFIGS[name])
    if callable(settings.get("projection")):
        settings["projection"] = settings["projection"](model, sigma=sigma)
    config = TinyLoraConfig(sigma=sigma, **settings)
    adapter = attach(model, config)
    set_vectors(adapter)
    probe = torch.randn(2, 8, model.config.vocab_size, generator=torch.Generator().manual_seed(1))
    logits = model(TOKENS).logits
    (logits * probe).sum().backward()
    gradient = adapter.vectors.grad
    adapter.detach()

    v = adapter.vectors.detach().double().requires_grad_()
    wanted = reference_logits(model, config, v)
    (wanted_gradient,) = torch.autograd.grad((wanted * probe.double()).sum(), v)
    base = model(TOKENS).logits
    assert (wanted - base).norm() > 0.05 * base.norm()
    assert (logits - wanted).norm() < 1e-5 * wanted.norm()
    assert (gradient - wanted_gradient).norm() < 1e-5 * wanted_gradient.norm()


def test_delta_and_mixing_are_those_of_the_formula(model):
    adapter = attach(model, TinyLoraConfig(u=2, n_tie=3, sigma="split"))
    set_vectors(adapter)
    for index, (name, group) in enumerate(zip(adapter.names, adapter.groups, strict=True)):
        R = torch.einsum("i,ijk->jk", adapter.vectors[group].detach(), random_projection(0, index, 2, 2))
        torch.testing.assert_close(adapter.mixing(name).detach(), R)
        weight = model.get_submodule(name).weight
        wanted = reference_update(weight, R.double(), "split")
        found = adapter.delta(name)
        assert (found.dtype, found.shape, found.requires_grad) == (torch.float32, weight.shape, False)
        assert (found - wanted).norm() < 1e-5 * wanted.norm()
    assert adapter.mixing(adapter.names[0]).requires_grad
    for method in (adapter.delta, adapter.mixing):
        with pytest.raises(KeyError, match=r"lm_head is not an adapted module; adapter\.names lists the 14"):
            method("lm_head")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
@pytest.mark.parametrize("sigma", ["left", "split", "right"])
def test_a_half_precision_base_trains_float32_numbers(dtype, tolerance, sigma):
    # One layer, so that the reference is not blurred by the rounding of all the others.
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(24, 20).to(dtype))
    x = torch.randn(64, 24).to(dtype)
    adapter = attach(layer, TinyLoraConfig(u=4, sigma=sigma, target_modules=["0"]))
    assert adapter.vectors.dtype == torch.float32
    set_vectors(adapter, scale=1.0)
    y = layer(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert adapter.vectors.grad.dtype == torch.float32

    v = adapter.vectors.detach()[0].double().requires_grad_()
    weight, bias = layer[0].weight.double(), layer[0].bias.double()
    R = torch.einsum("i,ijk->jk", v, random_projection(0, 0, 4, 2).double())
    wanted = x.double() @ (weight + reference_update(weight, R, sigma)).T + bias
    (gradient,) = torch.autograd.grad(wanted.square().sum(), v)
    assert (y - wanted).norm() < tolerance * wanted.norm()
    assert (adapter.vectors.grad[0] - gradient).norm() < tolerance * gradient.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [TinyLoraConfig(), TinyLoraConfig(u=13, n_tie="all"), lora_xs(4)])
def test_it_starts_equal_to_the_base(model, dtype, config):
    model.to(dtype)
    base = model(TOKENS).logits
    adapter = attach(model, config)
    assert not adapter.vectors.any()
    assert torch.equal(model(TOKENS).logits, base)


def test_the_model_stays_as_it_is(model):
    model.model.norm.weight.requires_grad_(False)
    before, base = snapshot(model), model(TOKENS).logits
    adapter = attach(model, TinyLoraConfig(u=2))
    assert not any(p.requires_grad for p in model.parameters())
    assert [name for name, p in adapter.named_parameters() if p.requires_grad] == ["vectors"]
    assert list(adapter.state_dict()) == ["vectors"]
    optimiser = torch.optim.Adam(adapter.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        model(TOKENS).logits.square().mean().backward()
        optimiser.step()
    assert not torch.equal(model(TOKENS).logits, base)
    assert all(p.grad is None for p in model.parameters())
    adapter.detach()
    assert same(before, model)
    assert torch.equal(model(TOKENS).logits, base)
    assert adapter.vectors.any()
    adapter.detach()
    assert same(before, model)
    attach(model).detach()
    assert same(before, model)


def test_an_old_adapter_does_not_reach_into_a_new_one(model):
    old = attach(model)
    old.detach()
    new = attach(model)
    set_vectors(new)
    adapted = model(TOKENS).logits
    old.detach()
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model(TOKENS).logits, adapted)


def test_disabled_computes_as_the_base_and_recovers_from_errors(model):
    base = model(TOKENS).logits
    adapter = attach(model)
    set_vectors(adapter)
    adapted = model(TOKENS).logits
    with adapter.disabled(), adapter.disabled():
        assert torch.equal(model(TOKENS).logits, base)
    with pytest.raises(RuntimeError), adapter.disabled():
        raise RuntimeError
    assert torch.equal(model(TOKENS).logits, adapted)


class Products(TorchDispatchMode):
    """The shapes of everything computed, views left out."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor, returned in zip(
            out if isinstance(out, tuple | list) else [out], func._schema.returns, strict=False
        ):
            if isinstance(tensor, torch.Tensor) and returned.alias_info is None:
                self.shapes.add(tuple(tensor.shape))
        return out


def test_the_changed_weight_is_never_formed(make_model):
    model = make_model(hidden_size=40, intermediate_size=52)
    adapter = attach(model)
    set_vectors(adapter)
    weights = {tuple(model.get_submodule(name).weight.shape) for name in adapter.names}
    with Products() as products:
        model(TOKENS[:1, :3]).logits.sum().backward()
    assert (1, 3, 52) in products.shapes
    assert products.shapes & (weights | {shape[::-1] for shape in weights}) == set()
    with Products() as products:
        adapter.delta(adapter.names[0])
    assert products.shapes & weights


def test_generation_with_a_cache_is_that_of_the_merged_model(model):
    adapter = attach(model, TinyLoraConfig(u=2))
    set_vectors(adapter)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), **options)
    with adapter.disabled():
        base = model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), **options)
    adapter.detach()
    with torch.no_grad():
        for name in adapter.names:
            model.get_submodule(name).weight += adapter.delta(name)
    merged = model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), use_cache=False, **options)
    assert torch.equal(found, merged)
    assert not torch.equal(found, base)


def test_no_grad_builds_no_graph(model):
    adapter = attach(model)
    set_vectors(adapter)
    assert model(TOKENS).logits.requires_grad
    with torch.no_grad():
        assert not model(TOKENS).logits.requires_grad


def test_gradient_checkpointing_gives_the_same_gradient(model):
    adapter = attach(model, TinyLoraConfig(u=2, n_tie=3))
    set_vectors(adapter)
    model.train()
    (plain,) = torch.autograd.grad(model(TOKENS).logits.square().sum(), adapter.vectors)
    # The name of it changes between versions of transformers.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    (found,) = torch.autograd.grad(model(TOKENS).logits.square().sum(), adapter.vectors)
    assert plain.norm() > 0
    torch.testing.assert_close(found, plain)


def test_autocast_keeps_the_numbers_and_their_gradient_in_float32(model):
    adapter = attach(model, TinyLoraConfig(u=2, n_tie=4))
    set_vectors(adapter)
    full = model(TOKENS).logits
    (wanted,) = torch.autograd.grad(full.square().sum(), adapter.vectors)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(TOKENS).logits
    (gradient,) = torch.autograd.grad(logits.float().square().sum(), adapter.vectors)
    assert (logits.dtype, gradient.dtype) == (torch.bfloat16, torch.float32)
    assert (logits - full).norm() < 3e-2 * full.norm()
    assert (gradient - wanted).norm() < 0.1 * wanted.norm()


def test_autocast_sums_the_gradient_of_many_tokens_in_float32():
    layer = nn.Sequential(nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        layer[0].weight.copy_(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])))
    adapter = attach(layer, lora_xs(1, target_modules=["0"]))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.eye(4)[:1].repeat(257, 1))
    (gradient,) = torch.autograd.grad(y[:, 0].float().sum(), adapter.vectors)
    # bfloat16 holds 1024 and 1032, and nothing between them.
    assert gradient.item() == 257 * 4


def test_moving_the_model_or_the_adapter(model):
    adapter = attach(model)
    set_vectors(adapter)
    values = adapter.vectors.detach().clone()
    parameter = adapter.vectors
    adapter.to(torch.bfloat16)
    adapter.half()
    assert adapter.vectors is parameter
    assert torch.equal(parameter, values)
    assert parameter.dtype == torch.float32
    wanted = model(TOKENS).logits
    model.double()
    assert (model(TOKENS).logits - wanted).norm() < 1e-5 * wanted.norm()
    adapter.to("meta")
    assert adapter.vectors.is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(model):
    adapter = attach(model, TinyLoraConfig(u=2, n_tie=4))
    set_vectors(adapter)
    wanted = model(TOKENS).logits
    (gradient,) = torch.autograd.grad(wanted.square().sum(), adapter.vectors)
    model.cuda()
    for move in (lambda: None, adapter.cuda):
        move()
        logits = model(TOKENS.cuda()).logits
        (found,) = torch.autograd.grad(logits.square().sum(), adapter.vectors)
        torch.testing.assert_close(logits.cpu(), wanted, rtol=1e-3, atol=1e-3)
        assert (found.cpu() - gradient).norm() < 1e-3 * gradient.norm()
    adapter.detach()
    there = attach(model, adapter.config)
    assert there.vectors.is_cuda
    for name in there.names:
        with torch.no_grad():
            there.vectors.copy_(adapter.vectors)
        torch.testing.assert_close(there.delta(name).cpu(), adapter.delta(name).cpu(), rtol=1e-4, atol=1e-5)


def test_a_module_called_by_keyword():
    layer = nn.Sequential(nn.Linear(4, 3))
    adapter = attach(layer, TinyLoraConfig(target_modules=["0"]))
    set_vectors(adapter)
    x = torch.ones(2, 4)
    assert torch.equal(layer[0](input=x), layer(x))
    assert not torch.equal(layer(x), F_linear(layer[0], x))


def F_linear(layer, x):  # noqa: N802
    return nn.functional.linear(x, layer.weight, layer.bias)


def test_a_second_adapter_is_refused_until_the_first_is_off(model):
    adapter = attach(model)
    set_vectors(adapter)
    before, adapted = snapshot(model), model(TOKENS).logits
    for carrier in (model, model.model):
        with pytest.raises(ValueError, match=r"carries an adapter already; call its detach\(\) first"):
            attach(carrier)
    assert same(before, model)
    assert torch.equal(model(TOKENS).logits, adapted)
    assert adapter_of(model) is adapter
    adapter.detach()
    assert adapter_of(model) is None
    attach(model.model)


class Packed(nn.Linear):
    """A stand-in for the layers of quantization libraries: a subclass of ``nn.Linear`` with packed weights."""

    def __init__(self, shape, dtype):
        super().__init__(4, 4)
        self.weight = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)


class Tile(torch.Tensor):
    """A stand-in for the tensors of quantization libraries, which call themselves float32."""


def swap(model, module):
    model.model.layers[1].mlp.up_proj = module


REFUSED = {
    "an unknown module": (lambda m: None, {"target_modules": ["up_proj", "c_fc"]}, "no linear layer named c_fc in"),
    "no linear layer": (lambda m: None, {"target_modules": ["norm"]}, "no linear layer named norm in"),
    "a rank above a weight": (
        lambda m: None,
        {"rank": 17},
        r"rank=17 is above the smaller side of model\.layers\.0\.self_attn\.k_proj, \(16, 32\); lower the rank",
    ),
    "four-bit weights": (
        lambda m: swap(m, Packed((8, 1), torch.uint8)),
        {},
        r"layers\.1\.mlp\.up_proj is a Packed of .* holds torch.uint8 weights of shape \(8, 1\) .*; load the model",
    ),
    "eight-bit weights": (lambda m: swap(m, Packed((4, 4), torch.int8)), {}, "holds torch.int8 weights"),
    "eight-bit floats": (lambda m: swap(m, Packed((4, 4), torch.float8_e4m3fn)), {}, "holds torch.float8_e4m3fn"),
    "packed floats": (
        lambda m: swap(m, Packed((16,), torch.float32)),
        {},
        r"of shape \(16,\) as a Tensor, as quantized",
    ),
    "a tensor of a quantization library": (
        lambda m: setattr(m.model.layers[1].mlp.up_proj, "weight", nn.Parameter(torch.ones(4, 4).as_subclass(Tile))),
        {},
        r"layers\.1\.mlp\.up_proj is a Linear of .* as a Tile, as quantized layers do; load the model",
    ),
    "no values": (
        lambda m: swap(m, nn.Linear(32, 48, device="meta")),
        {},
        r"up_proj is on the meta device and has no values; load the weights before attach",
    ),
    "values that are not finite": (
        lambda m: m.model.layers[1].mlp.up_proj.weight.data.fill_(torch.nan),
        {},
        r"layers\.1\.mlp\.up_proj: the weight holds NaN or infinity",
    ),
    "a basis of a smaller model": (
        lambda m: None,
        {"projection": lambda: Basis(torch.zeros(1, 1, 2, 2), ("model.layers.0.self_attn.q_proj",))},
        "the basis has no directions for module model.layers.0.self_attn.k_proj",
    ),
    "a basis of a larger model": (
        lambda m: None,
        {
            "projection": lambda: Basis(
                torch.zeros(1, 2, 2, 2), ("model.layers.0.self_attn.q_proj", "model.layers.9.self_attn.q_proj")
            ),
            "target_modules": ["layers.0.self_attn.q_proj"],
        },
        "the basis is of a model that has a module model.layers.9.self_attn.q_proj",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_adapter_leaves_the_model_untouched(model, name):
    prepare, settings, message = REFUSED[name]
    prepare(model)
    settings = {key: value() if callable(value) else value for key, value in settings.items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message) as error:
        attach(model, TinyLoraConfig(**settings))
    assert "\n" not in str(error.value)
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert not any(module._forward_hooks for module in model.modules())
    assert adapter_of(model) is None


def test_a_model_without_any_module_to_adapt():
    with pytest.raises(ValueError, match=r"no linear layer named q_proj, .* in ReLU; it has no torch\.nn\.Linear"):
        attach(nn.ReLU())


def test_a_copy_of_the_model_carries_a_copy_of_the_adapter(model):
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    adapter = attach(model)
    set_vectors(adapter)
    adapted = model(TOKENS).logits
    twin = copy.deepcopy(model)
    with torch.no_grad():
        adapter.vectors.zero_()
    assert torch.equal(twin(TOKENS).logits, adapted)
    carried = adapter_of(twin)
    assert carried is not adapter
    with pytest.raises(ValueError, match="carries an adapter already"):
        attach(twin)
    carried.detach()
    assert flags == {name: p.requires_grad for name, p in twin.named_parameters()}
    assert not any(p.requires_grad for p in model.parameters())
    assert adapter_of(model) is adapter
    assert torch.equal(twin(TOKENS).logits, model(TOKENS).logits)


def test_a_copy_of_adapter_and_model_copies_both_in_any_order(model):
    adapter = attach(model)
    set_vectors(adapter)
    for pair in ((adapter, model), (model, adapter)):
        found = {type(part): part for part in copy.deepcopy(pair)}
        twin, copied = found[type(adapter)], found[type(model)]
        assert copied is not model
        assert adapter_of(copied) is twin
        assert torch.equal(copied(TOKENS).logits, model(TOKENS).logits)


def test_a_copy_of_the_adapter_alone_is_attached_to_nothing(model):
    adapter = attach(model)
    set_vectors(adapter)
    adapted, delta = model(TOKENS).logits, adapter.delta(adapter.names[0])
    twin = copy.deepcopy(adapter)
    # It still knows its base, so that it can be saved; copying 13 numbers must not copy the base.
    assert twin._model() is model
    with torch.no_grad():
        twin.vectors.zero_()
    twin.detach()
    assert torch.equal(model(TOKENS).logits, adapted)
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(adapter.delta(adapter.names[0]), delta)
    assert not twin.delta(adapter.names[0]).any()


def test_pickling_takes_the_adapter_along(model):
    adapter = attach(model)
    set_vectors(adapter)
    adapted = model(TOKENS).logits
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(TOKENS).logits, adapted)
        adapter_of(twin).detach()
        assert adapter_of(twin) is None
        assert all(p.requires_grad for p in twin.parameters())
    adapter.detach()
    alone = pickle.loads(pickle.dumps(adapter))
    assert torch.equal(alone.vectors, adapter.vectors)


def test_a_dropped_adapter_goes_on_and_can_be_found(model):
    base = model(TOKENS).logits
    set_vectors(attach(model))
    gc.collect()
    assert not torch.equal(model(TOKENS).logits, base)
    adapter_of(model).detach()
    assert torch.equal(model(TOKENS).logits, base)


@pytest.mark.parametrize("dropped", [True, False])
def test_no_model_is_kept_alive(make_model, dropped):
    model = make_model()
    adapter = attach(model)
    model(TOKENS).logits.sum().backward()
    alive, weight = weakref.ref(model), weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    if dropped:
        alive_adapter = weakref.ref(adapter)
        del adapter
    del model
    gc.collect()
    assert alive() is None
    assert weight() is None
    if dropped:
        assert alive_adapter() is None
    else:
        adapter.detach()
        assert adapter.delta(adapter.names[0]).shape == (32, 32)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert pickle.loads(pickle.dumps(adapter)).names == adapter.names


def test_repr_says_what_it_is(model):
    text = repr(attach(model, TinyLoraConfig(u=2, n_tie=7)))
    assert "4 numbers on 14 modules (" in text
    assert "projection=random" in text


def test_repr_tells_adapters_apart(model):
    def words(**settings) -> str:
        adapter = attach(model, TinyLoraConfig(**settings))
        adapter.detach()
        return adapter.extra_repr()

    def basis(first: float) -> Basis:
        return Basis(torch.full((1, len(names), 2, 2), first), names)

    names = tuple(target.name for target in find_target_modules(model))
    settings = [{}, {"seed": 1}, {"target_modules": ["q_proj"]}, {"target_modules": ["k_proj"]}]
    settings += [{"projection": basis(1.0)}, {"projection": basis(2.0)}]
    assert words() == words()
    assert len({words(**each) for each in settings}) == len(settings)


def test_the_order_of_names_and_groups(model):
    adapter = attach(model, TinyLoraConfig(n_tie=5))
    parts = ["self_attn"] * 4 + ["mlp"] * 3
    block = [f"{part}.{kind}" for part, kind in zip(parts, MODULE_TYPES, strict=True)]
    assert adapter.names == tuple(f"model.layers.{layer}.{name}" for layer in range(2) for name in block)
    assert adapter.groups == (0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2)
    assert adapter.num_parameters == 3


class Squashed(nn.Linear):
    """A layer whose backward pass needs what it puts out."""

    def forward(self, x):
        return torch.sigmoid(super().forward(x))


class Echo(nn.Linear):
    """A layer that gives back what it was given."""

    def forward(self, x):
        return x


@pytest.mark.parametrize("kind", [Squashed, Echo])
def test_an_output_that_somebody_still_needs_is_not_changed(kind):
    model = nn.Sequential(OrderedDict(q_proj=kind(6, 6)))
    adapter = attach(model, TinyLoraConfig(rank=2, u=2))
    torch.nn.init.normal_(adapter.vectors)
    x = torch.randn(3, 6, requires_grad=True, generator=torch.Generator().manual_seed(0))
    given = x.detach().clone()
    y = model(x)
    with adapter.disabled():
        plain = model(x)
    torch.testing.assert_close(y, plain + F.linear(x, adapter.delta("q_proj")))
    y.sum().backward()
    assert torch.equal(x.detach(), given)


def test_a_hook_that_came_first_keeps_what_it_saw():
    model, seen = nn.Sequential(OrderedDict(q_proj=nn.Linear(6, 6))), []
    model.q_proj.register_forward_hook(lambda module, args, output: seen.append((output, output.detach().clone())))
    adapter = attach(model, TinyLoraConfig(rank=2, u=2))
    torch.nn.init.normal_(adapter.vectors)
    y = model(torch.ones(3, 6))
    ((kept, copy_of_it),) = seen
    assert torch.equal(kept, copy_of_it)
    assert not torch.allclose(y, kept)
