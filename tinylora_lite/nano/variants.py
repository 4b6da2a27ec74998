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
    """The plain task with another writer's worked answers.

    They tell whether imitation is worse than reinforcement, or off-policy text worse than the model's own. The
    stranger's demonstrations are off-policy, the careful writer's are what a base can already write.

    Raises:
        ValueError: ``writer`` is not among ``DEMONSTRATORS``.
    """
    if writer not in DEMONSTRATORS:
        raise ValueError(f"demonstrations are by {' or '.join(DEMONSTRATORS)}, not by {writer!r}")
    return make_task(f"nano-by-{writer}", writer=DEMONSTRATORS[writer], seed=seed)


@cache
def longer(steps: tuple[int, ...] = (5, 6)) -> Task:
    """Problems with numbers of steps that no pretraining text has.

    They tell whether few numbers teach or only elicit: every step is known, a chain of that length is not. The longest
    conversations are also longer than any of pretraining.

    Raises:
        ValueError: no number of steps is given, or one is not in 1 ... ``MAX_STEPS``.
    """
    if not steps or not all(1 <= n <= MAX_STEPS for n in steps):
        raise ValueError(f"steps must be numbers from 1 to {MAX_STEPS}, not {steps!r}")
    name = f"nano-longer-{'-'.join(map(str, steps))}"
    return make_task(name, lambda rng: draw_problem(rng, rng.choice(steps)))


@cache
def doubling() -> Task:
    """Problems in which somebody "gets as many more" at least once: an operation that no pretraining text has.

    They tell whether few numbers teach or only elicit: the operation alone is new. Values up to 20 are doubled, so each
    sum that it needs was in the pretraining text. Its worked step is ``12 + 12 = 24.``
    """
    return make_task("nano-doubling", _such(lambda p: DOUBLING in p.text, _draw_doubling))


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
    """The plain problems, rewarded in the chatty writer's format: ``so the answer is 7.`` at the end.

    They tell whether a basis that was calibrated for one format serves another, which the base writes as well.
    """
    return replace(make_task("nano-worded", writer=chatty), reward=worded_reward, formatted=_worded)


@cache
def format_only() -> Task:
    """The plain task under a reward for its format, any number: a control.

    Trained on it and scored on the plain task, a model shows how much of the gain is format.
    """
    return replace(task(), name="nano-format-only", reward=format_reward)


@cache
def unrelated() -> Task:
    """The plain task under a reward that has nothing to do with being right: a control.

    Trained on it and scored on the plain task, a model shows how much of the gain any reward would bring.
    """
    return replace(task(), name="nano-unrelated", reward=unrelated_reward)


@cache
def header(name: str) -> Task:
    """The plain task under another header.

    It tells how far a prompt alone goes: ``header("careful")`` is the best prompt for a base that read the writers'
    names.

    Raises:
        ValueError: no header of the pretraining text has this name.
    """
    if name not in (*WRITERS, ANYONE):
        raise ValueError(f"a header must be one of {', '.join((*WRITERS, ANYONE))}, not {name!r}")
    return replace(task(), name=f"nano-header-{name}", system=name)


def worded_reward(completion: str, gold: str) -> float:
    """1.0 if the completion ends in ``so the answer is`` and the right number with a full stop, 0.0 otherwise.

    >>> worded_reward("ok, then 3 + 4 = 7. so the answer is 7.", "7"), worded_reward("3 + 4 = 7. #### 7", "7")
    (1.0, 0.0)
    """
    found = re.search(r"so the answer is (\d+)\.$", completion.strip())
    return float(found is not None and found.group(1) == gold)


def format_reward(completion: str, gold: str) -> float:
    """1.0 if the completion ends in ``#### `` and any number, 0.0 otherwise.

    >>> format_reward("#### 8", "7"), format_reward("so the answer is 7.", "7")
    (1.0, 0.0)
    """
    return float(formatted(completion))


def unrelated_reward(completion: str, gold: str) -> float:
    """1.0 for one half of all pairs of texts, 0.0 for the other; which one it is, a hash decides.

    The same completion to problems with the same answer always earns the same; nothing else can be learned from it.
    """
    return float(hashlib.sha256(f"{completion.strip()}\n{gold}".encode()).digest()[0] % 2)


def _worded(completion: str) -> bool:
    return re.search(r"so the answer is \d+\.$", completion.strip()) is not None


def _such(wanted: Callable[[Problem], bool], draw: Draw = draw_problem) -> Draw:
    def drawn(rng: random.Random) -> Problem:
        while not wanted(problem := draw(rng)):
            pass
        return problem

    return drawn


def _draw_doubling(rng: random.Random) -> Problem:
    def event(rng: random.Random, value: int) -> tuple[str, Step]:
        if value <= MAX_OPERAND and rng.random() < 0.5:
            return DOUBLING, Step(value, "+", value, 2 * value)
        return draw_event(rng, value)

    return draw_problem(rng, draw_event=event)
