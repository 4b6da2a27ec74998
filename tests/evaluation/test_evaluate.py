"""Intervals against literature and simulation, and scores against a model that is known."""

import dataclasses
import doctest
import itertools
import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

import tinylora_lite as tl
from tinylora_lite import Example, Task, evaluate
from tinylora_lite.evaluation.score import Completion, Score, interval
from tinylora_lite.sampling.rollouts import Rollouts
from tinylora_lite.sampling.sampler import ModelSampler


def test_worked_example():
    import sys

    assert doctest.testmod(sys.modules["tinylora_lite.evaluation.score"]) == (0, 4)


def column(right: int, n: int) -> np.ndarray:
    return np.array([[1.0]] * right + [[0.0]] * (n - right))


class TestInterval:
    @pytest.mark.parametrize(("right", "n"), [(0, 10), (10, 10), (3, 10), (1, 1), (760, 1000), (1, 1319)])
    def test_one_sample_is_wilson(self, right, n):
        expected = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
        assert interval(column(right, n)) == pytest.approx((expected.low, expected.high), abs=1e-12)

    def test_wilson_by_hand(self):
        assert interval(column(0, 10)) == pytest.approx((0.0, 0.27753), abs=1e-5)  # z² / (n + z²)

    @pytest.mark.parametrize("worth", [0.0, 1.0])
    def test_unanimity_is_not_certainty(self, worth):
        low, high = interval(np.full((10, 8), worth))
        assert (low, high) == pytest.approx(interval(column(int(10 * worth), 10)))
        assert high - low > 0.2

    def test_identical_samples_add_nothing(self):
        rng = np.random.default_rng(0)
        once = rng.integers(0, 2, (200, 1)).astype(float)
        assert interval(np.repeat(once, 8, axis=1)) == pytest.approx(interval(once), abs=1e-3)

    def test_independent_samples_count_in_full(self):
        rewards = np.random.default_rng(1).integers(0, 2, (2000, 4)).astype(float)
        low, high = interval(rewards)
        wilson_low, wilson_high = interval(rewards.reshape(-1, 1))
        assert high - low == pytest.approx(wilson_high - wilson_low, rel=0.05)

    @pytest.mark.parametrize(("a", "b"), [(8.0, 2.0), (0.5, 0.5), (2.0, 60.0)])
    def test_coverage(self, a, b):
        """Of intervals over problems of different difficulty, 95 % hold the truth; so they must for rare successes."""
        rng = np.random.default_rng(2)
        rates = rng.beta(a, b, (2000, 80, 1))
        rewards = (rng.random((2000, 80, 4)) < rates).astype(float)
        truth = a / (a + b)
        held = [low <= truth <= high for low, high in map(interval, rewards)]
        assert 0.93 <= np.mean(held) <= 0.975

    def test_rewards_beyond_one(self):
        rewards = np.array([[1.0, 2.0], [-1.0, 0.0], [3.0, 3.0]])
        expected = stats.t.interval(0.95, 2, loc=4 / 3, scale=stats.sem([1.5, -0.5, 3.0]))
        assert interval(rewards) == pytest.approx(expected)
        assert interval(np.array([[2.0, 3.0]])) == (-math.inf, math.inf)

    def test_never_leaves_zero_to_one(self):
        for right in range(6):
            low, high = interval(np.array([[1.0] * right + [0.0] * (5 - right)] * 2 + [[0.0] * 5]))
            assert 0 <= low <= high <= 1


def completions(rewards) -> tuple[Completion, ...]:
    return tuple(Completion("", "", "", r, 1, False) for r in rewards)


class TestScore:
    def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(self):
        rows = [[1.0, 0.0, 0.0, 1.0, 0.0], [0.0] * 5, [1.0] * 5, [0.0, 0.0, 1.0, 0.0, 0.0]]
        score = Score(0.4, 0.0, 1.0, 4, 5, completions(itertools.chain(*rows)))
        for k in range(1, 6):
            subsets = [any(subset) for row in rows for subset in itertools.combinations(row, k)]
            assert score.pass_at(k) == pytest.approx(np.mean(subsets))

    @pytest.mark.parametrize("k", [0, -1, 3])
    def test_pass_at_more_than_there_are(self, k):
        with pytest.raises(ValueError, match="there are 2"):
            Score(0.5, 0.0, 1.0, 1, 2, completions([1.0, 0.0])).pass_at(k)

    def test_in_words(self):
        assert str(Score(0.5, 0.25, 0.755, 40, 1, ())) == "50.0% [25.0%, 75.5%], n = 40"


class TestEvaluate:
    def test_every_completion_in_the_order_of_the_task(self, model, tokenizer, task):
        score = evaluate(model, tokenizer, task, samples=3, max_new_tokens=6, batch_size=4)
        assert (score.n, score.samples, len(score.completions)) == (6, 3, 18)
        assert [c.prompt for c in score.completions] == [e.prompt for e in task.test for _ in range(3)]
        assert [c.gold for c in score.completions] == [e.gold for e in task.test for _ in range(3)]
        assert score.accuracy == pytest.approx(np.mean([c.reward for c in score.completions]))
        rewards = np.array([c.reward for c in score.completions]).reshape(6, 3)
        assert (score.low, score.high) == interval(rewards)
        assert score.summary() == {
            "accuracy": score.accuracy,
            "low": score.low,
            "high": score.high,
            "n": 6,
            "samples": 3,
        }

    def test_the_reward_sees_text_and_gold(self, model, tokenizer, task):
        model.generation_config.eos_token_id = list(range(len(tokenizer)))  # every answer is one token, and ends
        seen = []

        def reward(text, gold):
            seen.append((text, gold))
            return float(gold in ("20", "23"))

        score = evaluate(model, tokenizer, Task("t", [], [], task.test, reward), max_new_tokens=1)
        assert score.accuracy == pytest.approx(2 / 6)
        assert [c.reward for c in score.completions] == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
        assert seen == [("", "20"), *((c.text, c.gold) for c in score.completions)], "a look at the reward comes first"

    def test_a_truncated_answer_is_worth_nothing(self, model, tokenizer, task):
        generous = Task("t", [], [], task.test, lambda text, gold: 1.0)
        model.generation_config.eos_token_id = list(range(60, len(tokenizer)))
        score = evaluate(model, tokenizer, generous, samples=10, max_new_tokens=1)
        assert 0 < score.accuracy < 1
        assert all(c.reward == float(not c.truncated) for c in score.completions)
        scored = evaluate(model, tokenizer, generous, samples=10, max_new_tokens=1, truncated="score")
        assert scored.accuracy == 1

    def test_greedy_needs_no_seed(self, model, tokenizer, task):
        options = {"temperature": 0, "max_new_tokens": 8}
        one = evaluate(model, tokenizer, task, seed=0, **options)
        two = evaluate(model, tokenizer, task, seed=1, batch_size=2, **options)
        assert [c.text for c in one.completions] == [c.text for c in two.completions]

    def test_seeds_and_batches_draw_apart(self, model, tokenizer, task):
        same = Task("t", [], [], [task.test[0]] * 8, task.reward)

        def texts(**options):
            return [c.text for c in evaluate(model, tokenizer, same, max_new_tokens=8, **options).completions]

        assert texts(seed=0) == texts(seed=0)
        assert texts(seed=0) != texts(seed=1)
        halves = texts(batch_size=4)
        assert halves[:4] != halves[4:], "each batch has a stream of its own"

    def test_splits_and_their_beginnings(self, model, tokenizer, task):
        score = evaluate(model, tokenizer, task, split="validation", problems=2, max_new_tokens=2)
        assert [c.gold for c in score.completions] == ["12", "13"]

    def test_progress_is_told(self, model, tokenizer, task):
        told = []
        evaluate(model, tokenizer, task, max_new_tokens=1, batch_size=4, progress=lambda *x: told.append(x))
        assert told == [(4, 6), (6, 6)]

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"split": "dev"}, "test, validation or train"),
            ({"split": "train"}, "no train problems"),
            ({"problems": 0}, "at least 1"),
            ({"samples": 0}, "at least 1"),
            ({"truncated": "mask"}, "truncated must be zero or score, not 'mask'"),
            ({"batch_size": 0}, "at least 1"),
        ],
    )
    def test_bad_arguments(self, model, tokenizer, task, options, match):
        empty = Task("t", [], task.validation, task.test, task.reward)
        with pytest.raises(ValueError, match=match):
            evaluate(model, tokenizer, empty, **options)

    def test_a_reward_that_is_no_number(self, model, tokenizer):
        broken = Task("t", [], [], [Example("tom has 1", "1")], lambda text, gold: math.nan)
        model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
        with pytest.raises(ValueError, match="reward of task t returned nan"):
            evaluate(model, tokenizer, broken, max_new_tokens=1)


class TestBootstrap:
    def test_it_is_scipy_s_over_problems(self):
        rewards = np.random.default_rng(0).random((60, 4)).round()
        score = Score.of(completions(rewards.flatten()), 4)
        rng = np.random.default_rng(3)
        found = stats.bootstrap((rewards.mean(axis=1),), np.mean, method="BCa", random_state=rng)
        # scipy draws in one piece here and in the library alike, so that even the random numbers agree.
        assert score.bootstrap(seed=3) == pytest.approx(tuple(found.confidence_interval))

    def test_many_problems_agree_with_wilson(self):
        score = Score.of(completions([1.0] * 700 + [0.0] * 300))
        assert score.bootstrap() == pytest.approx((score.low, score.high), abs=4e-3)

    def test_unanimity_is_not_certainty(self):
        score = Score.of(completions([1.0] * 10))
        assert score.bootstrap() == (score.low, score.high)
        assert score.low < 0.8


class TestBothRewards:
    @pytest.fixture
    def strict(self, task) -> Task:
        """Strict: the whole text; lenient: any token of it; formatted: it opens with the right letter."""
        return dataclasses.replace(
            task,
            reward=lambda text, gold: float(text.endswith("has")),
            lenient=lambda text, gold: float("has" in text),
            formatted=lambda text: text[:1] in tuple("abcdefgh"),
        )

    def test_all_of_it_is_the_tasks_own(self, model, tokenizer, strict):
        score = evaluate(model, tokenizer, strict, samples=40, max_new_tokens=6, truncated="score")
        for c in score.completions:
            assert (c.reward, c.lenient) == (float(c.text.endswith("has")), float("has" in c.text))
            assert c.formatted is (c.text[:1] in tuple("abcdefgh"))
        assert 0 < score.accuracy < score.lenient.accuracy < 1
        rewards = np.array([c.lenient for c in score.completions]).reshape(6, 40)
        assert (score.lenient.low, score.lenient.high) == interval(rewards)
        assert score.formatted == np.mean([c.formatted for c in score.completions])
        assert score.truncated == np.mean([c.truncated for c in score.completions]) > 0
        assert score.tokens == np.mean([c.tokens for c in score.completions])
        assert score.details() == score.summary() | {
            "truncated": score.truncated,
            "tokens": score.tokens,
            "formatted": score.formatted,
            "lenient": score.lenient.accuracy,
            "lenient_low": score.lenient.low,
            "lenient_high": score.lenient.high,
        }

    def test_what_a_cut_off_answer_is_worth_counts_for_both(self, model, tokenizer, strict):
        generous = dataclasses.replace(strict, reward=lambda text, gold: 1.0, lenient=lambda text, gold: 1.0)
        model.generation_config.eos_token_id = list(range(60, len(tokenizer)))
        score = evaluate(model, tokenizer, generous, samples=10, max_new_tokens=1)
        assert 0 < score.truncated < 1
        assert score.accuracy == score.lenient.accuracy == pytest.approx(1 - score.truncated)

    def test_a_task_without_them(self, model, tokenizer, task):
        score = evaluate(model, tokenizer, task, max_new_tokens=2)
        assert score.lenient is score.formatted is None
        assert score.details().keys() == score.summary().keys() | {"truncated", "tokens"}

    def test_a_lenient_reward_that_is_no_number(self, model, tokenizer, strict):
        broken = dataclasses.replace(strict, lenient=lambda text, gold: math.nan)
        with pytest.raises(ValueError, match="returned nan"):
            evaluate(model, tokenizer, broken, max_new_tokens=1, truncated="score")


class Echo:
    """A sampler of no model: the answer to every prompt is one token; it remembers what it was told."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.synced, self.calls = tokenizer, [], []

    def sync(self, adapter) -> None:
        self.synced.append(adapter)

    def sample(self, prompt_ids, prompt_mask, *, max_new_tokens, temperature=1.0, seed=0, first_row=0) -> Rollouts:
        self.calls.append((prompt_ids.device.type, len(prompt_ids), max_new_tokens, temperature))
        ids = torch.full((len(prompt_ids), 1), 7)
        nothing = torch.zeros(ids.shape)
        cut = torch.zeros(len(ids), dtype=torch.bool)
        return Rollouts(prompt_ids, prompt_mask, ids, torch.ones_like(ids), nothing, nothing, cut, ["has"] * len(ids))


class TestSampler:
    def test_it_answers_without_a_model(self, tokenizer, task):
        sampler = Echo(tokenizer)
        score = evaluate(None, tokenizer, task, batch_size=4, max_new_tokens=9, temperature=0.5, sampler=sampler)
        assert (score.accuracy, score.n) == (1.0, 6)
        assert sampler.calls == [("cpu", 4, 9, 0.5), ("cpu", 2, 9, 0.5)]
        assert sampler.synced == [], "nobody knows what it should be in step with"

    def test_it_follows_the_model_s_adapter(self, model, tokenizer, task):
        sampler = Echo(tokenizer)
        evaluate(model, tokenizer, task, sampler=sampler)
        adapter = tl.attach(model, tl.lora_xs(2))
        evaluate(model, tokenizer, task, sampler=sampler)
        with adapter.disabled():
            evaluate(model, tokenizer, task, sampler=sampler)
        assert sampler.synced == [None, adapter, None]

    def test_a_finished_evaluation_needs_no_sampler_in_step(self, model, tokenizer, task, tmp_path):
        for synced in ([None], []):
            sampler = Echo(tokenizer)
            evaluate(model, tokenizer, task, sampler=sampler, folder=tmp_path)
            assert sampler.synced == synced

    def test_the_model_itself_is_one(self, model, tokenizer, task):
        options = {"samples": 2, "max_new_tokens": 5, "batch_size": 5}
        own = evaluate(model, tokenizer, task, **options)
        assert evaluate(None, tokenizer, task, sampler=ModelSampler(model, tokenizer), **options) == own

    def test_somebody_must_answer(self, tokenizer, task):
        with pytest.raises(ValueError, match="a model, or the sampler"):
            evaluate(None, tokenizer, task)


class Stop(Exception):  # noqa: N818
    pass


def stop_at(place: int):
    def progress(done: int, total: int) -> None:
        if done >= place:
            raise Stop

    return progress


class TestFolder:
    OPTIONS = {"samples": 3, "max_new_tokens": 6, "batch_size": 4, "seed": 5}  # noqa: RUF012

    def test_every_completion_is_kept(self, model, tokenizer, task, tmp_path):
        score = evaluate(model, tokenizer, task, folder=tmp_path, **self.OPTIONS)
        assert score == evaluate(model, tokenizer, task, **self.OPTIONS), "keeping them changes none"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["completions.jsonl", "evaluation.json"]
        rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
        assert [(row.pop("problem"), row.pop("sample")) for row in rows] == [(i, j) for i in range(6) for j in range(3)]
        assert [Completion(**row) for row in rows] == list(score.completions)
        record = json.loads((tmp_path / "evaluation.json").read_text())
        assert record["score"] == score.details()
        assert record["settings"]["temperature"] == 1.0
        assert Score.load(tmp_path) == score

    @pytest.mark.parametrize("place", [4, 12, 18])
    def test_an_interrupted_one_goes_on_to_the_same_end(self, model, tokenizer, task, tmp_path, place):
        whole = evaluate(model, tokenizer, task, **self.OPTIONS)
        with pytest.raises(Stop):
            evaluate(model, tokenizer, task, folder=tmp_path, progress=stop_at(place), **self.OPTIONS)
        with pytest.raises(FileNotFoundError, match="not finished"):
            Score.load(tmp_path)
        sampler, told = Counted(model, tokenizer), []
        options = self.OPTIONS | {"sampler": sampler, "progress": lambda done, total: told.append(done)}
        # The name of the sampler's class is part of what must not change.
        sampler.__class__.__name__ = "ModelSampler"
        resumed = evaluate(model, tokenizer, task, folder=tmp_path, **options)
        assert resumed == whole == Score.load(tmp_path)
        before = place // 4 * 4
        assert sampler.rows == 18 - before, "what was there is not sampled again"
        assert told[0] == before
        assert not (tmp_path / "completions.jsonl.part").exists()

    def test_a_line_that_was_cut_off(self, model, tokenizer, task, tmp_path):
        with pytest.raises(Stop):
            evaluate(model, tokenizer, task, folder=tmp_path, progress=stop_at(12), **self.OPTIONS)
        part = tmp_path / "completions.jsonl.part"
        part.write_bytes(part.read_bytes()[:-20])
        assert evaluate(model, tokenizer, task, folder=tmp_path, **self.OPTIONS) == evaluate(
            model, tokenizer, task, **self.OPTIONS
        )
        assert len(Score.load(tmp_path).completions) == 18

    def test_a_finished_one_is_scored_anew_and_not_sampled(self, model, tokenizer, task, tmp_path):
        score = evaluate(model, tokenizer, task, folder=tmp_path, **self.OPTIONS)
        model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
        assert evaluate(model, tokenizer, task, folder=tmp_path, **self.OPTIONS) == score
        opposite = dataclasses.replace(task, reward=lambda text, gold: float("has" not in text))
        again = evaluate(model, tokenizer, opposite, folder=tmp_path, truncated="zero", **self.OPTIONS)
        assert [c.reward for c in again.completions] == [
            float(not c.truncated and "has" not in c.text) for c in score.completions
        ]
        assert Score.load(tmp_path) == again

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"seed": 6}, "seed = 5, not 6"),
            ({"temperature": 0}, "temperature = 1.0, not 0.0"),
            ({"max_new_tokens": 7}, "max_new_tokens = 6, not 7"),
            ({"samples": 2}, "samples = 3, not 2"),
            ({"problems": 5}, "problems = 6, not 5"),
            ({"batch_size": 5}, "batch_size = 4, not 5"),
            ({"split": "validation"}, "split = 'test', not 'validation'"),
        ],
    )
    def test_other_settings_are_refused(self, model, tokenizer, task, tmp_path, change, match):
        evaluate(model, tokenizer, task, folder=tmp_path, **self.OPTIONS)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(ValueError, match=match) as error:
            evaluate(model, tokenizer, task, folder=tmp_path, **self.OPTIONS | change)
        assert "\n" not in str(error.value)
        assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def test_another_model_adapter_or_wording_is_refused(self, model, make_model, tokenizer, task, tmp_path):
        options = {"folder": tmp_path, "max_new_tokens": 2}
        evaluate(model, tokenizer, task, **options)
        with pytest.raises(ValueError, match="holds an evaluation with base"):
            evaluate(make_model(seed=1), tokenizer, task, **options)
        reworded = dataclasses.replace(task, system="think")
        with pytest.raises(ValueError, match="problems_sha256"):
            evaluate(model, tokenizer, reworded, **options)
        adapter = tl.attach(model, tl.lora_xs(2))
        with pytest.raises(ValueError, match="adapter = 'none'"):
            evaluate(model, tokenizer, task, **options)
        with adapter.disabled():
            evaluate(model, tokenizer, task, **options)
        options["folder"] = tmp_path / "adapted"
        evaluate(model, tokenizer, task, **options)
        with torch.no_grad():
            adapter.vectors[0, 0] = 1e-7
        with pytest.raises(ValueError, match="adapter"):
            evaluate(model, tokenizer, task, **options)

    def test_a_sampler_alone_needs_a_subject(self, tokenizer, task, tmp_path):
        with pytest.raises(ValueError, match="subject="):
            evaluate(None, tokenizer, task, sampler=Echo(tokenizer), folder=tmp_path)
        options = {"sampler": Echo(tokenizer), "folder": tmp_path}
        evaluate(None, tokenizer, task, subject={"model": "a"}, **options)
        with pytest.raises(ValueError, match="model = 'a', not 'b'"):
            evaluate(None, tokenizer, task, subject={"model": "b"}, **options)

    @pytest.mark.parametrize("text", ["", "{}", "[1]", '{"settings": 3}', "not json"])
    def test_a_damaged_record(self, model, tokenizer, task, tmp_path, text):
        (tmp_path / "evaluation.json").write_text(text)
        with pytest.raises(ValueError, match="damaged"):
            evaluate(model, tokenizer, task, folder=tmp_path)

    def test_damaged_completions(self, model, tokenizer, task, tmp_path):
        evaluate(model, tokenizer, task, folder=tmp_path, max_new_tokens=2)
        file = tmp_path / "completions.jsonl"
        lines = file.read_text().splitlines(keepends=True)
        for text in (lines[0] + lines[1][:9] + "\n", lines[0] + '{"text": "a"}\n'):
            file.write_text(text)
            with pytest.raises(ValueError, match="damaged"):
                evaluate(model, tokenizer, task, folder=tmp_path, max_new_tokens=2)
        file.write_text("")
        with pytest.raises(ValueError, match="damaged"):
            Score.load(tmp_path)

    def test_completions_without_their_record(self, model, tokenizer, task, tmp_path):
        (tmp_path / "completions.jsonl").write_text("{}\n")
        with pytest.raises(ValueError, match=r"is there without its evaluation\.json"):
            evaluate(model, tokenizer, task, folder=tmp_path)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="not there"):
            Score.load(tmp_path)


class Counted(ModelSampler):
    """Counts the rows that it answers."""

    def sample(self, prompt_ids, *arguments, **options) -> Rollouts:
        self.__dict__["rows"] = self.__dict__.get("rows", 0) + len(prompt_ids)
        return super().sample(prompt_ids, *arguments, **options)

    @property
    def rows(self) -> int:
        return self.__dict__.get("rows", 0)
