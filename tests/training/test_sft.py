"""Imitation: the loss is cross-entropy of the answers alone, training resumes to the bit, and it learns."""

import copy
import dataclasses
import doctest
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import tinylora_lite as tl
from tinylora_lite import Example, Run, SFTSettings, Task, nano, train_sft
from tinylora_lite.nano.task import formatted, lenient_reward, reward
from tinylora_lite.sampling.rollouts import encode_prompts
from tinylora_lite.training.sft import SFT, encode_solutions, solution_loss

QUICK = SFTSettings(steps=6, prompts_per_step=5, learning_rate=0.05, micro_batch=2, save_every=2, max_new_tokens=20)
ANSWERS = ("tom has 3.", "1 + 2 = 3. #### 3", "so the answer is 7.", "#### 9")


@pytest.fixture(scope="module")
def worked(task) -> Task:
    """The examples of ``task`` with worked answers of different lengths."""

    def answered(examples) -> list[Example]:
        return [dataclasses.replace(e, solution=ANSWERS[i % len(ANSWERS)]) for i, e in enumerate(examples)]

    return dataclasses.replace(task, train=answered(task.train), validation=answered(task.validation))


@pytest.fixture
def adapter(model):
    return tl.attach(model, tl.lora_xs(4))


def by_hand(model, tokenizer, task, examples) -> torch.Tensor:
    """Mean cross-entropy over the answers' tokens: one conversation at a time, whole, without padding or cache."""
    losses = []
    for example in examples:
        messages = [*task.messages(example), {"role": "assistant", "content": example.solution}]
        ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), return_tensors="pt")["input_ids"]
        assert ids[0, -1] == tokenizer.eos_token_id
        start = ids[0].tolist().index(tokenizer.convert_tokens_to_ids("<|assistant|>")) + 1
        logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1]
        losses.append(cross_entropy(logits, ids[0, start:], reduction="none"))
    return torch.cat(losses).mean()


class TestLoss:
    def test_it_is_cross_entropy_of_the_answers(self, model, tokenizer, worked):
        expected = by_hand(model, tokenizer, worked, worked.train).item()
        for size in (1, 5, 64):
            assert solution_loss(model, tokenizer, worked, worked.train, size) == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize("micro_batch", [2, 64])
    def test_the_first_step_follows_its_gradient(self, model, tokenizer, adapter, worked, micro_batch):
        settings = dataclasses.replace(
            QUICK, steps=1, prompts_per_step=12, micro_batch=micro_batch, max_grad_norm=1e9, warmup=4
        )
        loss = by_hand(model, tokenizer, worked, worked.train)
        (gradient,) = torch.autograd.grad(loss, adapter.vectors)
        run = train_sft(model, tokenizer, adapter, worked, settings)
        (row,) = run.steps
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert row["gradient_norm"] == pytest.approx(gradient.norm().item(), rel=1e-4)
        assert row["learning_rate"] == pytest.approx(0.05 / 5)
        # Adam's first step: the learning rate times the gradient over its own size.
        expected = -0.01 * gradient / (gradient.abs() + 1e-8)
        large = gradient.abs() > 1e-4
        assert large.float().mean() > 0.9
        assert torch.allclose(adapter.vectors.detach()[large], expected[large], atol=1e-4)

    def test_long_gradients_are_shortened(self, model, tokenizer, adapter, worked):
        """Adam's first step cannot tell; its memory of the gradient can, and the record tells the length before."""
        seen = []
        adapter.vectors.register_post_accumulate_grad_hook(lambda v: seen.append(v.grad))
        settings = dataclasses.replace(QUICK, steps=1, micro_batch=64, max_grad_norm=1e-3)
        run = train_sft(model, tokenizer, adapter, worked, settings)
        assert run.curve("gradient_norm")[0] > 1e-3
        assert seen[-1].norm().item() == pytest.approx(1e-3, rel=1e-3)


class TestRows:
    def test_prompts_are_those_of_sampling(self, tokenizer, worked):
        rows = encode_solutions(tokenizer, worked, worked.train)
        ids, mask = encode_prompts(tokenizer, worked, worked.train)
        assert torch.equal(rows.prompt_ids, ids)
        assert torch.equal(rows.prompt_mask, mask)
        assert rows.texts == [e.solution for e in worked.train]
        for row, kept, example in zip(rows.completion_ids, rows.completion_mask.bool(), worked.train, strict=True):
            assert row[kept][-1] == tokenizer.eos_token_id
            assert tokenizer.decode(row[kept][:-1]) == f" {example.solution}", "this template puts a space between"
            assert (row[~kept] == tokenizer.pad_token_id).all()

    @pytest.mark.parametrize(
        ("between", "content"),
        [("\n", "{{ m.content }}"), ("\n", " ok,{{ m.content }}"), ("", "{{ m.content|upper }}")],
    )
    def test_what_a_template_puts_between_belongs_to_the_answer(self, tokenizer, worked, between, content):
        other = copy.deepcopy(tokenizer)
        other.chat_template = (
            "{% for m in messages %}<|{{ m.role }}|>"
            f"{between}{{% if m.role == 'assistant' %}}{content}{{% else %}}{{{{ m.content }}}}{{% endif %}}<|end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|assistant|>" + between + "{% endif %}"
        )
        example = dataclasses.replace(worked.train[0], solution=" tom has 3.\n")
        rows = encode_solutions(other, worked, [example])
        lead = " ok," if "ok" in content else ""
        expected = other(f"{lead}tom has 3.", add_special_tokens=False)["input_ids"] + [other.eos_token_id]
        assert rows.completion_ids[0].tolist() == expected

    def test_an_example_without_a_worked_answer(self, model, tokenizer, task):
        with pytest.raises(ValueError, match=r"no worked answer; give Example\(\.\.\., solution"):
            solution_loss(model, tokenizer, task, task.train)


def without_time(run: Run) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in run.steps]


class TestRun:
    @pytest.mark.parametrize("whole", [False, True], ids=["adapter", "all weights"])
    def test_an_interrupted_run_comes_to_the_same_numbers(
        self, make_model, tokenizer, worked, tmp_path, whole, interrupt_at
    ):
        settings = dataclasses.replace(QUICK, schedule="linear", evaluate_every=3, evaluate_accuracy=True)
        found = []
        for stop in (None, 3, 5):
            model = make_model()
            adapter = None if whole else tl.attach(model, tl.lora_xs(4))
            folder = tmp_path / str(stop)
            if stop is not None:
                with pytest.raises(InterruptedError):
                    train_sft(model, tokenizer, adapter, worked, settings, folder=folder, on_step=interrupt_at(stop))
                model = make_model()
                adapter = None if whole else tl.attach(model, tl.lora_xs(4))
            run = train_sft(model, tokenizer, adapter, worked, settings, folder=folder)
            assert Run.load(folder / "run.json") == run
            numbers = list(model.parameters()) if adapter is None else [adapter.vectors]
            found.append((without_time(run), run.evaluations, [p.detach().clone() for p in numbers]))
        for steps, evaluations, numbers in found[1:]:
            assert (steps, evaluations) == found[0][:2]
            assert all(torch.equal(p, q) for p, q in zip(numbers, found[0][2], strict=True))

    def test_the_record(self, model, tokenizer, adapter, worked):
        settings = dataclasses.replace(QUICK, evaluate_every=3, evaluate_problems=4)
        before = solution_loss(model, tokenizer, worked, worked.validation[:4])
        run = train_sft(model, tokenizer, adapter, worked, settings)
        assert (run.method, run.task, run.parameters) == ("sft", "tiny", adapter.num_parameters)
        assert run.settings == dataclasses.asdict(settings)
        assert [row["step"] for row in run.evaluations] == [3, 6]
        after = solution_loss(model, tokenizer, worked, worked.validation[:4])
        assert run.evaluations[-1] == {"step": 6, "loss": pytest.approx(after)}
        assert after < before
        assert run.curve("norm")[-1] == pytest.approx(adapter.vectors.norm().item())
        assert all(4 < length < 10 for length in run.curve("length"))

    def test_the_base_and_its_flags_stay_as_they_were(self, model, tokenizer, worked):
        model.train()
        base = {name: p.clone() for name, p in model.state_dict().items()}
        adapter = tl.attach(model, tl.lora_xs(4))
        train_sft(model, tokenizer, adapter, worked, dataclasses.replace(QUICK, steps=2))
        assert all(torch.equal(base[name], p) for name, p in model.state_dict().items())
        assert model.training
        adapter.detach()
        assert all(p.requires_grad for p in model.parameters())

    def test_all_weights_learn_by_heart(self, model, tokenizer, worked):
        same = dataclasses.replace(worked, train=[dataclasses.replace(e, solution=ANSWERS[1]) for e in worked.train])
        run = train_sft(model, tokenizer, None, same, dataclasses.replace(QUICK, steps=25, learning_rate=0.01))
        assert (run.adapter, run.parameters) == ({"kind": "all weights"}, sum(p.numel() for p in model.parameters()))
        assert run.curve("loss")[0] > 3
        assert run.curve("loss")[-1] < 0.1
        score = tl.evaluate(model, tokenizer, same, temperature=0, max_new_tokens=20)
        assert {c.text for c in score.completions} == {ANSWERS[1]}

    def test_a_sampler_answers_in_evaluations(self, model, tokenizer, adapter, worked, monkeypatch):
        monkeypatch.setattr(SFT, "check_sampler", lambda self: None)
        asked = []

        class Sampler:
            def sync(self, adapter) -> None:
                asked.append(adapter)

            def sample(self, prompt_ids, prompt_mask, **options):
                raise InterruptedError

        settings = dataclasses.replace(QUICK, evaluate_every=1, evaluate_accuracy=True)
        with pytest.raises(InterruptedError):
            train_sft(model, tokenizer, adapter, worked, settings, sampler=Sampler())
        assert asked == [adapter]


class TestRefusals:
    def bad(self, worked, split="train", place=2, **changes) -> Task:
        examples = list(getattr(worked, split))
        examples[place] = dataclasses.replace(examples[place], **changes)
        return dataclasses.replace(worked, **{split: examples})

    def refuse(self, model, tokenizer, adapter, task, match, **settings):
        model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
        with pytest.raises(ValueError, match=match) as error:
            train_sft(model, tokenizer, adapter, task, dataclasses.replace(QUICK, **settings))
        assert "\n" not in str(error.value)

    def test_an_example_without_a_solution(self, model, tokenizer, adapter, worked):
        task = self.bad(worked, solution=None)
        self.refuse(model, tokenizer, adapter, task, r"training problem 3 of task tiny has no worked answer.*solution=")

    def test_in_validation_only_where_it_is_used(self, model, tokenizer, adapter, worked):
        task = self.bad(worked, "validation", 5, solution=None)
        train_sft(model, tokenizer, adapter, task, dataclasses.replace(QUICK, steps=1))
        options = {"evaluate_every": 1, "steps": 1}
        train_sft(model, tokenizer, adapter, task, dataclasses.replace(QUICK, evaluate_problems=5, **options))
        self.refuse(model, tokenizer, adapter, task, "validation problem 6 .*evaluate_every=0", **options)

    def test_a_solution_that_is_too_long(self, model, tokenizer, adapter, worked):
        task = self.bad(worked, solution="tom has 3. " * 10)
        self.refuse(
            model, tokenizer, adapter, task, "problem 3 of task tiny has 41 tokens, more than max_new_tokens=20"
        )

    def test_no_problems(self, model, tokenizer, adapter, worked):
        empty = dataclasses.replace(worked, train=[], validation=[])
        self.refuse(model, tokenizer, adapter, empty, "no training problems")
        empty = dataclasses.replace(worked, validation=[])
        self.refuse(model, tokenizer, adapter, empty, "no validation problems; set evaluate_every=0", evaluate_every=1)

    def test_an_adapter_of_another_model(self, model, make_model, tokenizer, worked):
        adapter = tl.attach(make_model(), tl.lora_xs(2))
        self.refuse(model, tokenizer, adapter, worked, "not attached to this model")

    def test_another_run_s_folder(self, model, tokenizer, adapter, worked, tmp_path):
        train_sft(model, tokenizer, adapter, worked, dataclasses.replace(QUICK, steps=1), folder=tmp_path)
        with pytest.raises(ValueError, match="seed = 0, not 1"):
            train_sft(model, tokenizer, adapter, worked, dataclasses.replace(QUICK, seed=1), folder=tmp_path)

    def test_a_loss_that_is_not_finite(self, model, tokenizer, adapter, worked):
        with torch.no_grad():
            adapter.vectors += 1e30
        before = adapter.vectors.detach().clone()
        with pytest.raises(FloatingPointError, match="lower the learning rate"):
            train_sft(model, tokenizer, adapter, worked, QUICK)
        assert torch.equal(adapter.vectors, before)


class TestSettings:
    def test_worked_example(self):
        assert doctest.testmod(sys.modules["tinylora_lite.training.settings"]).failed == 0

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"steps": 0}, "steps must be an integer of at least 1"),
            ({"prompts_per_step": 2.0}, "prompts_per_step must be an integer"),
            ({"warmup": True}, "warmup must be an integer"),
            ({"seed": -1}, "seed must be"),
            ({"learning_rate": 0.0}, "learning_rate must be a finite number above 0"),
            ({"learning_rate": None}, "learning_rate must be a finite number above 0"),
            ({"epochs": -1}, "epochs must be a finite number above 0"),
            ({"temperature": -0.1}, "temperature must be a finite number of at least 0"),
            ({"schedule": "cosine"}, "schedule must be one of constant, linear"),
        ],
    )
    def test_ranges(self, change, match):
        with pytest.raises(ValueError, match=match):
            SFTSettings(**change)

    def test_epochs_become_steps(self, model, tokenizer, adapter, worked):
        run = train_sft(model, tokenizer, adapter, worked, dataclasses.replace(QUICK, epochs=2))
        assert len(run.steps) == run.settings["steps"] == 4  # of 5 answers, from 2 · 12

    def test_rates(self):
        settings = SFTSettings(steps=4, warmup=1, schedule="linear", learning_rate=1.0)
        assert [settings.learning_rate_at(step) for step in range(4)] == [0.5, 0.75, 0.5, 0.25]


class TestNano:
    def test_its_solutions_are_right_and_fit(self):
        task = nano.task(200, 50, 50)
        for example in (*task.train, *task.validation, *task.test):
            assert reward(example.solution, example.gold) == lenient_reward(example.solution, example.gold) == 1.0
            assert formatted(example.solution)
            *steps, answer = example.solution.replace(" #### ", "").rstrip(".").split(".")
            assert answer == example.gold
            for step in steps:
                left, right = step.split("=")
                assert eval(left) == int(right)

    @pytest.mark.parametrize(
        ("text", "worth", "keeps"),
        [("#### 7", 1.0, True), ("so the answer is 7.", 1.0, False), ("7 and 8", 0.0, False), ("", 0.0, False)],
    )
    def test_lenient_and_formatted(self, text, worth, keeps):
        assert (lenient_reward(text, "7"), formatted(text)) == (worth, keeps)

    def test_thirteen_calibrated_numbers_learn_by_imitation(self):
        model, tokenizer = nano.load()
        adapter = tl.attach(model, tl.TinyLoraConfig(rank=8, u=13, n_tie="all", projection=nano.basis()))
        assert adapter.num_parameters == 13
        settings = SFTSettings(
            steps=10, learning_rate=0.2, schedule="linear", max_new_tokens=nano.MAX_NEW_TOKENS,
            evaluate_every=10, evaluate_problems=100, evaluate_accuracy=True,
        )  # fmt: skip
        run = train_sft(model, tokenizer, adapter, nano.task(), settings, progress=False)
        (row,) = run.evaluations
        assert run.curve("loss")[0] > 0.07
        assert row["loss"] < 0.03
        assert row["low"] > 0.6  # 0.30 before


SCRIPT = """
import json, sys, torch
from torch import distributed
import tinylora_lite as tl
from tinylora_lite import nano

from tinylora_lite.utils import distributed
torch.set_num_threads(1)
if sys.argv[2] == "2":
    distributed.init_process_group("gloo")
model, tokenizer = nano.load()
adapter = tl.attach(model, tl.TinyLoraConfig(rank=8, u=13, n_tie="all", projection=nano.basis()))
settings = tl.SFTSettings(steps=2, prompts_per_step=6, max_new_tokens=48, learning_rate=0.1)
run = tl.train_sft(model, tokenizer, adapter, nano.task(200, 10, 10), settings, folder=sys.argv[1])
if distributed.rank() == 0:
    print(json.dumps([adapter.vectors.flatten().tolist(), run.curve("loss"), run.curve("length")]))
"""


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(tmp_path):
    file = tmp_path / "train.py"
    file.write_text(SCRIPT, encoding="utf-8")
    launched = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    found = []
    for count, launch in (("1", []), ("2", launched)):
        done = subprocess.run(
            [sys.executable, *launch, str(file), str(tmp_path / count), count],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(tl.__file__).parents[1])},
            capture_output=True, text=True, timeout=300, check=True,
        )  # fmt: skip
        found.append(json.loads(done.stdout.splitlines()[-1]))
    for one, two in zip(*found, strict=True):
        assert torch.allclose(torch.tensor(one), torch.tensor(two), atol=1e-4)
