"""PEFT's TinyLoRA computes the same, given the same P and tying: an independent implementation of the layer."""

import copy

import pytest
import torch

from tinylora_lite import Basis, TinyLoraConfig, attach
from tinylora_lite.adapter.tying import MODULE_TYPES

peft = pytest.importorskip("peft", minversion="0.20")


def _vector(layer):
    """PEFT 0.20 keeps the parameter itself, later versions its key."""
    if hasattr(layer, "_tinylora_v_ref"):
        return layer._tinylora_v_ref["default"]
    return layer.tinylora_v["default"][layer._tinylora_v_key["default"]]


@pytest.mark.parametrize(("weight_tying", "n_tie"), [(0.0, 1), (0.5, 2), (1.0, "all")])
def test_outputs_and_gradients_agree_with_peft(model, weight_tying, n_tie):
    config = peft.TinyLoraConfig(r=2, u=3, weight_tying=weight_tying, target_modules=list(MODULE_TYPES))
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in theirs.named_modules()
        if hasattr(layer, "tinylora_P")
    }
    directions = torch.stack([layer.tinylora_P["default"] for layer in layers.values()], dim=1)
    basis = Basis(directions.float().contiguous(), tuple(layers), sigma="split")
    adapter = attach(model, TinyLoraConfig(u=3, n_tie=n_tie, sigma="split", projection=basis))
    with torch.no_grad():
        adapter.vectors.copy_(0.3 * torch.randn(adapter.vectors.shape, generator=torch.Generator().manual_seed(0)))
        seen = set()
        for name, group in zip(adapter.names, adapter.groups, strict=True):
            layer = layers[name]
            # The factors agree to float32's SVD and to the signs, which PEFT leaves to LAPACK; from here on, exactly.
            A, B, factors = layer.tinylora_A["default"], layer.tinylora_B["default"], adapter.factors(name)
            signs = (B * factors.left).sum(dim=0).sign()
            torch.testing.assert_close(B * signs, factors.left, rtol=0, atol=1e-4)
            torch.testing.assert_close(A * signs[:, None], factors.right, rtol=0, atol=1e-4)
            A.copy_(factors.right)
            B.copy_(factors.left)
            vector = _vector(layer)
            vector.copy_(adapter.vectors[group])
            seen.add((group, id(vector)))
    assert len(seen) == len(adapter.vectors)

    tokens = torch.arange(2, 18).reshape(2, 8)
    ours, wanted = model(tokens).logits, theirs(tokens).logits
    with adapter.disabled():
        assert (ours - model(tokens).logits).norm() > 0.05 * ours.norm()
    assert (ours - wanted).norm() < 2e-6 * wanted.norm()
    ours.square().sum().backward()
    wanted.square().sum().backward()
    for name, group in zip(adapter.names, adapter.groups, strict=True):
        gradient = _vector(layers[name]).grad
        assert (adapter.vectors.grad[group] - gradient).norm() < 1e-5 * gradient.norm()
