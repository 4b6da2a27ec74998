"""Grade-school word problems of 2 to 4 steps, and a split in which test and training share no problem.

A problem is a chain: somebody has a number of things, and then some are added, taken away or multiplied. All
values are between 1 and 99. Two problems are *the same* when their numbers and operations are, whoever owns
the apples; the split is by that key, so rewording a training problem never makes a test problem.
"""

from __future__ import annotations

import operator
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "test"]

NAMES = ("tom", "anna", "ben", "lucy", "omar", "mei", "ivan", "sara")
THINGS = ("apples", "books", "coins", "stamps", "shells", "pens", "cards", "eggs")
OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
WORDINGS = {
    "+": ("buys {n} more", "finds {n} more", "gets {n} more", "picks up {n} more"),
    "-": ("sells {n}", "loses {n}", "gives away {n}", "drops {n}"),
    "*": ("now has {n} times as many",),
}

MAX_VALUE = 99
MAX_OPERAND = 20
MAX_FACTOR = 4


@dataclass(frozen=True)
class Step:
    """``left op right = result``, with ``op`` one of ``+ - *``."""

    left: int
    op: str
    right: int
    result: int


@dataclass(frozen=True)
class Problem:
    """A word problem, the chain of steps that solves it, and its answer."""

    text: str
    steps: tuple[Step, ...]

    @property
    def answer(self) -> int:
        return self.steps[-1].result

    @property
    def split(self) -> Split:
        """One key in sixteen is for testing, one for validation, the rest for training."""
        key = f"{self.steps[0].left}" + "".join(f"{step.op}{step.right}" for step in self.steps)
        return {0: "test", 1: "validation"}.get(zlib.crc32(key.encode()) % 16, "train")  # type: ignore[return-value]


Draw = Callable[[random.Random], Problem]
DrawEvent = Callable[[random.Random, int], tuple[str, Step]]


def draw_event(rng: random.Random, value: int) -> tuple[str, Step]:
    """Something that happens to a number of things: the words that tell it, and the step."""
    sums = ["+"] * 2 * (value < MAX_VALUE) + ["-"] * 2 * (value > 1)
    op = rng.choice(sums + ["*"] * (value * 2 <= MAX_VALUE))
    most = {"+": min(MAX_OPERAND, MAX_VALUE - value), "-": min(MAX_OPERAND, value - 1)}
    right = rng.randint(1, most[op]) if op in most else rng.randint(2, min(MAX_FACTOR, MAX_VALUE // value))
    return rng.choice(WORDINGS[op]).format(n=right), Step(value, op, right, OPERATIONS[op](value, right))


def draw_problem(rng: random.Random, steps: int | None = None, draw_event: DrawEvent = draw_event) -> Problem:
    """One random problem of any split; ``steps`` defaults to 2, 3 or 4 with equal chance."""
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    value = rng.randint(2, 40)
    sentences, chain = [f"{name} has {value} {things}."], []
    for _ in range(steps or rng.randint(2, 4)):
        told, step = draw_event(rng, value)
        sentences.append(f"{name} {told}.")
        chain.append(step)
        value = step.result
    sentences.append(f"how many {things} does {name} have?")
    return Problem(" ".join(sentences), tuple(chain))


def problems(split: Split, seed: int, draw: Draw = draw_problem) -> Iterator[Problem]:
    """An endless stream of problems of one split, the same for the same seed."""
    rng = random.Random(f"{split}-{seed}")
    while True:
        problem = draw(rng)
        if problem.split == split:
            yield problem


def distinct_problems(split: Split, count: int, seed: int, draw: Draw = draw_problem) -> list[Problem]:
    """The first ``count`` problems of the stream, no two with the same text."""
    stream, found = problems(split, seed, draw), dict[str, Problem]()
    while len(found) < count:
        problem = next(stream)
        found.setdefault(problem.text, problem)
    return list(found.values())
