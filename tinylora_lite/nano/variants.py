"""Tasks beside :func:`tinylora_lite.nano.task`, each for one question that the plain task cannot answer.

They have the plain task's sizes, and its split by the numbers and operations of a problem: no validation or test
problem of any of them has its steps in the pretraining text, nor in the training split of another. They use the words
of the nano vocabulary alone, so every base can read them, and their worked answers fit into ``MAX_NEW_TOKENS``.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache

from tinylora_lite.nano.problems import MAX_OPERAND, Draw, Problem, Step, draw_event, draw_problem
from tinylora_lite.nano.task import formatted, make_task, task
from tinylora_lite.nano.writers import ANYONE, WRITERS, Writer, careful, chatty, stranger
from tinylora_lite.tasks.task import Task

DEMONSTRATORS: dict[str, Writer] = {"careful": careful, "stranger": stranger}
"""Who can show how it is done: a writer of the pretraining text, and one who is not."""
MAX_STEPS = 7
"""The most steps for which the careful writer keeps within ``MAX_NEW_TOKENS``: 45 tokens; 6 steps take 39."""
DOUBLING = "gets as many more"
"""An operation that no pretraining text has, in words that all are in the vocabulary."""


@cache
def demonstrations(writer: str, seed: int = 0) -> Task:
    """The plain task with the worked answers of one of ``DEMONSTRATORS``.

    The stranger's are off-policy, the careful writer's are what a base can already write.
    """
    return make_task(f"nano-by-{writer}", writer=DEMONSTRATORS[writer], seed=seed)


@cache
def longer(steps: tuple[int, ...] = (5, 6)) -> Task:
    """Problems with numbers of steps that no pretraining text has.

    They tell whether an adapter teaches or only elicits: every step is known, a chain of that length is not.

    Raises:
        ValueError: no number of steps is given, or one is not in 1 ... ``MAX_STEPS``.
    """
    if not steps or not all(1 <= n <= MAX_STEPS for n in steps):
        raise ValueError(f"steps must be numbers from 1 to {MAX_STEPS}, not {steps!r}")
    return make_task("-".join(map(str, ("nano-longer", *steps))), lambda rng: draw_problem(rng, rng.choice(steps)))


@cache
def doubling() -> Task:
    """Problems in which somebody "gets as many more" at least once: an operation that no pretraining text has.

    They tell whether an adapter teaches or only elicits: the operation alone is new. Values up to 20 are doubled, so
    each sum that it needs was in the pretraining text.
    """

    def event(rng: random.Random, value: int) -> tuple[str, Step]:
        if value <= MAX_OPERAND and rng.random() < 0.5:
            return DOUBLING, Step(value, "+", value, 2 * value)
        return draw_event(rng, value)

    return make_task("nano-doubling", _such(lambda p: DOUBLING in p.text, lambda rng: draw_problem(rng, None, event)))


@cache
def adding() -> Task:
    """The problems without a multiplication, to see whether a basis calibrated on one kind serves the other."""
    return make_task("nano-adding", _such(lambda p: all(step.op != "*" for step in p.steps)))


@cache
def multiplying() -> Task:
    """The problems with at least one multiplication; :func:`adding` has the others."""
    return make_task("nano-multiplying", _such(lambda p: any(step.op == "*" for step in p.steps)))


@cache
def worded() -> Task:
    """The plain problems, rewarded in the chatty writer's format, to see whether a basis for one serves another."""
    return replace(make_task("nano-worded", writer=chatty), reward=worded_reward, formatted=_worded)


@cache
def format_only() -> Task:
    """A control: the plain task under :func:`format_reward`, which shows how much of the gain is format."""
    return replace(task(), name="nano-format-only", reward=format_reward)


@cache
def unrelated() -> Task:
    """A control: the plain task under :func:`unrelated_reward`, which shows how much of the gain any reward brings."""
    return replace(task(), name="nano-unrelated", reward=unrelated_reward)


@cache
def header(name: str) -> Task:
    """The plain task under another header, to tell how far a prompt alone goes: the best one is the careful writer's.

    Raises:
        ValueError: no header of the pretraining text has this name.
    """
    if name not in (*WRITERS, ANYONE):
        raise ValueError(f"a header must be one of {', '.join((*WRITERS, ANYONE))}, not {name!r}")
    return replace(task(), name=f"nano-header-{name}", system=name)


def worded_reward(completion: str, gold: str) -> float:
    """1.0 if the completion ends in ``so the answer is``, the right number and a full stop, 0.0 otherwise."""
    return float(completion.strip().endswith(f"so the answer is {gold}."))


def format_reward(completion: str, gold: str) -> float:
    """1.0 if the completion ends in ``#### `` and any number, 0.0 otherwise."""
    return float(formatted(completion))


def unrelated_reward(completion: str, gold: str) -> float:
    """1.0 for one half of all pairs of completion and answer, 0.0 for the other, as a hash decides."""
    return float(hashlib.sha256(f"{completion.strip()}\n{gold}".encode()).digest()[0] % 2)


def _worded(completion: str) -> bool:
    return re.search(r"so the answer is \d+\.$", completion.strip()) is not None


def _such(wanted: Callable[[Problem], bool], draw: Draw = draw_problem) -> Draw:
    def drawn(rng: random.Random) -> Problem:
        while not wanted(problem := draw(rng)):
            pass
        return problem

    return drawn
