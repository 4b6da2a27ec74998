"""The tasks of the lab by name: the plain nano task and those that differ from it in one thing."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

from tinylora_lite import nano
from tinylora_lite.lab.bases import own_demonstrations
from tinylora_lite.nano import variants
from tinylora_lite.nano.writers import WRITERS
from tinylora_lite.tasks.task import Task

TASKS: dict[str, Callable[[], Task]] = {
    "nano": nano.task,
    "demonstrations: careful": lambda: variants.demonstrations("careful"),
    "demonstrations: stranger": lambda: variants.demonstrations("stranger"),
    "longer": variants.longer,
    "doubling": variants.doubling,
    "format only": variants.format_only,
    "unrelated": variants.unrelated,
    **{f"header: {name}": partial(variants.header, name) for name in WRITERS},
    "adding": variants.adding,
    "multiplying": variants.multiplying,
    "worded": variants.worded,
}

OWN = "demonstrations: own"
"""The only task that depends on the base."""


@cache
def task_of(name: str, base: str) -> Task:
    """A task by its name, for a base.

    Raises:
        ValueError: there is none of that name.
    """
    if name == OWN:
        return own_demonstrations(base)
    if name not in TASKS:
        raise ValueError(f"no task named {name!r}; there are: {', '.join((*TASKS, OWN))}")
    return TASKS[name]()
