import doctest
import math

import numpy as np
import pytest
import torch

from tinylora_lite import Example, Task
from tinylora_lite.tasks import task as tasks


def scoring(worth):
    return Task("t", [], [], [], reward=lambda completion, gold: worth)


def test_worked_example():
    assert doctest.testmod(tasks) == (0, 2)


def test_no_system_message_by_default():
    assert scoring(1.0).messages(Example("1 + 1?", "2")) == [{"role": "user", "content": "1 + 1?"}]


@pytest.mark.parametrize("worth", [1, 0.5, True, np.float32(0.5), np.int64(1), torch.tensor(0.5)])
def test_numbers_of_all_kinds_are_rewards(worth):
    score = scoring(worth).score("2", "2")
    assert type(score) is float
    assert score == float(worth)


@pytest.mark.parametrize("worth", [None, "right", math.nan, math.inf, [1.0, 2.0], torch.ones(2), 1j, object()])
def test_anything_else_is_not(worth):
    with pytest.raises(ValueError, match=r"task t returned .* for 'two'; it must return a finite number") as error:
        scoring(worth).score("two", "2")
    assert "\n" not in str(error.value)


def test_the_reward_gets_completion_and_gold():
    task = Task("t", [], [], [], reward=lambda completion, gold: {("a", "b"): 0.25}[completion, gold])
    assert task.score("a", "b") == 0.25


def test_worked_examples_stand_before_the_problem_and_are_trained_on_no_more():
    worked = [Example(f"{n}?", str(n), f"#### {n}") for n in range(3)]
    task = Task("t", [Example("x?", "x"), *worked], worked, worked, reward=lambda *_: 0.0, system="s").with_shots(2)
    said = [(turn["role"], turn["content"]) for turn in task.messages(Example("9?", "9"))]
    shown = [("user", "0?"), ("assistant", "#### 0"), ("user", "1?"), ("assistant", "#### 1")]
    assert said == [("system", "s"), *shown, ("user", "9?")]
    assert [example.prompt for example in task.train] == ["x?", "2?"]
    with pytest.raises(ValueError, match=r"1 worked training problems, too few for shots=2"):
        task.with_shots(2)
