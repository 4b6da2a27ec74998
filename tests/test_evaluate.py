"""Intervals against literature and simulation, and scores against a model that is known."""

import doctest
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from tinylora_lite import Example, Task, evaluate
from tinylora_lite.evaluate import Completion, Score, interval


def test_worked_example():
    import sys

    assert doctest.testmod(sys.modules["tinylora_lite.evaluate"]) == (0, 2)


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
