"""Training: it learns, it resumes to the same numbers, it stops where it must, and it leaves the model as it was."""

import copy
import dataclasses
import math
from contextlib import nullcontext

import pytest
import torch

import tinylora_lite as tl
from tinylora_lite import Example, GRPOSettings, Run, Task, train_grpo
from tinylora_lite.evaluation.evaluate import evaluate
from tinylora_lite.sampling.logprobs import completion_logprobs
from tinylora_lite.sampling.rollouts import Rollouts
from tinylora_lite.training.batches import draw_prompts, rollout, score
from tinylora_lite.training.grpo import GRPO
from tinylora_lite.training.loop import update

QUICK = GRPOSettings(
    steps=6,
    prompts_per_step=3,
    group_size=4,
    max_new_tokens=4,
    learning_rate=0.05,
    truncated="score",
    micro_batch=5,
    save_every=2,
)


@pytest.fixture
def adapter(model):
    return tl.attach(model, tl.lora_xs(4))


def update_once(model, tokenizer, adapter, optimizer, batch, settings) -> dict[str, float]:
    """One update from completions and their advantages, without a task's rewards."""
    task = Task("none", [Example("", "")], [], [], lambda text, gold: 0.0)
    objective = GRPO(model, tokenizer, adapter, task, [settings])
    (row,) = update(objective, optimizer, objective.weighed(*batch))
    return row


def without_time(run: Run) -> list[dict]:
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in run.steps]


LEARNING = {"steps": 30, "prompts_per_step": 8, "max_new_tokens": 4, "learning_rate": 0.02, "truncated": "score"}


class TestLearning:
    @pytest.mark.parametrize("variant", ["grpo", "dr_grpo", "dapo"])
    def test_an_adapter_learns(self, model, tokenizer, numbers, variant):
        adapter = tl.attach(model, tl.lora_xs(16))
        base = {name: p.clone() for name, p in model.state_dict().items()}
        run = train_grpo(model, tokenizer, adapter, numbers, GRPOSettings.variant(variant, **LEARNING))
        assert run.curve()[0] < 0.7
        assert sum(run.curve()[-5:]) / 5 > 0.8
        assert all(torch.equal(base[name], p) for name, p in model.state_dict().items())

    def test_all_weights_learn(self, model, tokenizer, numbers):
        settings = GRPOSettings(**LEARNING | {"learning_rate": 0.01, "steps": 20})
        run = train_grpo(model, tokenizer, None, numbers, settings)
        assert run.curve()[0] < 0.7
        assert sum(run.curve()[-5:]) / 5 > 0.95
        assert (run.adapter, run.parameters) == ({"kind": "all weights"}, sum(p.numel() for p in model.parameters()))

    def test_several_epochs_clip(self, model, tokenizer, adapter, numbers):
        settings = dataclasses.replace(QUICK, epochs_per_step=3, learning_rate=0.3, steps=2)
        run = train_grpo(model, tokenizer, adapter, numbers, settings)
        assert 0 < run.curve("clipped")[0] < 1
        once = dataclasses.replace(settings, epochs_per_step=1)
        assert train_grpo(model, tokenizer, adapter, numbers, once).curve("clipped") == [0.0, 0.0]

    def test_equal_rewards_move_nothing_even_with_momentum(self, model, tokenizer, adapter, numbers):
        optimizer = torch.optim.Adam([adapter.vectors], lr=0.1)
        examples = draw_prompts(numbers.train, QUICK, 0)
        rollouts = rollout(model, tokenizer, numbers, examples, QUICK, 0)
        advantages = tl.grpo_advantages(score(rollouts, numbers, examples, QUICK)).flatten()
        update_once(model, tokenizer, adapter, optimizer, (rollouts, advantages), QUICK)
        moved = adapter.vectors.clone()
        assert moved.any()
        row = update_once(model, tokenizer, adapter, optimizer, (rollouts, torch.zeros(12)), QUICK)
        assert set(row.values()) == {0.0}
        assert torch.equal(adapter.vectors, moved)

    def test_micro_batches_change_rounding_only(self, make_model, tokenizer, numbers):
        found = []
        for size in (1, 5, 64):
            model = make_model()
            adapter = tl.attach(model, tl.lora_xs(4))
            train_grpo(model, tokenizer, adapter, numbers, dataclasses.replace(QUICK, steps=2, micro_batch=size))
            found.append(adapter.vectors.detach())
        assert torch.allclose(found[0], found[1], atol=1e-4)
        assert torch.allclose(found[0], found[2], atol=1e-4)


class TestUpdate:
    @pytest.fixture
    def batch(self, model, tokenizer, adapter, numbers):
        model.generation_config.eos_token_id = list(range(100, len(tokenizer)))
        rollouts = rollout(model, tokenizer, numbers, draw_prompts(numbers.train, QUICK, 0), QUICK, 0)
        assert 0 < int(rollouts.truncated.sum()) < len(rollouts)
        return rollouts, torch.linspace(-1, 1, len(rollouts))

    def gradient(self, model, tokenizer, adapter, batch, **settings) -> torch.Tensor:
        """Plain gradient descent with lr 1, so that the step is minus the gradient."""
        with torch.no_grad():
            adapter.vectors.zero_()
        options = {"max_grad_norm": 1e9, "micro_batch": 4} | settings
        optimizer = torch.optim.SGD([adapter.vectors], lr=1.0)
        update_once(model, tokenizer, adapter, optimizer, batch, dataclasses.replace(QUICK, **options))
        return -adapter.vectors.detach().clone()

    @pytest.mark.parametrize("normalise", ["token", "sequence", "constant"])
    def test_the_step_is_the_policy_gradient(self, model, tokenizer, adapter, batch, normalise):
        rollouts, advantages = batch
        mask = rollouts.completion_mask
        weights = {
            "token": mask / mask.sum(),
            "sequence": mask / mask.sum(dim=1, keepdim=True) / len(mask),
            "constant": mask / (len(mask) * QUICK.max_new_tokens),
        }[normalise]
        objective = -(completion_logprobs(model, rollouts) * weights * advantages[:, None]).sum()
        (expected,) = torch.autograd.grad(objective, adapter.vectors)
        assert torch.allclose(self.gradient(model, tokenizer, adapter, batch, normalise=normalise), expected, atol=1e-5)

    def test_masked_rows_take_no_part(self, model, tokenizer, adapter, batch):
        rollouts, advantages = batch
        whole = ~rollouts.truncated
        kept = (rollouts.rows(whole.nonzero()[:, 0]), advantages[whole])
        masked = self.gradient(model, tokenizer, adapter, batch, truncated="mask")
        assert torch.allclose(masked, self.gradient(model, tokenizer, adapter, kept, truncated="score"), atol=1e-6)
        assert not torch.allclose(masked, self.gradient(model, tokenizer, adapter, batch, truncated="zero"), atol=1e-4)

    def test_gradients_are_shortened(self, model, tokenizer, adapter, batch):
        optimizer = torch.optim.SGD([adapter.vectors], lr=1.0)
        settings = dataclasses.replace(QUICK, max_grad_norm=1e-3)
        norm = update_once(model, tokenizer, adapter, optimizer, batch, settings)["gradient_norm"]
        assert norm > 1e-2
        assert adapter.vectors.norm().item() == pytest.approx(1e-3, rel=1e-3)

    def test_the_penalty_pulls_towards_the_base(self, model, tokenizer, adapter, batch):
        rollouts, advantages = batch
        silent = (rollouts, torch.zeros_like(advantages))
        assert self.gradient(model, tokenizer, adapter, silent, kl=1.0).abs().max() < 1e-6, "at the base it is zero"
        with torch.no_grad():
            adapter.vectors.fill_(0.1)
        optimizer = torch.optim.SGD([adapter.vectors], lr=0.02)
        mask = rollouts.completion_mask
        with adapter.disabled():
            base = completion_logprobs(model, rollouts).detach()

        def divergence() -> float:
            gap = base - completion_logprobs(model, rollouts).detach()
            return float(((gap.exp() - gap - 1) * mask).sum())

        before = divergence()
        update_once(model, tokenizer, adapter, optimizer, silent, dataclasses.replace(QUICK, kl=1.0))
        assert divergence() < 0.95 * before

    def test_the_sampler_is_corrected_for(self, model, tokenizer, adapter, batch):
        rollouts, advantages = batch
        unlikely = dataclasses.replace(rollouts, logprobs=rollouts.logprobs + math.log(4))
        plain = self.gradient(model, tokenizer, adapter, batch)
        assert torch.allclose(self.gradient(model, tokenizer, adapter, (unlikely, advantages)), plain / 4, atol=1e-6)
        assert torch.allclose(
            self.gradient(model, tokenizer, adapter, (unlikely, advantages), tis_cap=None), plain, atol=1e-6
        )

    def test_a_small_gradient_survives_float16(self, make_model, tokenizer, numbers):
        """Divided by the count of a large batch, in float16 it would be rounded to nothing on its way back."""
        gradients = {}
        settings = dataclasses.replace(QUICK, normalise="constant", max_new_tokens=4, max_grad_norm=1e9)
        for dtype in (torch.float32, torch.float16):
            model = make_model()
            adapter = tl.attach(model, tl.TinyLoraConfig(rank=2, u=2))
            examples = draw_prompts(numbers.train, settings, 0)
            rollouts = rollout(model, tokenizer, numbers, examples, settings, 0)
            advantages = tl.grpo_advantages(score(rollouts, numbers, examples, settings)).flatten()
            model.to(dtype)
            optimizer = torch.optim.Adam([adapter.vectors], lr=1e-3)
            large = dataclasses.replace(settings, max_new_tokens=10**6)
            update_once(model, tokenizer, adapter, optimizer, (rollouts, advantages), large)
            gradients[dtype] = adapter.vectors.grad.clone()
        one, other = gradients.values()
        assert (one - other).norm() < 0.05 * one.norm()

    def test_a_short_completion_beside_a_long_one_stays_within_float16(self, make_model, tokenizer):
        ids = torch.full((2, 128), 5)
        mask = torch.ones_like(ids)
        mask[0, 1:] = 0
        zeros, prompt = torch.zeros(2, 128), torch.full((2, 3), 7)
        cut = torch.zeros(2, dtype=torch.bool)
        rollouts = Rollouts(prompt, torch.ones_like(prompt), ids, mask, zeros, zeros, cut, ["", ""])
        settings = dataclasses.replace(QUICK, normalise="sequence", tis_cap=None, max_grad_norm=1e9)
        gradients = []
        for dtype in (torch.float32, torch.float16):
            model = make_model()
            adapter = tl.attach(model, tl.TinyLoraConfig(rank=2, u=2))
            model.to(dtype)
            optimizer = torch.optim.Adam([adapter.vectors], lr=1e-3)
            update_once(model, tokenizer, adapter, optimizer, (rollouts, torch.tensor([1000.0, -1000.0])), settings)
            gradients.append(adapter.vectors.grad.clone())
        assert (gradients[0] - gradients[1]).norm() < 0.05 * gradients[0].norm()

    def test_a_gradient_that_is_not_finite_is_not_taken(self, model, tokenizer, adapter, batch):
        rollouts, advantages = batch
        before = adapter.vectors.clone()
        optimizer = torch.optim.Adam([adapter.vectors])
        with pytest.raises(FloatingPointError, match="not finite"):
            update_once(model, tokenizer, adapter, optimizer, (rollouts, advantages * torch.inf), QUICK)
        assert torch.equal(adapter.vectors, before)


class TestResume:
    @pytest.mark.parametrize("step", [1, 2, 3, 5, 6])
    @pytest.mark.parametrize("what", ["adapter", "all weights", "all weights with a penalty"])
    def test_interrupted_or_not(self, make_model, tokenizer, numbers, tmp_path, step, what, interrupt_at):
        kl = 0.1 if "penalty" in what else 0.0
        settings = dataclasses.replace(QUICK, evaluate_every=3, evaluate_problems=4, kl=kl, warmup=2)
        if what != "adapter":
            settings = dataclasses.replace(settings, learning_rate=1e-3)

        def train(folder, **options):
            model = make_model()
            adapter = tl.attach(model, tl.lora_xs(4)) if what == "adapter" else None
            run = train_grpo(model, tokenizer, adapter, numbers, settings, folder=folder, **options)
            return run, [adapter.vectors] if adapter else list(model.parameters())

        through, expected = train(None)
        with pytest.raises(InterruptedError):
            train(tmp_path, on_step=interrupt_at(step))
        resumed, found = train(tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert without_time(resumed) == without_time(through)
        assert resumed.evaluations == through.evaluations
        assert len(resumed.evaluations) == 2
        seconds = [*resumed.curve("seconds"), resumed.seconds]
        assert seconds == sorted(seconds)
        assert Run.load(tmp_path / "run.json") == resumed
        assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "run.json"]

    def test_a_finished_run_is_not_run_again(self, model, tokenizer, adapter, numbers, tmp_path, interrupt_at):
        first = train_grpo(model, tokenizer, adapter, numbers, QUICK, folder=tmp_path)
        again = train_grpo(model, tokenizer, adapter, numbers, QUICK, folder=tmp_path, on_step=interrupt_at(1))
        assert again == first

    def test_another_adapter_does_not_go_on(self, model, tokenizer, numbers, tmp_path):
        settings = dataclasses.replace(QUICK, steps=1)
        for seed in (0, 1):
            adapter = tl.attach(model, tl.TinyLoraConfig(seed=seed))
            refused = pytest.raises(ValueError, match="seed = 0, not 1") if seed else nullcontext()
            with refused:
                train_grpo(model, tokenizer, adapter, numbers, settings, folder=tmp_path)
            adapter.detach()

    def test_more_steps_go_on(self, make_model, tokenizer, numbers, tmp_path):
        found = []
        for stops in ([6], [3, 6]):
            for steps in stops:
                model = make_model()
                adapter = tl.attach(model, tl.lora_xs(4))
                settings = dataclasses.replace(QUICK, steps=steps)
                folder = tmp_path / str(len(stops))
                train_grpo(model, tokenizer, adapter, numbers, settings, folder=folder)
            found.append(adapter.vectors)
        assert torch.equal(*found)


class TestRefusals:
    @pytest.mark.parametrize("attribute", ["pad_token", "eos_token", "chat_template"])
    def test_a_tokenizer_that_lacks_something(self, model, tokenizer, adapter, numbers, attribute):
        lacking = copy.deepcopy(tokenizer)
        setattr(lacking, attribute, None)
        with pytest.raises(ValueError, match=f"set tokenizer.{attribute}"):
            train_grpo(model, lacking, adapter, numbers, QUICK)
        with pytest.raises(ValueError, match=f"set tokenizer.{attribute}"):
            evaluate(model, lacking, numbers)

    def test_empty_splits(self, model, tokenizer, adapter, numbers):
        with pytest.raises(ValueError, match="no training problems"):
            train_grpo(model, tokenizer, adapter, dataclasses.replace(numbers, train=[]), QUICK)
        settings = dataclasses.replace(QUICK, evaluate_every=1)
        with pytest.raises(ValueError, match="evaluate_every=0"):
            train_grpo(model, tokenizer, adapter, dataclasses.replace(numbers, validation=[]), settings)

    @pytest.mark.parametrize("worth", [math.nan, None, "1.0"])
    def test_a_bad_reward_before_training(self, model, tokenizer, adapter, numbers, worth):
        bad = dataclasses.replace(numbers, reward=lambda text, gold: worth)
        model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
        with pytest.raises(ValueError, match="must return a finite number"):
            train_grpo(model, tokenizer, adapter, bad, QUICK)

    def test_a_bad_reward_in_training_undoes_nothing_and_moves_nothing(self, model, tokenizer, adapter, numbers):
        calls, at_step = [], []

        def reward(text, gold):
            calls.append(text)
            return math.nan if len(calls) > 30 else numbers.reward(text, gold)  # the third step of twelve rewards

        with pytest.raises(ValueError, match="must return a finite number"):
            train_grpo(
                model,
                tokenizer,
                adapter,
                dataclasses.replace(numbers, reward=reward),
                QUICK,
                on_step=lambda run: at_step.append(adapter.vectors.detach().clone()),
            )
        assert len(at_step) == 2
        assert torch.equal(adapter.vectors, at_step[-1])

    def test_an_adapter_of_another_model(self, make_model, tokenizer, adapter, numbers):
        other = make_model(seed=1)
        with pytest.raises(ValueError, match="not attached to this model"):
            train_grpo(other, tokenizer, adapter, numbers, QUICK)

    def test_something_that_is_no_adapter(self, model, tokenizer, numbers):
        with pytest.raises(ValueError, match=r"not attached to this model; pass what attach\(\) or "):
            train_grpo(model, tokenizer, "x", numbers, QUICK)

    def test_a_detached_adapter(self, model, tokenizer, adapter, numbers):
        adapter.detach()
        with pytest.raises(ValueError, match="not attached to this model"):
            train_grpo(model, tokenizer, adapter, numbers, QUICK)

    def test_all_weights_under_an_adapter(self, model, tokenizer, adapter, numbers):
        with pytest.raises(ValueError, match="carries an adapter"):
            train_grpo(model, tokenizer, None, numbers, QUICK)


class TestTheModelAfterwards:
    @pytest.mark.parametrize("stopped", [False, True])
    @pytest.mark.parametrize("training", [False, True])
    def test_flags_and_modes_come_back(self, model, tokenizer, numbers, stopped, training, interrupt_at):
        model.train(training)
        model.model.embed_tokens.requires_grad_(False)
        flags = [p.requires_grad for p in model.parameters()]
        frozen = model.model.embed_tokens.weight.clone()
        try:
            train_grpo(model, tokenizer, None, numbers, QUICK, on_step=interrupt_at(1 if stopped else 99))
        except InterruptedError:
            assert stopped
        assert [p.requires_grad for p in model.parameters()] == flags
        assert model.training is training
        assert not torch.equal(model.model.embed_tokens.weight, frozen), "all weights are all weights"

    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
    @pytest.mark.parametrize("recompute", [False, True])
    def test_dropout_is_off(self, make_model, tokenizer, numbers, recompute):
        found = []
        for dropout in (0.0, 0.9):
            model = make_model("llama", attention_dropout=dropout).train()
            if recompute:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            adapter = tl.attach(model, tl.lora_xs(4))
            train_grpo(model, tokenizer, adapter, numbers, dataclasses.replace(QUICK, steps=2))
            found.append(adapter.vectors)
        assert torch.equal(*found)

    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
    def test_gradient_checkpointing_is_used(self, make_model, tokenizer, numbers):
        found, passes = [], []
        for recompute in (False, True):
            model = make_model()
            if recompute:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            count = [0]
            model.model.layers[0].self_attn.register_forward_hook(
                lambda *_, count=count: count.__setitem__(0, count[0] + 1)
            )
            adapter = tl.attach(model, tl.lora_xs(4))
            settings = dataclasses.replace(QUICK, steps=1, micro_batch=64)
            train_grpo(model, tokenizer, adapter, numbers, settings)
            found.append(adapter.vectors.detach())
            passes.append(count[0])
        assert torch.allclose(*found, atol=1e-3)
        assert passes == [4 + 2, 4 + 2], "prompt and completions apart, or once and once again"


class TestPromptsAndRows:
    def test_every_problem_once_before_any_twice(self, task):
        settings = dataclasses.replace(QUICK, prompts_per_step=5)  # 12 problems: epochs end inside a step
        drawn = [example.gold for step in range(12) for example in draw_prompts(task.train, settings, step)]
        everything = sorted(example.gold for example in task.train)
        epochs = [drawn[first : first + 12] for first in range(0, 60, 12)]
        assert all(sorted(epoch) == everything for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 5, "each epoch has an order of its own"

    def test_seeds_order_prompts_and_draw_samples(self, model, tokenizer, task):
        other = dataclasses.replace(QUICK, seed=1)
        assert draw_prompts(task.train, QUICK, 0) == draw_prompts(task.train, QUICK, 0)
        assert draw_prompts(task.train, QUICK, 0) != draw_prompts(task.train, other, 0)
        examples = task.train[:2]
        texts = {
            (settings.seed, step): tuple(rollout(model, tokenizer, task, examples, settings, step).texts)
            for settings in (QUICK, other)
            for step in range(3)
        }
        assert len(set(texts.values())) == 6

    def test_fewer_problems_than_a_step_takes(self):
        drawn = draw_prompts([Example("a", "1"), Example("b", "2")], QUICK, 0)
        assert len(drawn) == 3

    @pytest.mark.parametrize(("truncated", "worth"), [("zero", 0.0), ("mask", 0.0), ("score", 1.0)])
    def test_truncated_completions(self, model, tokenizer, numbers, truncated, worth):
        model.generation_config.eos_token_id = list(range(100, len(tokenizer)))
        settings = dataclasses.replace(QUICK, truncated=truncated)
        examples = draw_prompts(numbers.train, settings, 0)
        rollouts = rollout(model, tokenizer, numbers, examples, settings, 0)
        generous = dataclasses.replace(numbers, reward=lambda text, gold: 1.0)
        rewards = score(rollouts, generous, examples, settings)
        assert rewards.shape == (3, 4)
        assert torch.equal(rewards.flatten(), torch.where(rollouts.truncated, worth, 1.0))

    def test_golds_stand_beside_their_completions(self, model, tokenizer, numbers):
        examples = draw_prompts(numbers.train, QUICK, 0)
        rollouts = rollout(model, tokenizer, numbers, examples, QUICK, 0)
        by_gold = dataclasses.replace(numbers, reward=lambda text, gold: float(gold))
        expected = [[float(example.gold)] * 4 for example in examples]
        assert score(rollouts, by_gold, examples, QUICK).tolist() == expected

    def test_a_row_says_what_happened(self, model, tokenizer, adapter, numbers):
        rows = []
        settings = dataclasses.replace(QUICK, warmup=1, evaluate_every=6, evaluate_problems=4)
        run = train_grpo(model, tokenizer, adapter, numbers, settings, on_step=lambda run: rows.append(len(run.steps)))
        assert rows == [1, 2, 3, 4, 5, 6] == run.curve("step")
        for row in run.steps:
            assert 0 <= row["reward"] <= 1
            assert 1 <= row["length"] <= 4
            assert 0 < row["entropy"] <= math.log(len(tokenizer))
            assert row["clipped"] == 0
            assert row["gradient_norm"] > 0
        assert run.steps[-1]["norm"] == pytest.approx(adapter.vectors.norm().item())
        (row,) = run.evaluations
        assert (row["step"], row["n"], row["samples"]) == (6, 4, 1)
        assert (run.method, run.task, run.seed, run.parameters) == ("grpo", "numbers", 0, 14 * 16)

    def test_nothing_is_printed(self, model, tokenizer, adapter, numbers, capfd):
        train_grpo(model, tokenizer, adapter, numbers, dataclasses.replace(QUICK, steps=1))
        assert capfd.readouterr() == ("", "")
