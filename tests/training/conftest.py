"""A reward that a random model can learn, and a way to stop a run."""

from collections.abc import Callable

import pytest

from tinylora_lite import Run, Task


@pytest.fixture(scope="session")
def number_words() -> Callable[[str, str], float]:
    """The share of words that are numbers: a reward that every random model earns a part of."""

    def reward(text: str, gold: str) -> float:
        words = text.split()
        return sum(word.isdigit() for word in words) / len(words) if words else 0.0

    return reward


@pytest.fixture(scope="module")
def numbers(task, number_words) -> Task:
    return Task("numbers", task.train, task.validation, task.test, number_words)


@pytest.fixture
def interrupt_at() -> Callable[[int], Callable[[Run], None]]:
    """``on_step=interrupt_at(step)`` stops a run by an ``InterruptedError`` after that step."""

    def at(step: int) -> Callable[[Run], None]:
        def on_step(run: Run) -> None:
            if len(run.steps) == step:
                raise InterruptedError

        return on_step

    return at
