"""The nano world as a task: problems in three splits, and the reward; and its problems for real models."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import get_args

from tinylora_lite.nano.problems import Draw, Split, distinct_problems, draw_problem
from tinylora_lite.nano.writers import ANYONE, Writer, careful, in_lines, in_prose
from tinylora_lite.tasks.rewards import gsm8k_reward, keeps_format
from tinylora_lite.tasks.task import Example, Task

MAX_NEW_TOKENS = 48
"""The longest answer of any writer, the end token included, is 37 tokens."""
SIZES = (8000, 1000, 1000)
"""Problems for training, validation and test."""


def reward(completion: str, gold: str) -> float:
    """1.0 if the completion ends in ``#### `` and the right number, 0.0 otherwise.

    >>> reward("3 + 4 = 7. #### 7", "7"), reward("so the answer is 7.", "7")
    (1.0, 0.0)
    """
    return float(completion.strip().endswith(f"#### {gold}"))


def lenient_reward(completion: str, gold: str) -> float:
    """1.0 if the last number of the completion is the right one, whatever the format.

    >>> lenient_reward("so the answer is 7.", "7"), lenient_reward("#### 7", "8"), lenient_reward("", "7")
    (1.0, 0.0, 0.0)
    """
    return float(re.findall(r"\d+", completion)[-1:] == [gold])


def formatted(completion: str) -> bool:
    """Whether the completion ends in ``#### `` and a number."""
    return re.search(r"#### \d+$", completion.strip()) is not None


def make_task(
    name: str, draw: Draw = draw_problem, writer: Writer = careful, sizes: Sequence[int] = SIZES, seed: int = 0
) -> Task:
    """A task of problems that ``draw`` makes and ``writer`` solves, with the nano world's reward and header.

    Whatever is drawn, the splits share no problem, and neither do the pretraining text and what is not for training.
    """
    rng = random.Random(seed)
    drawn = [distinct_problems(split, size, seed, draw) for split, size in zip(get_args(Split), sizes, strict=True)]
    splits = (tuple(Example(p.text, str(p.answer), writer(p, rng)) for p in found) for found in drawn)
    train, validation, test = splits
    return Task(name, train, validation, test, reward, ANYONE, lenient_reward, formatted)


@cache
def task(train: int = SIZES[0], validation: int = SIZES[1], test: int = SIZES[2], seed: int = 0) -> Task:
    """The plain word problems with the careful writer's answers, under the header that lets any writer answer."""
    return make_task("nano", sizes=(train, validation, test), seed=seed)


@cache
def word_problems(steps: int, prose: bool = False) -> Task:
    """The problems of one number of steps for a model that reads any English, with GSM8K's rewards and no header.

    Worked answers have one sum a line and the answer after ``####``, which no prompt asks for: worked examples show it
    (:meth:`~tinylora_lite.tasks.task.Task.with_shots`). In ``prose`` they end in a sentence, and the reward is lenient.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    draw, lenient = partial(draw_problem, steps=steps), partial(gsm8k_reward, lenient=True)
    plain = replace(make_task(f"words-{steps}", draw, in_prose if prose else in_lines), system=None)
    if prose:
        return replace(plain, reward=lenient, lenient=None, formatted=None)
    formatted = partial(keeps_format, form="####", number=True)
    return replace(plain, reward=gsm8k_reward, lenient=lenient, formatted=formatted)
