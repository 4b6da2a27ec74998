"""Pretraining: it learns, an interrupted run ends in the same weights, and what it leaves is a plain checkpoint."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tinylora_lite.nano import BASE, CHECKPOINTS, pretrain
from tinylora_lite.nano.pretrain import PretrainSettings
from tinylora_lite.nano.tokenizer import ASSISTANT, build_tokenizer

TINY = PretrainSettings(
    width=16, layers=1, heads=2, kv_heads=1, mlp=16, steps=40, batch=8, warmup=5, learning_rate=0.02
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in every test: sums depend on it in their last digit
    yield folder, pretrain.pretrain(TINY, folder, progress=False)
    torch.set_num_threads(threads)


def test_the_loss_falls(base, monkeypatch, tmp_path):
    monkeypatch.setattr(pretrain, "LOG_EVERY", 10)
    pretrain.pretrain(TINY, tmp_path, progress=False)
    rows = [json.loads(line) for line in (tmp_path / "pretrain.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5


def test_an_interrupted_run_ends_in_the_same_weights(base, monkeypatch, tmp_path):
    _folder, model = base
    rates = pretrain.learning_rate

    def fail_at_27(settings, step):
        if step == 27:
            raise KeyboardInterrupt
        return rates(settings, step)

    monkeypatch.setattr(pretrain, "learning_rate", fail_at_27)
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(TINY, tmp_path, checkpoint_every=10, progress=False)
    monkeypatch.setattr(pretrain, "learning_rate", rates)
    resumed = pretrain.pretrain(TINY, tmp_path, checkpoint_every=10, progress=False)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    assert not (tmp_path / "resume.pt").exists()


def test_what_is_left_is_a_plain_checkpoint_that_is_not_trained_twice(base):
    folder, model = base
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(10)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    again = pretrain.pretrain(TINY, folder, progress=False)
    assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="other settings"):
        pretrain.pretrain(replace(TINY, seed=1), folder, progress=False)


def test_only_answers_are_learned_and_batches_depend_on_the_seed_alone():
    tokenizer = build_tokenizer()
    assistant = tokenizer.convert_tokens_to_ids(ASSISTANT)
    first = list(pretrain.pool_of_batches(TINY, tokenizer, 3))
    again = list(pretrain.pool_of_batches(TINY, tokenizer, 3))
    assert len(first) == pretrain.POOL
    for (ids, labels), (same, _) in zip(first, again, strict=True):
        assert torch.equal(ids, same)
        for row, wanted in zip(ids, labels, strict=True):
            start = row.tolist().index(assistant) + 1
            end = int((row != tokenizer.pad_token_id).sum())
            assert (wanted[:start] == -100).all()
            assert (wanted[end:] == -100).all()
            assert torch.equal(wanted[start:end], row[start:end])
            assert wanted[end - 1] == tokenizer.eos_token_id


def test_the_shipped_base_is_the_default_recipe():
    recipe = json.loads((CHECKPOINTS / BASE / "recipe.json").read_text())
    assert PretrainSettings(**recipe) == PretrainSettings()
    rows = [json.loads(line) for line in (CHECKPOINTS / BASE / "pretrain.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == recipe["steps"]
    assert rows[-1]["seconds"] < 3600
