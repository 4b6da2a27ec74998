"""Presets: the paper's numbers where it gives them, 13 parameters on every model, and all of them fit their GPU."""

import re
from dataclasses import replace

import pytest

import tinylora_lite as tl
from tinylora_lite.experiment.presets import BASES, GPUS, ON_CPU, describe, preset, preset_names
from tinylora_lite.experiment.run import task_named
from tinylora_lite.experiment.settings import RunSettings
from tinylora_lite.lab.bases import config_of
from tinylora_lite.lab.claims import claim_of
from tinylora_lite.lab.tasks import task_of
from tinylora_lite.lab.trial import settings_of
from tinylora_lite.planning.plan import plan_run
from tinylora_lite.planning.shapes import ModelShape, model_config

FULL_SIZE = [name for name in preset_names() if name not in ON_CPU]


def test_the_paper_on_gsm8k():
    training = preset("qwen2.5-7b/gsm8k").training
    wanted = {"epochs": 3, "prompts_per_step": 64, "group_size": 4, "max_new_tokens": 4096, "kl": 0.0}
    assert {name: training[name] for name in wanted} == wanted
    assert preset("qwen2.5-7b/gsm8k").learning_rates == (1e-7, 5e-7, 1e-6, 5e-6, 1e-5, 1e-4, 2e-4)


def test_the_paper_on_math():
    settings = preset("qwen2.5-3b/math", "h100")
    wanted = {"prompts_per_step": 256, "group_size": 8, "max_new_tokens": 3072, "kl": 0.001, "temperature": 1.0}
    assert {name: settings.training[name] for name in wanted} == wanted
    assert settings.max_prompt_tokens == 1024


@pytest.mark.parametrize("base", BASES)
def test_thirteen_numbers_with_as_little_tying_as_can_be(base):
    config, settings = model_config(base), preset(f"{base}/gsm8k")
    wanted = settings.adapter.n_tie
    assert tl.plan(config, 13).n_tie == wanted
    assert tl.count_parameters(config, "tinylora", n_tie=wanted) == 13
    assert re.fullmatch("[0-9a-f]{40}", settings.revision)
    assert model_config(settings.model).to_dict() == config.to_dict()


@pytest.fixture(scope="module")
def shapes():
    return {base: ModelShape.of(model_config(base)) for base in BASES}


@pytest.mark.parametrize("gpu", GPUS)
def test_every_preset_is_whole_and_fits_its_gpu(gpu, shapes, monkeypatch):
    monkeypatch.setattr(ModelShape, "of", shapes.__getitem__)
    for name in FULL_SIZE:
        settings = preset(name, gpu)
        plan = plan_run(settings, gpu, config=name.split("/")[0])
        assert plan.fits, (name, plan.problems)
        assert plan.parameters == 13
        assert RunSettings.from_dict(settings.to_dict()) == settings
        assert "arXiv 2602.04118" in describe(name, gpu)


def test_a_t4_multiplies_no_bfloat16():
    assert {preset(name, "t4").dtype for name in FULL_SIZE} == {"float16"}


def test_methods():
    sft, calibrated = preset("llama-3.2-3b/gsm8k/sft"), preset("llama-3.2-3b/gsm8k/calibrated")
    assert (sft.method, sft.training_settings(7473).steps) == ("sft", 350)
    assert calibrated.adapter.calibrated
    assert (calibrated.adapter.rank, calibrated.adapter.u, calibrated.adapter.n_tie) == (8, 13, "all")
    assert "this project's own" in describe("llama-3.2-3b/gsm8k/calibrated")
    assert "arXiv" not in describe("nano")


def test_the_first_authors_fork():
    settings = preset("qwen2.5-7b/gsm8k/fork")
    config, training = settings.adapter.config(), settings.training_settings(7473)
    assert (config.scale, config.init_std, config.projection, config.sigma) == (16.0, 1e-5, "shared", "right")
    assert (config.rank, config.u, config.n_tie) == (2, 1, 16), "the paper's otherwise"
    assert (training.mini_batches, training.clip_low, training.clip_high, training.weight_decay) == (2, 0.2, 0.4, 0.01)
    assert training.warmup == pytest.approx(0.05 * training.steps, abs=0.6)
    on_t4 = preset("qwen2.5-7b/gsm8k/fork", "t4").training_settings(7473)
    assert on_t4.warmup == pytest.approx(0.05 * on_t4.steps, abs=0.6)
    lengths = [preset(f"{base}/gsm8k/fork").training["max_new_tokens"] for base in ("qwen2.5-0.5b", "qwen2.5-7b")]
    assert lengths == [1024, 4096]
    assert "need\nnot be what made the figures" in describe("qwen2.5-7b/gsm8k/fork")
    assert "qwen2.5-3b/gsm8k/fork" not in preset_names()


def test_names_that_are_not_there():
    with pytest.raises(ValueError, match="no preset named qwen"):
        preset("qwen")
    with pytest.raises(ValueError, match="presets are for t4"):
        preset("qwen2.5-7b/gsm8k", "4090")
    with pytest.raises(ValueError, match="runs on a CPU"):
        preset("nano", "t4")


@pytest.mark.parametrize("name", [name for name in ON_CPU if name.startswith("nano")])
def test_nano_presets_are_minutes_on_a_cpu(name):
    settings = preset(name)
    assert settings.model == settings.task == "nano"
    assert settings.training_settings(8000).steps == 30
    assert settings.adapter.calibrated or tl.plan(model_config("nano"), 13).n_tie == settings.adapter.n_tie


def test_a_real_model_is_trained_as_registered():
    settings = preset("smollm2-135m/words-1")
    point = next(point for point in claim_of("real-smollm2").points if point.label == "13 random")
    trial = replace(point.trial, learning_rate=point.rates[1], seed=settings.adapter.seed)
    assert settings.model == trial.base
    assert settings.training_settings(1) == settings_of(trial)
    assert settings.adapter.config() == config_of(trial)
    ours, theirs = task_named(settings.task, settings), task_of(trial.task, trial.base)
    assert [ours.messages(each) for each in ours.test] == [theirs.messages(each) for each in theirs.test]
    assert (ours.train, ours.reward) == (theirs.train, theirs.reward)
