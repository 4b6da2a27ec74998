"""The nano world as a task: problems in three splits, and the reward."""

from __future__ import annotations

import random
import re
from functools import cache

from tinylora_lite.nano.problems import Draw, Split, distinct_problems, draw_problem
from tinylora_lite.nano.writers import ANYONE, Writer, careful
from tinylora_lite.tasks.task import Example, Task

MAX_NEW_TOKENS = 48
"""The longest answer of any writer, the end token included, is 37 tokens."""


def reward(completion: str, gold: str) -> float:
    """1.0 if the completion ends in ``#### `` and the right number, 0.0 otherwise.

    >>> reward("3 + 4 = 7. #### 7", "7"), reward("so the answer is 7.", "7")
    (1.0, 0.0)
    """
    found = re.search(r"#### (\d+)$", completion.strip())
    return float(found is not None and found.group(1) == gold)


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
    name: str,
    draw: Draw = draw_problem,
    writer: Writer = careful,
    train: int = 8000,
    validation: int = 1000,
    test: int = 1000,
    seed: int = 0,
) -> Task:
    """A task of problems that ``draw`` makes and ``writer`` solves, with the nano world's reward and header.

    Whatever is drawn, the splits share no problem by the key of :mod:`tinylora_lite.nano.problems`, and neither do
    the pretraining text and what is not for training.
    """
    rng = random.Random(seed)

    def examples(split: Split, count: int) -> tuple[Example, ...]:
        found = distinct_problems(split, count, seed, draw)
        return tuple(Example(p.text, str(p.answer), writer(p, rng)) for p in found)

    return Task(
        name=name,
        train=examples("train", train),
        validation=examples("validation", validation),
        test=examples("test", test),
        reward=reward,
        system=ANYONE,
        lenient=lenient_reward,
        formatted=formatted,
    )


@cache
def task(train: int = 8000, validation: int = 1000, test: int = 1000, seed: int = 0) -> Task:
    """The word problems of :mod:`tinylora_lite.nano.problems`, under the header that lets any writer answer.

    Their worked answers are the careful writer's.
    """
    return make_task("nano", train=train, validation=validation, test=test, seed=seed)
