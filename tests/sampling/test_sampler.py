"""What the sampler says it drew is what the trainer computes, whatever the batch, the padding and the dropping."""

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from scipy import stats

import tinylora_lite as tl
from tinylora_lite.sampling.logprobs import common_start, completion_logprobs, read_prompts
from tinylora_lite.sampling.policy import draw, recomputes
from tinylora_lite.sampling.rollouts import encode_prompts
from tinylora_lite.sampling.sampler import ModelSampler, sample
from tinylora_lite.sampling.start import after_start

ENDS = 40
"""With this many end tokens out of 163 the random model ends most answers within a few tokens."""


def prompts(tokenizer, task, count=6, repeats=1):
    ids, mask = encode_prompts(tokenizer, task, task.train[:count])
    return ids.repeat_interleave(repeats, dim=0), mask.repeat_interleave(repeats, dim=0)


@pytest.fixture(params=["qwen2", "llama"])
def ending(request, make_model, tokenizer):
    """A model whose answers end at different lengths."""
    model = make_model(request.param)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(len(tokenizer) - ENDS, len(tokenizer))]
    return model


class CacheSizes:
    """Rows of the batch in each forward pass of a model."""

    def __init__(self, model):
        self.rows = []
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, model, args, kwargs):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        held = cache.layers[0].keys.shape[0] if cache.get_seq_length() else None
        self.rows.append((len(kwargs["input_ids"]), held))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampler_and_the_trainer_agree(ending, tokenizer, task, temperature):
    ids, mask = prompts(tokenizer, task, repeats=3)
    assert len(set(mask.sum(dim=1).tolist())) > 1, "the test is about padding on the left"
    rollouts = sample(ending, tokenizer, ids, mask, max_new_tokens=12, temperature=temperature, seed=1)
    assert len(set(rollouts.lengths.tolist())) > 3, "the test is about rows that are dropped"
    drawn = rollouts.completion_mask.bool()
    trained = completion_logprobs(ending, rollouts, temperature)
    assert torch.allclose(rollouts.logprobs[drawn], trained[drawn], atol=1e-5)
    assert not rollouts.logprobs[~drawn].any()
    assert not rollouts.entropies[~drawn].any()
    assert (rollouts.completion_ids[~drawn] == tokenizer.pad_token_id).all()


def test_teacher_forcing_by_hand(ending, tokenizer, task):
    """Each row alone, without padding, through the plain forward pass."""
    rollouts = sample(ending, tokenizer, *prompts(tokenizer, task), max_new_tokens=8, temperature=0.7)
    found = completion_logprobs(ending, rollouts, 0.7)
    for row in range(len(rollouts)):
        prompt = rollouts.prompt_ids[row][rollouts.prompt_mask[row].bool()]
        completion = rollouts.completion_ids[row, : rollouts.lengths[row]]
        logits = ending(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        distribution = torch.log_softmax(logits / 0.7, dim=-1)
        expected = distribution[torch.arange(len(completion)), completion]
        assert torch.allclose(found[row, : len(completion)], expected, atol=1e-5)
        entropy = torch.distributions.Categorical(logits=logits / 0.7).entropy()
        assert torch.allclose(rollouts.entropies[row, : len(completion)], entropy, atol=1e-4)


@pytest.mark.parametrize("start", ["", "solve the problem step by step. " * 8], ids=["", "long start"])
@pytest.mark.parametrize("config", [{}, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}])
def test_gradients_are_those_of_the_plain_forward_pass(make_model, tokenizer, task, config, start):
    """Where prompts are shared, and where windowed attention forbids sharing them."""
    model, task = make_model(**config), dataclasses.replace(task, system=start or task.system)
    adapter = tl.attach(model, tl.TinyLoraConfig(rank=2, u=2))
    rollouts = sample(model, tokenizer, *prompts(tokenizer, task, count=3, repeats=4), max_new_tokens=6)
    weights = torch.randn(rollouts.logprobs.shape, generator=torch.Generator().manual_seed(0))

    def gradient(logprobs):
        return torch.autograd.grad((logprobs * weights * rollouts.completion_mask).sum(), adapter.vectors)[0]

    attention = torch.cat([rollouts.prompt_mask, rollouts.completion_mask], dim=1)
    logits = model(
        input_ids=torch.cat([rollouts.prompt_ids, rollouts.completion_ids], dim=1),
        attention_mask=attention,
        position_ids=(attention.cumsum(dim=1) - 1).clamp(min=0),
    ).logits[:, rollouts.prompt_ids.shape[1] - 1 : -1]
    plain = torch.log_softmax(logits, dim=-1).gather(2, rollouts.completion_ids[..., None])[..., 0]
    expected = gradient(plain)
    assert expected.abs().min() > 0
    assert torch.allclose(gradient(completion_logprobs(model, rollouts)), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_gives_the_same(make_model, tokenizer, task):
    model = make_model()
    adapter = tl.attach(model, tl.TinyLoraConfig(rank=2, u=2))
    rollouts = sample(model, tokenizer, *prompts(tokenizer, task, count=3, repeats=2), max_new_tokens=6)
    before = completion_logprobs(model, rollouts)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert any(map(recomputes, model.modules()))
    after = completion_logprobs(model, rollouts)
    assert torch.allclose(before, after, atol=1e-5)
    (one,), (other,) = (torch.autograd.grad(x.sum(), adapter.vectors) for x in (before, after))
    assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.fixture
def long_start(task):
    """The task with instructions that are longer than what is worth a forward pass of its own."""
    return dataclasses.replace(task, system="solve the problem step by step. " * 8)


def test_what_all_prompts_begin_with_is_read_once(ending, tokenizer, long_start):
    ids, mask = prompts(tokenizer, long_start, count=4, repeats=2)
    tokens = []
    ending.register_forward_pre_hook(lambda _, args, kw: tokens.append(tuple(kw["input_ids"].shape)), with_kwargs=True)
    rollouts = sample(ending, tokenizer, ids, mask, max_new_tokens=4)
    alone = torch.stack([row[m.bool()][:30] for row, m in zip(ids, mask, strict=True)])
    assert (alone == alone[:1]).all(), "the test is about prompts that begin alike"
    (one, start), (four, rest) = tokens[:2]
    assert (one, four) == (1, 4)
    assert start >= 32
    assert start + rest == ids.shape[1]
    seen = completion_logprobs(ending, rollouts)
    for row in range(len(rollouts)):
        prompt, n = ids[row][mask[row].bool()], int(rollouts.lengths[row])
        logits = ending(input_ids=torch.cat([prompt, rollouts.completion_ids[row, :n]])[None]).logits[0]
        expected = torch.log_softmax(logits[len(prompt) - 1 : -1], -1).gather(1, rollouts.completion_ids[row, :n, None])
        assert torch.allclose(seen[row, :n], expected[:, 0], atol=1e-5)
        assert torch.allclose(rollouts.logprobs[row, :n], expected[:, 0], atol=1e-5)


def test_a_start_that_is_held_once_changes_no_number(ending, tokenizer, long_start, monkeypatch):
    adapter = tl.attach(ending, tl.TinyLoraConfig(rank=2, u=2))
    torch.nn.init.normal_(adapter.vectors, std=0.1, generator=torch.Generator().manual_seed(0))
    ending.double()
    ids, mask = prompts(tokenizer, long_start, count=4, repeats=3)
    assert len(set(mask.sum(dim=1).tolist())) > 1, "the test is about padding between the start and the rest"

    def numbers():
        rollouts = sample(ending, tokenizer, ids, mask, max_new_tokens=12, seed=1)
        logprobs = completion_logprobs(ending, rollouts) * rollouts.completion_mask
        weights = torch.arange(1.0, len(ids) + 1)[:, None]
        (gradient,) = torch.autograd.grad((logprobs * weights).sum(), adapter.vectors)
        return rollouts.completion_ids, rollouts.logprobs, logprobs.detach(), gradient

    *_, cache, seen, start = read_prompts(ending, ids, mask)
    assert start.get_seq_length() >= 32
    assert start.get_seq_length() + cache.get_seq_length() == ids.shape[1]
    assert seen.shape[1] == cache.get_seq_length()
    once = numbers()
    assert ending.config._attn_implementation == "sdpa"
    monkeypatch.setattr("tinylora_lite.sampling.logprobs.can_hold_start", lambda model: False)
    copied = numbers()
    assert torch.equal(once[0], copied[0])
    for one, other in zip(once[1:], copied[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_another_model_may_sample_in_another_thread(ending, make_model, tokenizer, long_start):
    ids, mask = prompts(tokenizer, long_start, count=4, repeats=1)
    other = make_model(seed=5)

    def texts():
        return sample(other, tokenizer, ids, mask, max_new_tokens=6, temperature=0.0).completion_ids

    alone = texts()
    with torch.no_grad():
        _, cache, seen, start = read_prompts(ending, ids, mask)
    inputs = {"input_ids": ids[:, -1:], "attention_mask": torch.cat([seen, seen[:, :1] * 0 + 1], dim=1)}
    inputs["position_ids"] = mask.sum(dim=1, keepdim=True)
    with after_start(ending, start), torch.no_grad():
        before = ending(**inputs, past_key_values=copy.deepcopy(cache)).logits
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(texts).result(), alone)
        assert torch.equal(ending(**inputs, past_key_values=cache).logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocabulary", [300, 384])
def test_the_last_draw_is_a_token_that_has_a_mass(dtype, vocabulary):
    masses = torch.zeros(3, vocabulary)
    masses[0, :2], masses[1, -1], masses[2, 130:133] = 0.3, 1.0, torch.tensor([0.1, 0.2, 0.0])
    found = draw(masses, torch.ones(3, dtype=dtype))[:, 0]
    assert found.tolist() == [1, vocabulary - 1, 131]


def test_the_start_ends_before_the_shortest_prompt_does():
    ids, ones = torch.tensor([[0, 5, 6, 7], [5, 6, 7, 8]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    assert common_start(ids, ones) == 2, "a token is left to read of each"
    assert common_start(ids[:1], ones[:1]) == 0, "of one prompt nothing is shared"
    assert common_start(torch.tensor([[5, 6, 9], [5, 7, 9]]), torch.ones(2, 3).long()) == 1


def test_a_prompt_is_read_once_for_its_group(model, tokenizer, task):
    sizes = CacheSizes(model)
    rollouts = sample(model, tokenizer, *prompts(tokenizer, task, count=3, repeats=5), max_new_tokens=3)
    assert sizes.rows[0] == (3, None)
    assert sizes.rows[1] == (15, 15)
    sizes.rows.clear()
    completion_logprobs(model, rollouts)
    assert sizes.rows == [(3, None), (15, 15)]


def test_a_step_copies_no_keys_of_the_steps_before(ending, tokenizer, task):
    places = []

    def note(model, args, kwargs):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if cache.get_seq_length():
            places.append((len(kwargs["input_ids"]), cache.layers[1].values.data_ptr()))

    ending.register_forward_hook(lambda model, args, kwargs, output: note(model, args, kwargs), with_kwargs=True)
    sample(ending, tokenizer, *prompts(tokenizer, task, repeats=5), max_new_tokens=16, seed=2)
    places = places[1:]  # of the steps, without the prompts
    assert len({rows for rows, _ in places}) > 2, "rows leave, and what is left is copied"
    for (rows, place), (next_rows, next_place) in pairwise(places):
        assert (place == next_place) is (rows == next_rows)


def test_finished_rows_leave_the_cache(ending, tokenizer, task):
    sizes = CacheSizes(ending)
    rollouts = sample(ending, tokenizer, *prompts(tokenizer, task, repeats=5), max_new_tokens=16, seed=2)
    held = [held for _, held in sizes.rows[1:]]
    assert held[-1] < 10 < 20 < held[0]
    before = 30
    for step, rows in enumerate(held, start=1):
        unfinished = int((rollouts.lengths > step).sum())
        assert rows == (unfinished if unfinished <= 0.9 * before else before)
        before = rows


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_greedy_is_generate(architecture, make_model, tokenizer, task):
    model = make_model(architecture)
    ends = [tokenizer.eos_token_id, *range(len(tokenizer) - ENDS, len(tokenizer))]
    model.generation_config.eos_token_id = ends
    ids, mask = prompts(tokenizer, task, count=12)
    ours = sample(model, tokenizer, ids, mask, max_new_tokens=16, temperature=0)
    theirs = model.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False)[:, ids.shape[1] :]
    assert len(set(ours.lengths.tolist())) > 2
    assert torch.equal(ours.completion_ids, theirs)


def test_greedy_rows_do_not_depend_on_their_company(ending, tokenizer, task):
    ids, mask = prompts(tokenizer, task, count=8)
    together = sample(ending, tokenizer, ids, mask, max_new_tokens=12, temperature=0)
    for row in range(8):
        alone = sample(ending, tokenizer, ids[row : row + 1], mask[row : row + 1], max_new_tokens=12, temperature=0)
        assert alone.texts == together.texts[row : row + 1]
        assert alone.lengths == together.lengths[row]


def test_first_tokens_follow_the_distribution(model, tokenizer, task):
    ids, mask = prompts(tokenizer, task, count=1, repeats=4000)
    first = sample(model, tokenizer, ids, mask, max_new_tokens=1, temperature=1.5, seed=3).completion_ids[:, 0]
    expected = 4000 * torch.softmax(model(ids[:1]).logits[0, -1] / 1.5, dim=-1).detach().double()
    counts = torch.bincount(first, minlength=len(expected)).double()
    common = expected >= 5
    assert common.sum() > 50
    counts, expected = (torch.cat([x[common], x[~common].sum()[None]]) for x in (counts, expected))
    assert stats.chisquare(counts.numpy(), (expected * counts.sum() / expected.sum()).numpy()).pvalue > 0.01


def test_a_seed_fixes_the_draw(model, tokenizer, task):
    ids, mask = prompts(tokenizer, task)
    state = torch.get_rng_state()
    one, same, other = (sample(model, tokenizer, ids, mask, max_new_tokens=8, seed=s) for s in (5, 5, 6))
    assert torch.equal(one.completion_ids, same.completion_ids)
    assert not torch.equal(one.completion_ids[:, :4], other.completion_ids[:, :4])
    assert len({tuple(row.tolist()) for row in one.completion_ids}) > 1
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"


def test_end_tokens_and_truncation(ending, tokenizer, task):
    rollouts = sample(ending, tokenizer, *prompts(tokenizer, task, repeats=5), max_new_tokens=6, seed=4)
    ends = set(ending.generation_config.eos_token_id)
    assert 0 < int(rollouts.truncated.sum()) < len(rollouts)
    for ids, length, cut in zip(
        rollouts.completion_ids.tolist(), rollouts.lengths.tolist(), rollouts.truncated, strict=True
    ):
        assert not ends & set(ids[: length - 1])
        assert (ids[length - 1] in ends) == (not cut)
        assert length == 6 or not cut


def test_an_end_at_the_limit_is_no_truncation(model, tokenizer, task):
    model.generation_config.eos_token_id = list(range(len(tokenizer)))
    rollouts = sample(model, tokenizer, *prompts(tokenizer, task), max_new_tokens=1)
    assert not rollouts.truncated.any()
    assert rollouts.lengths.tolist() == [1] * 6


def test_texts_leave_special_tokens_out(model, tokenizer, task):
    rollouts = sample(model, tokenizer, *prompts(tokenizer, task), max_new_tokens=8)
    for ids, mask, text in zip(rollouts.completion_ids, rollouts.completion_mask, rollouts.texts, strict=True):
        assert text == tokenizer.decode(ids[mask.bool()], skip_special_tokens=True).strip()
        assert "<|" not in text


def test_rows_cut_padding_only(ending, tokenizer, task):
    rollouts = sample(ending, tokenizer, *prompts(tokenizer, task, repeats=2), max_new_tokens=16, seed=2)
    index = torch.argsort(rollouts.lengths)[:3]
    few = rollouts.rows(index)
    assert few.completion_ids.shape[1] == int(few.lengths.max()) < rollouts.completion_ids.shape[1]
    assert few.prompt_mask[:, 0].any()
    assert few.texts == [rollouts.texts[i] for i in index]
    whole = completion_logprobs(ending, rollouts)[index][:, : few.lengths.max()]
    drawn = few.completion_mask.bool()
    assert torch.allclose(completion_logprobs(ending, few)[drawn], whole[drawn], atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_comes_back(make_model, tokenizer, task, training):
    model = make_model("llama", attention_dropout=0.9).train(training)
    ids, mask = prompts(tokenizer, task)
    one, two = (sample(model, tokenizer, ids, mask, max_new_tokens=4, temperature=0) for _ in range(2))
    assert torch.equal(one.logprobs, two.logprobs)
    assert model.training is training


def test_encoding_pads_on_the_left(tokenizer, task):
    ids, mask = encode_prompts(tokenizer, task, task.train[:3])
    for row, example in enumerate(task.train[:3]):
        text = f"<|user|> {example.prompt}<|assistant|>"
        assert ids[row][mask[row].bool()].tolist() == tokenizer(text)["input_ids"]
        assert mask[row].tolist() == sorted(mask[row].tolist())


@pytest.mark.parametrize(
    ("options", "match"), [({"max_new_tokens": 0}, "max_new_tokens"), ({"temperature": -1.0}, "temperature")]
)
def test_bad_numbers(model, tokenizer, task, options, match):
    with pytest.raises(ValueError, match=match):
        sample(model, tokenizer, *prompts(tokenizer, task), **{"max_new_tokens": 4} | options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_in_the_middle_of_a_completion(model, tokenizer, task, value, temperature):
    model.generation_config.eos_token_id = None
    calls = []

    def break_down(module, args, output):
        calls.append(module)
        return output if len(calls) < 3 else torch.full_like(output, value)

    model.lm_head.register_forward_hook(break_down)
    with pytest.raises(FloatingPointError, match="NaN"):
        sample(model, tokenizer, *prompts(tokenizer, task), max_new_tokens=8, temperature=temperature)
    assert len(calls) == 3


def test_a_model_that_puts_out_nan(model, tokenizer, task):
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    model.train()
    with pytest.raises(FloatingPointError, match="NaN"):
        sample(model, tokenizer, *prompts(tokenizer, task), max_new_tokens=4)
    assert model.training, "the mode comes back after an error too"


def test_a_batch_in_parts_is_the_same_batch(ending, tokenizer, task):
    ids, mask = prompts(tokenizer, task, repeats=3)
    settings = {"max_new_tokens": 12, "temperature": 0.9, "seed": 3}
    whole = sample(ending, tokenizer, ids, mask, **settings)
    parts = ModelSampler(ending, tokenizer, batch_size=5).sample(ids, mask, **settings)
    assert whole.texts == parts.texts
    for name in ("prompt_ids", "completion_ids", "completion_mask", "truncated"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name
    assert torch.allclose(whole.logprobs, parts.logprobs, atol=1e-5)
    last = sample(ending, tokenizer, ids[-3:], mask[-3:], first_row=len(ids) - 3, **settings)
    assert last.texts == whole.texts[-3:]
    assert sample(ending, tokenizer, ids[-3:], mask[-3:], **settings).texts != last.texts


def test_seeds_that_do_not_share_the_rows_equally_are_refused(model, tokenizer, task):
    ids, mask = encode_prompts(tokenizer, task, task.train[:3])
    with pytest.raises(ValueError, match="3 rows cannot be shared equally by 2 seeds"):
        sample(model, tokenizer, ids, mask, max_new_tokens=2, seed=[0, 1])
