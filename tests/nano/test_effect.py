"""The effect itself, on the shipped base: thirteen calibrated numbers learn, and the base is what it is said to be."""

import pytest

import tinylora_lite as tl
from tinylora_lite import nano


@pytest.fixture
def base():
    return nano.load()


def test_the_base_can_and_mostly_does_not(base):
    score = tl.evaluate(*base, nano.task(), problems=150, samples=8, max_new_tokens=nano.MAX_NEW_TOKENS)
    assert 0.25 < score.accuracy < 0.65
    assert score.pass_at(8) > 0.80


def test_thirteen_calibrated_numbers_learn_in_ten_steps(base):
    model, tokenizer = base
    config = tl.TinyLoraConfig(rank=8, u=13, n_tie="all", projection=nano.basis())
    adapter = tl.attach(model, config)
    assert adapter.num_parameters == 13
    settings = tl.GRPOSettings(
        steps=10, learning_rate=0.2, schedule="linear", prompts_per_step=24, max_new_tokens=nano.MAX_NEW_TOKENS
    )
    run = tl.train_grpo(model, tokenizer, adapter, nano.task(), settings, progress=False)
    score = tl.evaluate(model, tokenizer, nano.task(), problems=200, max_new_tokens=nano.MAX_NEW_TOKENS)
    assert run.curve()[0] < 0.5
    assert score.low > 0.6, score


def test_the_paper_s_recipe_makes_thirteen_numbers_here_too(base):
    model, _ = base
    assert tl.plan(model, budget=13) == tl.TinyLoraConfig(rank=2, u=1, n_tie=4)
    assert tl.attach(model, tl.TinyLoraConfig(rank=2, u=1, n_tie=4)).num_parameters == 13


def test_other_names_are_refused():
    with pytest.raises(FileNotFoundError, match=nano.BASE):
        nano.load("qwen2-7b")
