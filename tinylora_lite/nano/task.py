"""The nano world as a task: problems in three splits, and the reward."""

from __future__ import annotations

import re
from functools import cache

from tinylora_lite.nano.problems import Split, distinct_problems
from tinylora_lite.nano.writers import ANYONE
from tinylora_lite.tasks import Example, Task

MAX_NEW_TOKENS = 48
"""The longest answer of any writer, the end token included, is 36 tokens."""


def reward(completion: str, gold: str) -> float:
    """1.0 if the completion ends in ``#### `` and the right number, 0.0 otherwise.

    >>> reward("3 + 4 = 7. #### 7", "7"), reward("so the answer is 7.", "7")
    (1.0, 0.0)
    """
    found = re.search(r"#### (\d+)$", completion.strip())
    return float(found is not None and found.group(1) == gold)


@cache
def task(train: int = 8000, validation: int = 1000, test: int = 1000, seed: int = 0) -> Task:
    """The word problems of :mod:`tinylora_lite.nano.problems`, under the header that lets any writer answer."""

    def examples(split: Split, count: int) -> tuple[Example, ...]:
        return tuple(Example(p.text, str(p.answer)) for p in distinct_problems(split, count, seed))

    return Task(
        name="nano",
        train=examples("train", train),
        validation=examples("validation", validation),
        test=examples("test", test),
        reward=reward,
        system=ANYONE,
    )
