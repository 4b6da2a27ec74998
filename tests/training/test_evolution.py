"""The evolution strategy: it learns, it repeats, it touches nothing else, and its candidates are compared fairly."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from tinylora_lite import TinyLoraConfig, attach, evaluate, nano
from tinylora_lite.adapter.batched import attach_population
from tinylora_lite.training import evolution
from tinylora_lite.training.batches import rollout
from tinylora_lite.training.evolution import ESSettings, train_es

CONFIG = TinyLoraConfig(rank=2, u=1, n_tie=7)
FEW = ESSettings(generations=2, candidates=4, prompts_per_step=3, max_new_tokens=6)


def test_it_learns_without_gradients():
    """Two calibrated numbers of a shipped base, on a quarter of the answers that the lab samples."""
    model, tokenizer = nano.load()
    config = TinyLoraConfig(rank=8, u=2, n_tie="all", projection=nano.basis())
    settings = ESSettings(generations=12, prompts_per_step=8, max_new_tokens=nano.MAX_NEW_TOKENS, sigma=0.5)
    run, v = train_es(model, tokenizer, config, nano.task(), settings)
    scored = {"problems": 200, "max_new_tokens": nano.MAX_NEW_TOKENS}
    before = evaluate(model, tokenizer, nano.task(), **scored)
    adapter = attach(model, config)
    with torch.no_grad():
        adapter.vectors.copy_(v)
    after = evaluate(model, tokenizer, nano.task(), **scored)
    assert after.accuracy > before.accuracy + 0.15
    assert run.method == "es"
    assert run.parameters == v.numel() == 2


def test_a_seed_gives_the_same_run_and_leaves_every_stream_alone(model, tokenizer, task):
    streams = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    runs = [train_es(model, tokenizer, CONFIG, task, FEW) for _ in range(2)]
    assert (np.random.get_state()[1] == streams[0]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), streams[1])
    assert torch.equal(runs[0][1], runs[1][1])
    timeless = [[{k: x for k, x in row.items() if k != "seconds"} for row in run.steps] for run, _ in runs]
    assert timeless[0] == timeless[1]
    other = train_es(model, tokenizer, CONFIG, task, replace(FEW, seed=1))[1]
    assert not torch.equal(runs[0][1], other)


def test_the_run_holds_the_mean_and_what_was_sampled(model, tokenizer, task):
    run, v = train_es(model, tokenizer, CONFIG, task, FEW)
    assert [row["step"] for row in run.steps] == [1, 2]
    last = run.steps[-1]
    assert [last["v0"], last["v1"]] == pytest.approx(v.flatten().tolist())
    assert last["norm"] == pytest.approx(v.norm().item(), rel=1e-5)
    assert last["best"] >= last["reward"]
    per_step = [row["length"] * FEW.candidates * FEW.prompts_per_step for row in run.steps]
    assert last["tokens"] == pytest.approx(sum(per_step))


def test_candidates_that_are_alike_get_the_same_answers(model, tokenizer, task, monkeypatch):
    """What is common to all of them must cancel: the same v, the same prompts, the same random numbers."""
    texts, populations = [], []

    def attached(*arguments):
        populations.append(attach_population(*arguments))
        return populations[0]

    def kept(*arguments):
        with torch.no_grad():
            for v in populations[0].vectors:
                v.fill_(0.3)
        rollouts = rollout(*arguments)
        texts.append(rollouts.texts)
        return rollouts

    monkeypatch.setattr(evolution, "attach_population", attached)
    monkeypatch.setattr(evolution, "rollout", kept)
    train_es(model, tokenizer, CONFIG, task, FEW)
    for step in texts:
        rows = [step[i : i + FEW.prompts_per_step] for i in range(0, len(step), FEW.prompts_per_step)]
        assert len(rows) == FEW.candidates
        assert all(row == rows[0] for row in rows)
    assert texts[0] != texts[1]


def test_the_record_names_the_adapter_as_that_of_any_run_does(model, tokenizer, task):
    run, _ = train_es(model, tokenizer, CONFIG, task, replace(FEW, generations=1))
    adapter = attach(model, CONFIG)
    assert run.adapter == adapter.identity()
    adapter.detach()


def test_an_answer_that_was_cut_off_earns_nothing(model, tokenizer, task):
    always = replace(task, reward=lambda text, gold: 1.0)
    run, _ = train_es(model, tokenizer, CONFIG, always, replace(FEW, max_new_tokens=1, generations=1))
    assert run.steps[0]["reward"] < 0.5


def test_the_model_is_left_as_it_was_even_by_an_error(model, tokenizer, task, monkeypatch):
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    hooks = lambda: sum(len(m._forward_hooks) for m in model.modules())  # noqa: E731
    train_es(model, tokenizer, CONFIG, task, FEW)
    assert hooks() == 0
    monkeypatch.setattr(evolution, "rollout", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_es(model, tokenizer, CONFIG, task, FEW)
    assert hooks() == 0
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("name", "value", "bounds"),
    [
        ("generations", 0, "an integer of at least 1"),
        ("candidates", 3, "an integer of at least 4"),
        ("prompts_per_step", 2.0, "an integer of at least 1"),
        ("max_new_tokens", True, "an integer of at least 1"),
        ("seed", -1, "an integer of at least 0"),
        ("sigma", float("nan"), "a finite number above 0"),
        ("temperature", 0, "a finite number above 0"),
    ],
)
def test_bad_settings_are_named(name, value, bounds):
    with pytest.raises(ValueError, match=f"^{name} must be {bounds}, not {value!r}$"):
        ESSettings(**{name: value})


def test_without_cma_the_cure_is_named(model, tokenizer, task, monkeypatch):
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(ModuleNotFoundError, match=r"tinylora_lite\[lab\]"):
        train_es(model, tokenizer, CONFIG, task, FEW)
