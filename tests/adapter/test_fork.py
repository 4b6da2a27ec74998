"""The adapter of the first author's fork: scale, P shared by side, v's start.

The formulas are those of the fork's options (github.com/jxmorris12/verl-lora at c5b65fc2), written out here in float64.
"""

import dataclasses

import pytest
import torch

import tinylora_lite as tl
from tinylora_lite.adapter.attached import rows_of
from tinylora_lite.adapter.layer import random_projection

FORK = tl.TinyLoraConfig(rank=2, u=3, n_tie=4, sigma="right", projection="shared", scale=16.0, init_std=1e-2)


def test_the_update_is_the_scaled_one_with_the_shared_projection(model):
    """k and v have fewer outputs than the rest, so there are two P, each with entries N(0, 1/u)."""
    weights = {name: weight.double() for name, weight in model.named_parameters()}
    adapter = tl.attach(model, FORK)
    shared = {}
    for place, (name, group) in enumerate(zip(adapter.names, adapter.groups, strict=True)):
        weight = weights[f"{name}.weight"]
        U, S, Vh = tl.truncated_svd(weight.float(), 2)
        first = shared.setdefault(min(weight.shape), place)
        P = random_projection(0, first, 3, 2).double() * (2 / 3) ** 0.5
        R = torch.einsum("u,ujk->jk", adapter.vectors[group].double(), P)
        expected = 16 * U.double() @ R @ (S.double()[:, None] * Vh.double())
        torch.testing.assert_close(adapter.delta(name).double(), expected, rtol=1e-5, atol=1e-7)
    assert len(shared) == 2


def test_shared_entries_have_variance_one_over_u(model):
    adapter = tl.attach(model, tl.TinyLoraConfig(rank=16, u=8, projection="shared"))
    entries = adapter.factors(adapter.names[0]).projection
    assert entries.std() == pytest.approx(8**-0.5, rel=0.05)


def test_v_starts_small_random_and_the_same(model):
    config = tl.TinyLoraConfig(rank=1, u=500, init_std=1e-5)
    adapter = tl.attach(model, config)
    first = adapter.vectors.detach().clone()
    assert first.std() == pytest.approx(1e-5, rel=0.05)
    assert first.mean().abs() < 1e-6
    adapter.detach()
    adapter = tl.attach(model, config)
    assert torch.equal(adapter.vectors, first)
    adapter.detach()
    assert not torch.equal(tl.attach(model, dataclasses.replace(config, seed=1)).vectors, first)


def test_files_and_exports_keep_it(model, make_model, tmp_path):
    ids = torch.arange(12).view(2, 6)
    adapter = tl.attach(model, FORK)
    torch.nn.init.normal_(adapter.vectors, std=0.02)
    expected = model(ids).logits
    assert not torch.allclose(expected, make_model()(ids).logits, atol=1e-3), "the update is no small thing"
    path = tl.save(adapter, tmp_path / "fork.tinylora", dtype="fp32")
    twin = make_model()
    assert tl.load(twin, path).config == FORK
    torch.testing.assert_close(twin(ids).logits, expected, rtol=0, atol=1e-5)
    exported = make_model()
    imported = tl.import_peft(exported, tl.export_peft(adapter, tmp_path / "peft"))
    torch.testing.assert_close(exported(ids).logits, expected, rtol=0, atol=1e-4)
    assert imported.names == adapter.names
    dense = make_model()
    for name, weight in tl.merged_weights(adapter):
        dense.get_parameter(name).data.copy_(weight)
    torch.testing.assert_close(dense(ids).logits, expected, rtol=0, atol=1e-4)


def test_a_population_has_it_too(model):
    ids = torch.arange(12).view(2, 6)
    configs = [FORK, dataclasses.replace(FORK, seed=5, projection="random", init_std=0.03)]
    alone = []
    for config in configs:
        adapter = tl.attach(model, config)
        alone.append(model(ids).logits)
        adapter.detach()
    tl.attach_population(model, configs)
    for k, expected in enumerate(alone):
        with rows_of(torch.tensor([k, k])):
            torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="share scale"):
        tl.attach_population(model, [FORK, dataclasses.replace(FORK, scale=1.0)])
