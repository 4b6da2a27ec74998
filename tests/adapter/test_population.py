"""A population: every member gets the samples, the gradient and the numbers that it would get alone."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch

import tinylora_lite as tl
from tinylora_lite import nano
from tinylora_lite.adapter.attached import adapter_of, rows_of
from tinylora_lite.adapter.batched import Population
from tinylora_lite.training.grpo import GRPO
from tinylora_lite.training.loop import fit
from tinylora_lite.training.sft import SFT

TASK = nano.task(train=64, validation=8, test=40)
SETTINGS = tl.GRPOSettings(
    steps=3, prompts_per_step=4, group_size=4, max_new_tokens=nano.MAX_NEW_TOKENS, learning_rate=0.05, micro_batch=8
)
MEMBERS = [
    (tl.TinyLoraConfig(rank=2, u=1, n_tie=4, seed=0), replace(SETTINGS, seed=0)),
    (tl.TinyLoraConfig(rank=2, u=1, n_tie="all", seed=1), replace(SETTINGS, seed=1)),
    (
        tl.TinyLoraConfig(rank=2, u=1, n_tie=1, seed=1, tying="structured"),
        replace(SETTINGS, seed=0, learning_rate=0.01),
    ),
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread_for_the_module():
    """The fixtures below are made once, before the one of every test sets it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def base():
    return nano.load()


@pytest.fixture(scope="module")
def alone():
    """What each member does by itself: its run, its numbers, its score."""
    found = []
    for config, settings in MEMBERS:
        model, tokenizer = nano.load()
        adapter = tl.attach(model, config)
        run = tl.train_grpo(model, tokenizer, adapter, TASK, settings, progress=False)
        score = tl.evaluate(
            model, tokenizer, TASK, problems=40, batch_size=16, max_new_tokens=nano.MAX_NEW_TOKENS, seed=3
        )
        found.append((run, adapter.vectors.detach().clone(), score))
    return found


@pytest.fixture(scope="module")
def together():
    model, tokenizer = nano.load()
    population = tl.attach_population(model, [config for config, _ in MEMBERS])
    runs = fit(GRPO(model, tokenizer, population, TASK, [own for _, own in MEMBERS]), progress=False)
    scores = tl.evaluate_population(
        model,
        tokenizer,
        TASK,
        population,
        problems=40,
        batch_size=16,
        max_new_tokens=nano.MAX_NEW_TOKENS,
        seed=3,
    )
    return model, population, runs, scores


def test_members_train_as_they_do_alone(alone, together):
    _model, population, runs, _scores = together
    for (run, vectors, _), member, v in zip(alone, runs, population.vectors, strict=True):
        assert member.curve("reward") == run.curve("reward")  # the very same samples
        assert member.curve("length") == run.curve("length")
        assert member.curve("entropy") == pytest.approx(run.curve("entropy"), abs=1e-5)
        assert member.curve("gradient_norm") == pytest.approx(run.curve("gradient_norm"), rel=1e-3)
        torch.testing.assert_close(v.detach(), vectors, rtol=0, atol=2e-4)
        assert member.parameters == run.parameters == vectors.numel()
        assert v.detach().abs().max() > 0.005


def test_members_are_scored_as_they_are_alone(alone, together):
    *_, scores = together
    for (_, _, score), member in zip(alone, scores, strict=True):
        assert [c.text for c in member.completions] == [c.text for c in score.completions]
        assert member.summary() == score.summary()
    assert len({tuple(c.text for c in score.completions) for score in scores}) == len(scores)


def test_each_has_a_seed_or_all_have_one(together):
    model, population, *_ = together
    with pytest.raises(ValueError, match=f"{len(MEMBERS)} adapters, and there are 1 seeds"):
        tl.evaluate_population(model, nano.load()[1], TASK, population, seed=[3])


def test_a_model_with_a_population_is_not_copied(base):
    model, _ = base
    population = tl.attach_population(model, [tl.TinyLoraConfig(n_tie="all")] * 2)
    with pytest.raises(TypeError, match=r"call the population's detach\(\) first"):
        copy.deepcopy(model)
    population.detach()
    assert copy.deepcopy(model) is not model


def test_a_setting_that_one_adapter_refuses_is_refused(together):
    model, population, *_ = together
    with pytest.raises(ValueError, match="truncated must be zero or score, not 'mask'"):
        tl.evaluate_population(model, nano.load()[1], TASK, population, truncated="mask")


@pytest.mark.parametrize("normalise", ["token", "sequence", "constant"])
def test_the_gradient_is_the_one_alone_to_float64(base, normalise):
    """One step without Adam's divisions: gradients from the same v in float64, where rounding leaves 1e-12."""
    model, tokenizer = base
    model.double()
    settings = replace(SETTINGS, steps=1, normalise=normalise, max_grad_norm=1e9)
    configs = [tl.TinyLoraConfig(rank=2, u=2, n_tie=n_tie, seed=seed) for seed, n_tie in enumerate((4, "all", 1))]
    starts = [torch.randn(groups, 2, generator=torch.Generator().manual_seed(groups)) * 0.02 for groups in (13, 1, 49)]
    wanted = []
    for k, config in enumerate(configs):
        adapter = tl.attach(model, config)
        with torch.no_grad():
            adapter.vectors.copy_(starts[k])
        tl.train_grpo(model, tokenizer, adapter, TASK, replace(settings, seed=k), progress=False)
        wanted.append(adapter.vectors.grad)
        adapter.detach()
    population = tl.attach_population(model, configs)
    with torch.no_grad():
        for v, start in zip(population.vectors, starts, strict=True):
            v.copy_(start)
    members = [replace(settings, seed=k) for k in range(3)]
    fit(GRPO(model, tokenizer, population, TASK, members), progress=False)
    for v, gradient in zip(population.vectors, wanted, strict=True):
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(v.grad, gradient, rtol=2e-5, atol=1e-8)


def test_imitation_too_is_the_one_alone(base):
    model, tokenizer = base
    settings = tl.SFTSettings(steps=4, prompts_per_step=8, learning_rate=0.03, max_new_tokens=nano.MAX_NEW_TOKENS)
    configs = [tl.TinyLoraConfig(rank=2, u=1, n_tie=4, seed=seed) for seed in (0, 1)]
    alone = []
    for k, config in enumerate(configs):
        adapter = tl.attach(model, config)
        run = tl.train_sft(model, tokenizer, adapter, TASK, replace(settings, seed=k), progress=False)
        alone.append((run.curve("loss"), adapter.vectors.detach().clone()))
        adapter.detach()
    population = tl.attach_population(model, configs)
    runs = fit(SFT(model, tokenizer, population, TASK, [replace(settings, seed=k) for k in (0, 1)]), progress=False)
    for (losses, vectors), run, v in zip(alone, runs, population.vectors, strict=True):
        assert run.curve("loss") == pytest.approx(losses, rel=1e-4)
        torch.testing.assert_close(v.detach(), vectors, rtol=0, atol=1e-3)


@pytest.mark.parametrize("sigma", ["left", "split", "right"])
def test_lora_xs_is_a_member_like_any_other(base, sigma):
    model, tokenizer = base
    ids = tokenizer("tom has 3 apples.", return_tensors="pt").input_ids
    plain = model(ids).logits
    configs = [tl.lora_xs(rank=3, sigma=sigma)] * 2
    population = tl.attach_population(model, configs)
    with torch.no_grad():
        population.vectors[1].normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    with rows_of(torch.tensor([0, 1])):
        both = model(ids.repeat(2, 1)).logits
    torch.testing.assert_close(both[0], plain[0])
    numbers = population.vectors[1].detach()
    population.detach()
    adapter = tl.attach(model, configs[1])
    with torch.no_grad():
        adapter.vectors.copy_(numbers)
    torch.testing.assert_close(both[1], model(ids).logits[0], rtol=1e-4, atol=1e-4)
    assert (both[1] - plain[0]).abs().max() > 0.1


def test_a_calibrated_member_and_a_random_one_share_a_batch(base):
    model, tokenizer = base
    ids = tokenizer("tom has 3 apples.", return_tensors="pt").input_ids
    configs = [
        tl.TinyLoraConfig(rank=8, u=13, n_tie="all", projection=nano.basis()),
        tl.TinyLoraConfig(rank=8, u=13, n_tie="all", seed=5),
    ]
    population = tl.attach_population(model, configs)
    with torch.no_grad():
        for v in population.vectors:
            v.fill_(0.02)
    with rows_of(torch.tensor([1, 0])):
        both = model(ids.repeat(2, 1)).logits
    population.detach()
    for row, index in ((0, 1), (1, 0)):
        adapter = population.member(index, model)
        torch.testing.assert_close(both[row], model(ids).logits[0], rtol=1e-4, atol=1e-4)
        adapter.detach()


def test_detach_leaves_the_model_as_it_was(base):
    model, tokenizer = base
    ids = tokenizer("tom has 3 apples.", return_tensors="pt").input_ids
    before = model(ids).logits
    population = tl.attach_population(model, [tl.TinyLoraConfig(rank=1)] * 2)
    assert not any(p.requires_grad for p in model.parameters())
    population.detach()
    population.detach()
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(ids).logits, before)
    assert adapter_of(model) is None


def test_what_cannot_be_is_refused_and_leaves_the_model_untouched(base):
    model, tokenizer = base
    one = tl.TinyLoraConfig(rank=2)
    for configs, message in (
        ([], "at least one adapter"),
        ([one, tl.TinyLoraConfig(rank=1)], "adapters of a population share rank"),
        ([one, tl.TinyLoraConfig(rank=2, sigma="split")], "adapters of a population share sigma"),
        ([tl.TinyLoraConfig(rank=500)] * 2, "rank"),
    ):
        with pytest.raises(ValueError, match=message):
            tl.attach_population(model, configs)
    assert all(p.requires_grad for p in model.parameters())
    adapter = tl.attach(model, one)
    with pytest.raises(ValueError, match="carries an adapter already"):
        tl.attach_population(model, [one])
    adapter.detach()
    population = tl.attach_population(model, [one] * 2)
    assert isinstance(population, Population)
    with pytest.raises(ValueError, match="carries an adapter already"):
        tl.attach(model, one)
    with pytest.raises(ValueError, match="carries an adapter"):
        tl.train_grpo(model, tokenizer, None, TASK, SETTINGS)
    for settings, message in (
        ([SETTINGS], "2 adapters, and there are settings for 1"),
        ([SETTINGS, replace(SETTINGS, group_size=8)], "share group_size"),
        ([replace(SETTINGS, kl=0.1)] * 2, "without a KL penalty"),
    ):
        with pytest.raises(ValueError, match=message):
            GRPO(model, tokenizer, population, TASK, settings)
    for settings in ([], [[SETTINGS] * 2], SETTINGS):
        with pytest.raises(ValueError, match=r"a list of them: fit\(GRPO\("):
            GRPO(model, tokenizer, population, TASK, settings)
    with pytest.raises(ValueError, match=r"a list of them: fit\(SFT\("):
        tl.train_sft(model, tokenizer, population, TASK, [tl.SFTSettings()] * 2)
    with pytest.raises(ValueError, match="leave folder out"):
        fit(GRPO(model, tokenizer, population, TASK, [SETTINGS] * 2), folder="x")
    with pytest.raises(ValueError, match="2 adapters, and there are settings for 1"):
        tl.train_grpo(model, tokenizer, population, TASK, SETTINGS)
    with pytest.raises(RuntimeError, match=r"adapters are set for none; call it inside .*attached\.rows_of"):
        tl.evaluate(model, tokenizer, TASK, split="validation")
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(RuntimeError, match="given 2 rows, but adapters are set for none"):
        model(ids)
    with (
        pytest.raises(RuntimeError, match="given 2 rows, but adapters are set for 3"),
        rows_of(torch.zeros(3, dtype=torch.long)),
    ):
        model(ids)


def test_a_population_that_cannot_be_made_leaves_the_model_untouched(base, monkeypatch):
    model, _ = base

    def too_large(*_):
        raise MemoryError("no room for P")

    monkeypatch.setattr("tinylora_lite.adapter.batched.projection_of", too_large)
    with pytest.raises(MemoryError, match="no room"):
        tl.attach_population(model, [tl.TinyLoraConfig()] * 2)
    assert all(p.requires_grad for p in model.parameters())
    assert adapter_of(model) is None


def test_a_population_is_found_kept_in_float32_and_pickled(base):
    model, tokenizer = base
    population = tl.attach_population(model, [tl.TinyLoraConfig(seed=seed) for seed in (0, 1)])
    assert adapter_of(model) is population
    population.half()
    for v in population.vectors:
        assert v.dtype == torch.float32
        torch.nn.init.normal_(v)
    ids = tokenizer(["tom has 3 apples."] * 2, return_tensors="pt").input_ids
    twin = pickle.loads(pickle.dumps(model))
    with rows_of(torch.tensor([0, 1])):
        assert torch.equal(twin(ids).logits, model(ids).logits)
    adapter_of(twin).detach()
    assert adapter_of(twin) is None
    population.detach()
    with pytest.raises(ValueError, match="not attached to this model"):
        GRPO(model, tokenizer, population, TASK, [SETTINGS] * 2)
