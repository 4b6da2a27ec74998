"""The LoRA baseline: PEFT's own layers, the library's own steps, and nothing else moves."""

import pytest
import torch

import tinylora_lite as tl
from tinylora_lite.training.lora_baseline import ALPHA, train_lora

peft = pytest.importorskip("peft")

SETTINGS = {"steps": 3, "prompts_per_step": 4, "max_new_tokens": 4, "learning_rate": 0.01, "truncated": "score"}


def test_only_lora_s_two_matrices_train_and_w_becomes_w_plus_ba(make_model, tokenizer, numbers):
    model, base = make_model(), make_model()
    run = train_lora(model, tokenizer, numbers, tl.GRPOSettings(**SETTINGS), rank=2)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert run.parameters == sum(p.numel() for p in trained.values()) == tl.count_parameters(base, "lora", rank=2)
    frozen = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if name not in trained}
    assert frozen.keys() == dict(base.named_parameters()).keys()
    assert all(torch.equal(frozen[name], p) for name, p in base.named_parameters())
    # An independent sum: W + (alpha / r) B A, written into an untouched model, computes the same.
    with torch.no_grad():
        for name, module in base.named_modules():
            if f"{name}.lora_A.default.weight" in trained:
                A, B = (trained[f"{name}.lora_{letter}.default.weight"] for letter in "AB")
                assert B.any()
                module.weight += ALPHA / 2 * B @ A
        tokens = torch.arange(2, 18).reshape(2, 8)
        torch.testing.assert_close(model(tokens).logits, base(tokens).logits, rtol=1e-4, atol=1e-4)


def test_it_starts_from_the_same_answers_as_every_other_adapter_and_repeats(make_model, tokenizer, numbers):
    settings = tl.GRPOSettings(**SETTINGS)
    runs = [train_lora(make_model(), tokenizer, numbers, settings) for _ in range(2)]
    assert runs[0].curve("gradient_norm") == runs[1].curve("gradient_norm")
    model = make_model()
    adapter = tl.attach(model, tl.lora_xs(2))
    other = tl.train_grpo(model, tokenizer, adapter, numbers, settings)
    assert runs[0].curve()[0] == other.curve()[0]
    assert runs[0].base == other.base
    assert runs[0].curve()[1:] != other.curve()[1:]


def test_it_learns(model, tokenizer, numbers):
    settings = tl.GRPOSettings(**SETTINGS | {"steps": 20, "prompts_per_step": 8})
    run = train_lora(model, tokenizer, numbers, settings, rank=1)
    assert run.curve()[0] < 0.7
    assert sum(run.curve()[-5:]) / 5 > 0.8


def test_it_is_evaluated_and_held_near_the_base_like_any_other(make_model, tokenizer, numbers):
    found = {}
    for kl in (0.0, 100.0):
        settings = tl.GRPOSettings(**SETTINGS | {"kl": kl, "epochs_per_step": 2, "evaluate_every": 2, "steps": 2})
        run = train_lora(make_model(), tokenizer, numbers, settings)
        assert [row["step"] for row in run.evaluations] == [2]
        found[kl] = run.curve("gradient_norm")[0]
    assert found[100.0] != found[0.0]
