"""The controls without training: what the first token may be, and that nothing else is touched."""

import pytest
import torch

from benchmarks import untrained as measured
from benchmarks.untrained import FirstTokenSampler
from tinylora_lite import nano
from tinylora_lite.evaluation.evaluate import evaluate
from tinylora_lite.lab import untrained
from tinylora_lite.lab.untrained import chance_of, number_tokens
from tinylora_lite.sampling.logprobs import completion_logprobs
from tinylora_lite.sampling.rollouts import encode_prompts
from tinylora_lite.sampling.sampler import sample

BASE = "qwen2-0.4m"


@pytest.fixture(scope="module")
def world():
    model, tokenizer = nano.load(BASE)
    return model, tokenizer, encode_prompts(tokenizer, nano.task(), nano.task().test[:32])


def test_the_numbers_are_all_tokens_of_digits(world):
    _, tokenizer, _ = world
    texts = [tokenizer.decode([number]).strip() for number in number_tokens(tokenizer).tolist()]
    assert sorted(map(int, texts)) == list(range(100))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_answer_begins_with_an_allowed_token(world, temperature):
    model, tokenizer, prompts = world
    numbers = number_tokens(tokenizer)
    free = sample(model, tokenizer, *prompts, max_new_tokens=48, temperature=temperature, seed=3)
    held = FirstTokenSampler(model, tokenizer, numbers).sample(
        *prompts, max_new_tokens=48, temperature=temperature, seed=3
    )
    assert not torch.isin(free.completion_ids[:, 0], numbers).all()
    assert torch.isin(held.completion_ids[:, 0], numbers).all()
    assert all(text[0].isdigit() for text in held.texts)
    assert torch.equal(held.prompt_ids, prompts[0])
    assert held.completion_ids.shape == held.completion_mask.shape == held.logprobs.shape == held.entropies.shape
    assert held.completion_ids.shape[1] <= 48


def test_later_tokens_are_the_model_s_own(world):
    model, tokenizer, prompts = world
    held = FirstTokenSampler(model, tokenizer, number_tokens(tokenizer)).sample(*prompts, max_new_tokens=48, seed=3)
    with torch.no_grad():
        expected = completion_logprobs(model, held) * held.completion_mask
    torch.testing.assert_close(held.logprobs[:, 1:], expected[:, 1:], atol=1e-4, rtol=1e-4)
    # The first token is likelier than in the model, by the probability of all allowed ones.
    assert (held.logprobs[:, 0] > expected[:, 0]).all()


def test_all_tokens_allowed_changes_nothing_that_is_greedy(world):
    model, tokenizer, prompts = world
    everything = FirstTokenSampler(model, tokenizer, torch.arange(len(tokenizer)))
    free = sample(model, tokenizer, *prompts, max_new_tokens=48, temperature=0)
    assert everything.sample(*prompts, max_new_tokens=48, temperature=0).texts == free.texts


def test_the_chance_of_a_number(world):
    model, tokenizer, _ = world
    task = nano.task()
    assert chance_of(model, tokenizer, task, torch.arange(len(tokenizer)), problems=8) == pytest.approx(1)
    numbers = number_tokens(tokenizer)
    answers = evaluate(model, tokenizer, task, problems=200, samples=4, max_new_tokens=2).completions
    begun = sum(answer.text[:1].isdigit() for answer in answers) / len(answers)
    assert chance_of(model, tokenizer, task, numbers, problems=200) == pytest.approx(begun, abs=0.06)


def test_a_record_is_measured_and_read(tmp_path, monkeypatch, capsys):
    measure = measured.measure
    monkeypatch.setattr(measured, "measure", lambda base: measure(base, problems=8))
    monkeypatch.setattr("sys.argv", ["untrained", BASE, "--folder", str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="controls"):
        untrained.recorded(BASE, tmp_path)
    measured.main()
    found = untrained.recorded(BASE, tmp_path)
    assert found["header"]["best"] == max(found["header"]["validation"], key=found["header"]["validation"].get)
    for control in ("first_token", "header"):
        assert found[control]["sampled"]["samples"] == measured.SAMPLES
        assert found[control]["greedy"]["n"] == 8


@pytest.mark.parametrize("base", [BASE, nano.BASE])
def test_the_book_s_records_say_what_the_book_says(base):
    """The untrained base, told how to begin, is as good as a trained one."""
    found = untrained.recorded(base)
    assert found["first_token"]["sampled"]["accuracy"] > 0.75
    assert found["header"]["sampled"]["accuracy"] > found["first_token"]["sampled"]["high"]
    assert min(found[control]["greedy"]["accuracy"] for control in ("first_token", "header")) > 0.99
