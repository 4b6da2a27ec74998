"""Merged weights are the adapted model's, the base stays as it is, and the report counts what rounding takes."""

import copy
import gc

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tinylora_lite import TinyLoraConfig, attach, lora_xs, merge_report, merged_weights
from tinylora_lite.adapter.layer import Factors

TOKENS = torch.arange(2, 26).reshape(2, 12)
QUERY = "model.layers.0.self_attn.q_proj"


# An adapter does not keep its model alive, so every test holds on to the model that it adapts.
def adapted(model, scale=0.3, config=None):
    adapter = attach(model, config or TinyLoraConfig(rank=2, u=3, n_tie=4))
    with torch.no_grad():
        adapter.vectors.copy_(scale * torch.randn(adapter.vectors.shape, generator=torch.Generator().manual_seed(7)))
    return adapter


def all_merged(adapter, dtype=None):
    return dict(merged_weights(adapter, dtype))


def state_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def single(weight, delta_column, dtype=torch.float32):
    """A model of one linear layer, and an adapter whose update is exactly ``delta_column`` in every column."""
    rows, columns = weight.shape
    model = nn.Sequential(nn.Linear(columns, rows, bias=False).to(dtype))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    given = Factors(torch.tensor(delta_column)[:, None], torch.ones(1, columns), torch.ones(1, 1, 1))
    adapter = attach(model, TinyLoraConfig(rank=1, target_modules=["0"]), factors={"0": given})
    with torch.no_grad():
        adapter.vectors.fill_(1.0)
    return model, adapter


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_a_plain_model_with_the_merged_weights_is_the_adapted_one(make_model, architecture):
    model, plain = make_model(architecture), make_model(architecture)
    base = plain(TOKENS).logits
    adapter = adapted(model)
    left_out = plain.load_state_dict(dict(merged_weights(adapter)), strict=False)
    assert left_out.unexpected_keys == []
    with torch.no_grad():
        ours, merged = model(TOKENS).logits, plain(TOKENS).logits
    assert (ours - base).norm() > 0.03 * ours.norm()
    assert (ours - merged).norm() < 2e-6 * ours.norm()


def test_only_adapted_weights_come_one_by_one_and_new(model):
    adapter = adapted(model, config=TinyLoraConfig(u=2, target_modules=["v_proj", "model.layers.1.mlp.up_proj"]))
    before, pointers = state_of(model), {p.data_ptr() for p in model.parameters()}
    names = []
    for name, weight in merged_weights(adapter):
        names.append(name)
        assert weight.shape == before[name].shape
        assert weight.dtype == torch.float32
        assert not weight.requires_grad
        assert weight.data_ptr() not in pointers
        assert not torch.equal(weight, before[name])
        weight.zero_()
    assert names == [f"{name}.weight" for name in adapter.names]
    assert len(names) == 3
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_repeated_merging_does_not_drift(make_model):
    model = make_model().bfloat16()
    adapter = adapted(model)
    first = dict(merged_weights(adapter))
    for _ in range(3):
        for name, weight in merged_weights(adapter):
            assert torch.equal(weight, first[name])
    adapter.detach()
    with adapter.disabled():
        assert all(torch.equal(weight, first[name]) for name, weight in merged_weights(adapter))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_sum_is_rounded_once(make_model, dtype):
    model = make_model().to(dtype)
    adapter = adapted(model, scale=0.01)
    rounded_twice = 0
    for name, merged in merged_weights(adapter):
        weight, delta = model.get_parameter(name).detach(), adapter.delta(name.removesuffix(".weight"))
        assert merged.dtype == dtype
        exact = weight.double() + delta.double()
        # No number of the dtype is nearer to the exact sum, but for what float32 rounds off before.
        nearest = (exact - exact.to(dtype).double()).abs()
        assert ((exact - merged.double()).abs() <= nearest + 1e-7 * exact.abs()).all()
        if dtype == torch.float64:
            assert torch.equal(merged, exact)
        rounded_twice += (merged != weight + delta.to(dtype)).sum()
    assert rounded_twice > 0 or dtype in (torch.float32, torch.float64)


def test_another_dtype_than_the_base_s(make_model):
    model = make_model()
    adapter = adapted(model)
    wide = dict(merged_weights(adapter))
    for name, weight in merged_weights(adapter, dtype=torch.bfloat16):
        assert torch.equal(weight, wide[name].bfloat16())


def test_a_checkpoint_that_needs_no_adapter(make_model, tmp_path):
    model = make_model()
    adapter = adapted(model, config=lora_xs(rank=2))
    before = state_of(model)
    model.save_pretrained(tmp_path, state_dict=model.state_dict() | dict(merged_weights(adapter)))
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        ours = model(TOKENS).logits
        assert (ours - loaded(TOKENS).logits).norm() < 2e-6 * ours.norm()


def test_a_quantized_base_merges_into_plain_weights(make_model):
    ao = pytest.importorskip("torchao.quantization")
    model, plain = make_model(), make_model()
    ao.quantize_(model, ao.Int8WeightOnlyConfig(), filter_fn=lambda _, name: name.endswith("_proj"))
    adapter = adapted(model)
    weights = dict(merged_weights(adapter))
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert {name for name in plain.state_dict() if name.endswith("_proj.weight")} == weights.keys()
    plain.load_state_dict(weights, strict=False)
    with torch.no_grad():
        ours, base = model(TOKENS).logits, make_model()(TOKENS).logits
        assert (ours - plain(TOKENS).logits).norm() < 1e-5 * ours.norm()
        assert (ours - base).norm() > 0.03 * ours.norm()
    assert merge_report(adapter).total.kept > 0


def test_a_shared_weight_is_refused(make_model):
    tied = make_model(tie_word_embeddings=True)
    adapter = adapted(tied, config=TinyLoraConfig(target_modules=["lm_head", "q_proj"]))
    for merge in (all_merged, merge_report):
        with pytest.raises(ValueError, match=r"^lm_head shares its weight with model\.embed_tokens, .* export a LoRA"):
            merge(adapter)
    untied = make_model(tie_word_embeddings=False)
    adapter = adapted(untied, config=TinyLoraConfig(target_modules=["lm_head", "q_proj"]))
    assert "lm_head.weight" in dict(merged_weights(adapter))


def test_what_cannot_be_merged_is_refused_before_the_first_weight(make_model):
    model = make_model(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="dtype must be one of"):
        merged_weights(adapted(model, config=TinyLoraConfig(target_modules=["q_proj"])), torch.int8)
    adapter = adapted(make_model(tie_word_embeddings=True), config=TinyLoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"shares its weight|no longer exists"):
        merged_weights(adapter)


def test_what_cannot_be_merged_is_refused(make_model):
    model = make_model()
    adapter = adapted(model, scale=1e6)
    with pytest.raises(ValueError, match=rf"^{QUERY}: .* not finite in torch\.float16; merge in float32"):
        dict(merged_weights(adapter, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        merge_report(adapter, dtype=torch.float16)
    with torch.no_grad():
        adapter.vectors[0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity; train it again"):
        dict(merged_weights(adapter))
    for merge in (all_merged, merge_report):
        with pytest.raises(ValueError, match=r"dtype must be one of .*, not torch.int8"):
            merge(adapter, dtype=torch.int8)
    del model
    gc.collect()
    for merge in (all_merged, merge_report):
        with pytest.raises(ValueError, match="model no longer exists"):
            merge(adapter)


def test_a_report_by_hand():
    # One step of bfloat16 is 1/128 above 1: of the rows' updates the first is lost and the second becomes 1/128.
    model, adapter = single(torch.ones(2, 3), [0.003, 0.01])
    report = merge_report(adapter)
    effect = report.modules["0"]
    assert report.total == effect
    assert report.dtype == torch.bfloat16
    assert effect.changed == 0.5
    assert effect.kept == pytest.approx(0.01 / 128 / (0.003**2 + 0.01**2), rel=1e-6)
    assert effect.cosine == pytest.approx(0.01 / (0.003**2 + 0.01**2) ** 0.5, rel=1e-6)
    assert effect.size == pytest.approx(((0.003**2 + 0.01**2) / 2) ** 0.5, rel=1e-6)
    assert torch.equal(model[0].weight, torch.ones(2, 3))


def test_an_update_that_is_lost_and_one_that_is_zero():
    _kept, lost = single(torch.ones(2, 3), [0.003, -0.0019])
    effect = merge_report(lost).total
    assert (effect.changed, effect.kept, effect.cosine) == (0.0, 0.0, 0.0)
    assert effect.size > 0
    _kept, zero = single(torch.ones(2, 3), [0.0, 0.0])
    effect = merge_report(zero).total
    assert (effect.changed, effect.kept, effect.cosine, effect.size) == (0.0, 1.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("base_dtype", "dtype"),
    [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
)
def test_the_report_measures_the_merged_weights(make_model, base_dtype, dtype):
    model = make_model().to(base_dtype)
    adapter = adapted(model, scale=0.003)
    report = merge_report(adapter, dtype=dtype)
    assert list(report.modules) == list(adapter.names)
    rows = {}
    for name, merged in merged_weights(adapter, dtype=dtype):
        base = model.get_parameter(name).detach()
        wanted = adapter.delta(name.removesuffix(".weight")).double().numpy().ravel()
        realised = merged.double().numpy().ravel() - base.to(dtype).double().numpy().ravel()
        rows[name.removesuffix(".weight")] = (realised, wanted, base.double().numpy().ravel())
    rows["total"] = tuple(np.concatenate(parts) for parts in zip(*rows.values(), strict=True))
    for name, (realised, wanted, base) in rows.items():
        effect = report.total if name == "total" else report.modules[name]
        assert effect.changed == pytest.approx((realised != 0).mean())
        assert effect.kept == pytest.approx(realised @ wanted / (wanted @ wanted))
        norms = np.linalg.norm(realised) * np.linalg.norm(wanted)
        assert effect.cosine == pytest.approx(realised @ wanted / norms if norms else 0.0)
        assert effect.size == pytest.approx(np.linalg.norm(wanted) / np.linalg.norm(base))
    if dtype == torch.float32:
        assert report.total.kept == pytest.approx(1, abs=1e-4)
    elif base_dtype == torch.bfloat16:
        assert 0.05 < report.total.kept < 0.95


def test_on_the_grid_small_updates_vanish_and_off_it_they_blur():
    noise = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    column = (1e-4 * torch.randn(64, generator=torch.Generator().manual_seed(1))).tolist()
    _kept, on_grid = single(noise.bfloat16(), column, dtype=torch.bfloat16)
    _kept2, off_grid = single(noise, column)
    on, off = merge_report(on_grid).total, merge_report(off_grid).total
    assert on.kept < 0.3
    assert on.cosine < 0.3
    # Rounded up as often as its size asks for, an update is kept on average and drowned in noise.
    assert off.kept == pytest.approx(1, abs=0.25)
    assert off.cosine < 0.3
    assert 0 < off.changed < 0.3


def test_the_larger_the_update_the_more_a_bf16_merge_keeps(make_model):
    model = make_model().bfloat16()
    reports = []
    for scale in (1e-4, 1e-3, 1e-2, 1e-1):
        adapter = adapted(model, scale)
        reports.append(merge_report(adapter).total)
        adapter.detach()
    for values in ([getattr(r, name) for r in reports] for name in ("changed", "kept", "cosine", "size")):
        assert values == sorted(values)
    assert reports[0].kept < 0.2
    assert reports[-1].kept > 0.99
    assert reports[-1].cosine > 0.99


class Largest(TorchDispatchMode):
    """The most entries of a tensor that an operation made in memory of its own, those of ``known`` memory aside."""

    def __init__(self, known):
        super().__init__()
        self.known, self.entries = {tensor.data_ptr() for tensor in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (list, tuple)) else [found]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.entries = max(self.entries, tensor.numel())
        return found


def test_the_report_makes_no_copy_of_a_whole_weight(model, monkeypatch):
    adapter = adapted(model)
    expected = merge_report(adapter)
    deltas = {name: adapter.delta(name) for name in adapter.names}
    monkeypatch.setattr(type(adapter), "delta", lambda _, name: deltas[name])
    monkeypatch.setattr("tinylora_lite.files.merge.ENTRIES_AT_ONCE", 100)
    with Largest([*deltas.values(), *model.parameters()]) as largest:
        report = merge_report(adapter)
    assert 48 <= largest.entries <= 100
    for name in ("changed", "kept", "cosine", "size"):
        assert getattr(report.total, name) == pytest.approx(getattr(expected.total, name))


def test_the_report_leaves_the_base_alone(make_model):
    model = make_model()
    adapter = adapted(model)
    before, twin = state_of(model), copy.deepcopy(adapter.vectors)
    merge_report(adapter)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert torch.equal(adapter.vectors, twin)
