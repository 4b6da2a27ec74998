"""A task that a random model can learn, and a way to stop a run."""

from collections.abc import Callable

import pytest

from tinylora_lite import Run, Task


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
