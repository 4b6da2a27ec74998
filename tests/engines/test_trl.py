"""TRL with our optimizer: the steps of our loop, checkpoints that resume, and a TRL that is too old is named."""

import copy
import importlib
import json
import sys
from dataclasses import replace
from statistics import fmean, variance
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import tinylora_lite as tl
from tinylora_lite import GRPOSettings, TinyLoraConfig, attach, nano
from tinylora_lite.sampling.rollouts import encode_prompts
from tinylora_lite.sampling.sampler import ModelSampler
from tinylora_lite.training.batches import draw_prompts
from tinylora_lite.utils import distributed

pytest.importorskip("trl")

from datasets import Dataset
from transformers.trainer_callback import DefaultFlowCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tinylora_lite.engines import TinyLoraAdamW, as_lora
from tinylora_lite.engines.trl import train_trl
from tinylora_lite.engines.trl_config import trl_config

CONFIG = TinyLoraConfig(rank=4, u=3, n_tie=7)
SMALL = GRPOSettings(steps=3, prompts_per_step=4, group_size=4, max_new_tokens=6, learning_rate=0.05, micro_batch=8)


@pytest.fixture
def policy(make_model, tokenizer):
    """A model and its adapter, as often as needed. Many tokens end a completion, so about half of them do end."""

    def make():
        model = make_model()
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(20, 50)]
        return model, attach(model, CONFIG)

    return make


@pytest.fixture
def task(task, number_words):
    return replace(task, reward=number_words)


class ShiftedSampler(ModelSampler):
    """The model, which reports log-probabilities that are too low by ``shift`` on every other token."""

    shift = 0.5

    def sample(self, *args, **kwargs):
        rollouts = super().sample(*args, **kwargs)
        every_other = torch.arange(rollouts.logprobs.shape[1]) % 2
        return replace(rollouts, logprobs=(rollouts.logprobs - self.shift * every_other) * rollouts.completion_mask)


class TestSteps:
    @pytest.mark.parametrize(
        "changes",
        [
            {"schedule": "linear", "warmup": 1, "temperature": 0.8},
            {"kl": 0.3, "normalise": "sequence", "epochs_per_step": 2, "clip_high": 0.28, "truncated": "mask"},
            {"normalise": "constant", "scale": "none", "truncated": "score", "max_grad_norm": 0.05},
            {"scale": "batch", "micro_batch": 5},  # 4 divides 16
        ],
        ids=["token", "sequence", "constant", "batch"],
    )
    def test_they_are_those_of_our_loop(self, policy, tokenizer, task, changes):
        settings = replace(SMALL, **changes)
        (ours, own), (theirs, by_trl) = policy(), policy()
        run = tl.train_grpo(ours, tokenizer, own, task, settings)
        found = train_trl(theirs, tokenizer, by_trl, task, settings, sampler=ModelSampler(theirs, tokenizer))
        assert own.vectors.abs().max() > 0.01
        assert torch.allclose(by_trl.vectors, own.vectors, atol=2e-5)
        for key in ("reward", "length", "truncated", "frac_reward_zero_std", "norm", "v0"):
            assert found.curve(key) == pytest.approx(run.curve(key), abs=2e-5), key
        assert found.curve("gradient_norm") == pytest.approx(run.curve("gradient_norm"), rel=1e-3, abs=1e-6)
        assert found.adapter == run.adapter
        assert (found.base, found.task, found.settings) == (run.base, run.task, run.settings)

    def test_the_first_gradient_is_ours_to_rounding(self, policy, tokenizer, task):
        """To 1e-5 of its norm, since importance weights are exponentials of differences that are mere rounding."""
        settings, found = replace(SMALL, steps=1, micro_batch=16), []
        for train in (tl.train_grpo, train_trl):
            (model, adapter), gradients = policy(), []
            adapter.vectors.register_post_accumulate_grad_hook(lambda v, kept=gradients: kept.append(v.grad.clone()))
            train(model, tokenizer, adapter, task, settings, sampler=ModelSampler(model, tokenizer))
            found.append(gradients[-1])
        ours, by_trl = found
        assert (by_trl - ours).norm() < 1e-5 * ours.norm()

    @pytest.mark.parametrize("cap", [2.0, 1.2, None])
    def test_the_samplers_probabilities_are_corrected_for(self, policy, tokenizer, task, cap):
        settings = replace(SMALL, tis_cap=cap, steps=2)
        (ours, own), (theirs, by_trl) = policy(), policy()
        tl.train_grpo(ours, tokenizer, own, task, settings, sampler=ShiftedSampler(ours, tokenizer))
        found = train_trl(theirs, tokenizer, by_trl, task, settings, sampler=ShiftedSampler(theirs, tokenizer))
        assert torch.allclose(by_trl.vectors, own.vectors, atol=2e-5)
        assert found.curve("logprob_diff_max") == pytest.approx([0.5, 0.5], abs=1e-4)
        assert 0.1 < found.curve("logprob_diff_mean")[0] < 0.4

    def test_the_sampler_follows_the_adapter(self, policy, tokenizer, task):
        model, adapter = policy()
        seen = []

        class Recorder(ModelSampler):
            def sync(self, followed):
                seen.append(followed.vectors.detach().clone())

        settings = replace(SMALL, epochs_per_step=2)
        train_trl(model, tokenizer, adapter, task, settings, sampler=Recorder(model, tokenizer))
        assert len(seen) == settings.steps
        assert not seen[0].any()
        assert not torch.equal(seen[1], seen[2])

    def test_a_sampler_that_leaves_it_out_is_refused(self, policy, make_model, tokenizer, task):
        model, adapter = policy()
        base = ModelSampler(make_model(), tokenizer)
        leaves_it_out = SimpleNamespace(sync=lambda _: None, sample=base.sample)
        with pytest.raises(RuntimeError, match="The base answered"):
            train_trl(model, tokenizer, adapter, task, SMALL, sampler=leaves_it_out)

    def test_the_reference_is_the_base(self, policy, tokenizer, task):
        """Also where the adapter starts elsewhere: TRL would take its start."""
        settings = replace(SMALL, kl=0.5, truncated="score")
        vectors = []
        for train in (tl.train_grpo, train_trl):
            model, adapter = policy()
            with torch.no_grad():
                adapter.vectors.fill_(0.05)
            train(model, tokenizer, adapter, task, settings, sampler=ModelSampler(model, tokenizer))
            vectors.append(adapter.vectors)
        assert torch.allclose(*vectors, atol=2e-5)

    def test_the_learning_rate_is_ours(self, policy, tokenizer, task, tmp_path):
        model, adapter = policy()
        settings = replace(SMALL, schedule="linear", warmup=1, steps=4, epochs_per_step=2)
        train_trl(model, tokenizer, adapter, task, replace(settings, save_every=4), folder=tmp_path, logging_steps=1)
        history = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]
        logged = [row["learning_rate"] for row in history if "learning_rate" in row]
        assert logged == pytest.approx([settings.learning_rate_at(step // 2) for step in range(8)])

    def test_where_all_agree_nothing_moves(self, policy, tokenizer, task):
        model, adapter = policy()
        calls = []

        def reward(text, gold):  # rewards differ in the first step only
            calls.append(text)
            return task.reward(text, gold) if len(calls) <= 1 + 16 else 1.0

        found = train_trl(model, tokenizer, adapter, replace(task, reward=reward), replace(SMALL, truncated="score"))
        assert found.curve("norm")[0] > 0
        assert found.curve("norm") == [found.curve("norm")[0]] * 3
        assert found.curve("gradient_norm")[1:] == [0.0, 0.0]


class TestSampling:
    def test_prompts_and_their_order_are_ours(self, policy, tokenizer, task, monkeypatch):
        batches, generate = [], GRPOTrainer._generate

        def recorded(trainer, prompts, *args, **kwargs):
            batches.append(trainer._tokenize_prompts(prompts)[0])
            return generate(trainer, prompts, *args, **kwargs)

        monkeypatch.setattr(GRPOTrainer, "_generate", recorded)
        model, adapter = policy()
        train_trl(model, tokenizer, adapter, task, SMALL)
        assert len(batches) == SMALL.steps
        for step, prompts in enumerate(batches):
            ids, mask = encode_prompts(tokenizer, task, draw_prompts(task.train, SMALL, step))
            assert prompts == [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True) for _ in range(4)]

    def test_trls_own_generation_learns(self):
        model, tokenizer = nano.load()
        adapter = attach(model, TinyLoraConfig(rank=8, u=13, n_tie="all", projection=nano.basis()))
        settings = GRPOSettings(
            steps=4,
            prompts_per_step=8,
            group_size=8,
            max_new_tokens=nano.MAX_NEW_TOKENS,
            learning_rate=0.3,
        )
        found = train_trl(model, tokenizer, adapter, nano.task(), settings)
        assert found.curve()[-1] > found.curve()[0] + 0.1
        assert "logprob_diff_mean" not in found.steps[0]

    def test_rates_and_numbers_are_logged(self, policy, tokenizer, task):
        model, adapter = policy()
        told = replace(task, lenient=lambda text, gold: 1.0, formatted=lambda text: False)
        seen = []
        found = train_trl(model, tokenizer, adapter, told, replace(SMALL, truncated="score"), on_step=seen.append)
        assert len(seen) == 3
        assert seen[-1].steps == found.steps
        assert (found.curve("lenient"), found.curve("formatted")) == ([1.0] * 3, [0.0] * 3)
        assert found.curve("strict") == pytest.approx(found.curve())
        last = [found.steps[-1][f"v{i}"] for i in range(adapter.num_parameters)]
        assert last == adapter.vectors.flatten().tolist()

    @pytest.mark.parametrize("given", [True, False], ids=["callbacks", "report_to"])
    def test_callbacks_are_told_v(self, policy, tokenizer, task, monkeypatch, given):
        told = []

        class Tracker(TrainerCallback):
            def on_log(self, args, state, control, logs, **kwargs):
                told.append(dict(logs))

        if not given:
            monkeypatch.setattr("transformers.trainer.DEFAULT_CALLBACKS", [DefaultFlowCallback, Tracker])
        model, adapter = policy()
        found = train_trl(model, tokenizer, adapter, task, SMALL, callbacks=[Tracker()] if given else [])
        for key in ("v0", "norm", "gradient_norm"):
            assert [logs[key] for logs in told if "reward" in logs] == found.curve(key)

    def test_validation_is_that_of_our_loop(self, policy, tokenizer, task):
        settings = replace(SMALL, evaluate_every=2, evaluate_problems=4, steps=2)
        (ours, own), (theirs, by_trl) = policy(), policy()
        run = tl.train_grpo(ours, tokenizer, own, task, settings)
        found = train_trl(theirs, tokenizer, by_trl, task, settings, sampler=ModelSampler(theirs, tokenizer))
        assert found.evaluations == run.evaluations != []


class TestCheckpoints:
    @pytest.mark.parametrize("own_sampler", [False, True], ids=["trl", "sampler"])
    def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(self, policy, tokenizer, task, tmp_path, own_sampler):
        settings = replace(SMALL, steps=4, save_every=2, epochs_per_step=2)

        def run(folder, **options):
            model, adapter = policy()
            sampler = ModelSampler(model, tokenizer) if own_sampler else None
            return adapter, train_trl(
                model, tokenizer, adapter, task, settings, sampler=sampler, folder=folder, **options
            )

        def stop(so_far):
            if len(so_far.steps) == 3:
                raise KeyboardInterrupt

        whole, expected = run(tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", on_step=stop)
        gone_on, found = run(tmp_path / "stopped")
        assert torch.equal(gone_on.vectors, whole.vectors)
        timeless = [[{k: v for k, v in row.items() if k != "seconds"} for row in r.steps] for r in (found, expected)]
        assert timeless[0] == timeless[1]
        assert found.seconds > found.curve("seconds")[1]
        done, again = run(tmp_path / "stopped")
        assert torch.equal(done.vectors, whole.vectors)
        assert again.steps == found.steps

    def test_they_hold_a_lora_and_v(self, policy, tokenizer, task, tmp_path):
        model, adapter = policy()
        train_trl(model, tokenizer, adapter, task, replace(SMALL, save_every=3), folder=tmp_path)
        checkpoint = tmp_path / "checkpoint-3"
        assert {path.name for path in tmp_path.iterdir()} == {"README.md", "run.json", checkpoint.name}
        assert not list(checkpoint.glob("model*"))
        state = torch.load(checkpoint / "optimizer.pt")["state"][0]
        assert torch.equal(state["vectors"], adapter.vectors)
        before = tl.export_lora(adapter, tmp_path / "expected")
        lora = load_file(checkpoint / "adapter_model.safetensors")
        for name, expected in load_file(before / "adapter_model.safetensors").items():
            assert torch.allclose(lora[name], expected, atol=1e-6), name

    def test_of_another_run_they_are_refused(self, policy, tokenizer, task, tmp_path):
        model, adapter = policy()
        train_trl(model, tokenizer, adapter, task, SMALL, folder=tmp_path)
        model, adapter = policy()
        with pytest.raises(ValueError, match=r"holds a run with learning_rate = 0.05, not 0.1; give another folder"):
            train_trl(model, tokenizer, adapter, task, replace(SMALL, learning_rate=0.1), folder=tmp_path)
        assert not adapter.vectors.any()


class TestModel:
    def test_afterwards_it_is_as_it_was(self, policy, make_model, tokenizer, task):
        model, adapter = policy()
        train_trl(model, tokenizer, adapter, task, replace(SMALL, steps=1))
        assert "forward" not in vars(model)  # a copy would call the original's
        assert not hasattr(model, "peft_config")
        assert not model.training
        twin = copy.deepcopy(model)
        adapter.detach()
        ids = torch.arange(6)[None]
        assert torch.equal(model(ids).logits, make_model()(ids).logits)
        assert not torch.equal(twin(ids).logits, model(ids).logits)

    def test_a_bfloat16_base_stays_as_it_was(self, make_model, tokenizer, task):
        model = make_model().bfloat16()
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        adapter = attach(model, CONFIG)
        train_trl(model, tokenizer, adapter, task, replace(SMALL, truncated="score", tis_cap=None))
        assert adapter.vectors.dtype == torch.float32
        assert adapter.vectors.abs().max() > 0.01
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], weight) for name, weight in before.items())

    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
    def test_recomputing_changes_nothing(self, policy, tokenizer, task):
        (plain, own), (saving, other) = policy(), policy()
        saving.gradient_checkpointing_enable({"use_reentrant": False})
        for model, adapter in ((plain, own), (saving, other)):
            train_trl(model, tokenizer, adapter, task, SMALL, sampler=ModelSampler(model, tokenizer))
        assert torch.allclose(own.vectors, other.vectors, atol=1e-5)

    def test_a_forward_pass_that_others_put_there_stays(self, policy, tokenizer, task):
        model, adapter = policy()
        plain, calls = model.forward, []

        def forward(*args, **kwargs):  # as accelerate hooks a model that is spread over devices
            calls.append(kwargs)
            return plain(*args, **kwargs)

        model.forward = forward
        train_trl(model, tokenizer, adapter, task, replace(SMALL, steps=1))
        assert model.forward is forward
        assert calls

    def test_an_adapter_on_the_head_is_refused(self, model, tokenizer, task):
        adapter = attach(model, TinyLoraConfig(rank=2, target_modules=["lm_head", "q_proj"]))
        with pytest.raises(ValueError, match="an adapter on it would not train"):
            train_trl(model, tokenizer, adapter, task, SMALL)

    def test_several_updates_from_a_batch_are_refused(self, policy, tokenizer, task):
        model, adapter = policy()
        with pytest.raises(ValueError, match="under TRL a step is one update of all its samples; set mini_batches=1"):
            train_trl(model, tokenizer, adapter, task, replace(SMALL, mini_batches=2))

    def test_a_gradient_that_is_not_finite_stops_it(self, policy, tokenizer, task):
        model, adapter = policy()
        adapter.vectors.register_hook(lambda gradient: gradient * torch.inf)
        with pytest.raises(FloatingPointError, match="the gradient is not finite"):
            train_trl(model, tokenizer, adapter, task, SMALL)
        assert not adapter.vectors.any()


def test_a_trainer_of_ones_own_takes_the_optimizer(policy, tokenizer, task, tmp_path):
    """The recipe of the page; TRL's default schedule brings the rate down to 0."""
    _model, adapter = policy()
    rows = [{"prompt": task.messages(example), "gold": example.gold} for example in task.train]
    with as_lora(adapter) as lora:
        optimizer = TinyLoraAdamW(lora.parameters(), lr=0.05, adapter=adapter, max_grad_norm=1.0)
        trainer = GRPOTrainer(
            model=lora,
            reward_funcs=lambda completion_ids, **_: [float(len(set(ids))) for ids in completion_ids],
            args=GRPOConfig(
                str(tmp_path),
                max_grad_norm=0.0,
                max_steps=3,
                per_device_train_batch_size=4,
                num_generations=4,
                max_completion_length=6,
                logging_steps=1,
                report_to="none",
                bf16=False,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            optimizers=(optimizer, None),
        )
        trainer.train()
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates == pytest.approx([0.05, 0.05 * 2 / 3, 0.05 / 3])
    assert adapter.vectors.abs().max() > 0.03
    saved = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt")["state"][0]["vectors"]
    assert torch.equal(saved, adapter.vectors)


class TestConfig:
    def test_what_settings_decide_is_not_given_twice(self):
        with pytest.raises(ValueError, match=r"beta, temperature cannot be given"):
            trl_config(SMALL, None, beta=0.1, temperature=0.5)

    def test_other_fields_pass(self):
        assert trl_config(SMALL, None, log_completions=True, logging_steps=7).logging_steps == 7

    def test_every_field_is_decided_or_may_be_given(self, monkeypatch):
        given = {}
        monkeypatch.setattr(GRPOConfig, "__init__", lambda self, **fields: given.update(fields))
        trl_config(SMALL, None)
        chosen = {"output_dir", "save_strategy", "save_steps", "save_total_limit", "logging_steps", "report_to"}
        chosen |= {name for name in given if "activation_checkpointing" in name or "gradient_checkpointing" in name}
        decided = given.keys() - chosen
        assert {"beta", "temperature", "top_k", "entropy_coef", "max_steps", "use_vllm", "weight_decay"} < decided
        for field in decided:
            with pytest.raises(ValueError, match=f"{field} cannot be given"):
                trl_config(SMALL, None, **{field: given[field]})
        trl_config(SMALL, None, **dict.fromkeys(chosen, "mine"))
        assert {name for name, value in given.items() if value == "mine"} == chosen

    def test_prompts_that_cannot_be_shared(self, policy, tokenizer, task, monkeypatch):
        model, adapter = policy()
        monkeypatch.setattr(distributed, "world_size", lambda: 3)
        with pytest.raises(ValueError, match="prompts_per_step=4 cannot be shared by 3 processes"):
            train_trl(model, tokenizer, adapter, task, SMALL)


class TestDrift:
    def test_an_older_one_is_refused(self, monkeypatch):
        monkeypatch.setattr("importlib.metadata.version", lambda _: "1.13.2")
        monkeypatch.delitem(sys.modules, "tinylora_lite.engines.trl")
        with pytest.raises(ImportError, match=r'trl 1.14 or newer: pip install "tinylora_lite\[train\]"'):
            importlib.import_module("tinylora_lite.engines.trl")

    def test_without_trl_the_error_says_what_brings_it(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "trl", None)
        monkeypatch.delitem(sys.modules, "tinylora_lite.engines.trl")
        with pytest.raises(ImportError, match=r'pip install "tinylora_lite\[train\]"'):
            importlib.import_module("tinylora_lite.engines.trl")

    def test_a_correction_that_is_left_out_is_noticed(self, policy, tokenizer, task, monkeypatch):
        model, adapter = policy()
        step = GRPOTrainer.training_step

        def without(trainer, *args, **kwargs):
            trainer.vllm_importance_sampling_correction = False
            return step(trainer, *args, **kwargs)

        monkeypatch.setattr(GRPOTrainer, "training_step", without)
        with pytest.raises(RuntimeError, match="does not correct for the sampler"):
            train_trl(model, tokenizer, adapter, task, SMALL, sampler=ModelSampler(model, tokenizer))


@pytest.mark.slow
def test_both_loops_learn_the_same_within_the_spread_of_seeds():
    from benchmarks.trl_runs import one_run

    own, trl = ([fmean(one_run(way, seed)["reward"][-5:]) for seed in range(3)] for way in ("own", "trl"))
    assert min(own + trl) > 0.7, (own, trl)  # 0.3 before training
    error = ((variance(own) + variance(trl)) / 3) ** 0.5
    assert abs(fmean(own) - fmean(trl)) < 4.6 * error, (own, trl)  # Student's t, 4 degrees of freedom, 99 %
