"""The tasks of the lab by name: the plain nano task and those that differ from it in one thing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from tinylora_lite import nano
from tinylora_lite.adapter.weights import base_fingerprint
from tinylora_lite.evaluation.evaluate import evaluate
from tinylora_lite.lab.real import kept, load_base
from tinylora_lite.lab.trial import LINES, SHOTS
from tinylora_lite.nano import variants
from tinylora_lite.nano.writers import WRITERS
from tinylora_lite.tasks.datasets import load_task
from tinylora_lite.tasks.task import Example, Task
from tinylora_lite.utils.files import atomic_write

SAMPLES = 4
"""Answers of a base to each training problem, of which the first rewarded one becomes a demonstration."""
OWN = "demonstrations: own"
"""The only task that depends on the base."""


def words(steps: int, kind: str = "") -> Task:
    """The word problems for real models, after two worked examples.

    ``kind`` is ``"plain"``, without examples and with a lenient reward; ``"prose"``, examples without a format, and a
    lenient reward; ``"format only"`` or ``"unrelated"``, as the controls of the nano task; or one of ``LINES`` and
    ``SHOTS``.
    """
    task = nano.word_problems(steps, prose=kind == "prose")
    if kind in LINES:
        task = told(task, LINES[kind])
    formatted = task.formatted or bool
    rewards = {
        "plain": task.lenient or task.reward,
        "format only": lambda completion, gold: float(formatted(completion)),
        "unrelated": variants.unrelated_reward,
    }
    asked = replace(task, name=f"{task.name} {kind}".strip(), reward=rewards.get(kind, task.reward))
    return replace(asked, lenient=None, formatted=None) if kind == "plain" else asked.with_shots(SHOTS.get(kind, 2))


def told(task: Task, line: str) -> Task:
    """The task with a line of instruction before every problem."""

    def lead(examples: Sequence[Example]) -> tuple[Example, ...]:
        return tuple(replace(example, prompt=f"{line}\n{example.prompt}") for example in examples)

    return replace(task, train=lead(task.train), validation=lead(task.validation), test=lead(task.test))


def gsm8k(prompt: str) -> Task:
    """GSM8K under one of its prompts, from ``lab/data/gsm8k`` in the user's cache if it is there, else from the hub."""
    data = kept("data")
    return load_task("gsm8k", data=data if (data / "gsm8k").is_dir() else None, prompt=prompt)


TASKS: dict[str, Callable[[], Task]] = {
    "nano": nano.task,
    **{f"demonstrations: {name}": partial(variants.demonstrations, name) for name in variants.DEMONSTRATORS},
    "longer": variants.longer,
    "doubling": variants.doubling,
    "format only": variants.format_only,
    "unrelated": variants.unrelated,
    **{f"header: {name}": partial(variants.header, name) for name in WRITERS},
    "adding": variants.adding,
    "multiplying": variants.multiplying,
    "worded": variants.worded,
    **{
        f"words-{steps}{', ' * bool(kind)}{kind}": partial(words, steps, kind)
        for steps in (1, 2)
        for kind in ("", "plain", "prose", "format only", "unrelated", *LINES, *SHOTS)
    },
    "gsm8k": partial(gsm8k, "####"),
    "gsm8k, boxed": partial(gsm8k, "boxed"),
}


@cache
def task_of(name: str, base: str) -> Task:
    """A task by its name, for a base. Raises ``ValueError`` where there is none of that name."""
    if name == OWN:
        return own_demonstrations(base)
    if name not in TASKS:
        raise ValueError(f"no task named {name!r}; there are: {', '.join((*TASKS, OWN))}")
    return TASKS[name]()


def own_demonstrations(base: str) -> Task:
    """The nano task whose worked answers are the base's own: for each problem the first of its answers that is right.

    Problems that none of ``SAMPLES`` answers solves are left out. Imitating them is on-policy at the start, and so
    tells whether SFT falls behind because it is SFT, or because it imitates somebody else.
    """
    path = made_from(base, base) / "own-demonstrations.json"
    plain = nano.task()
    if not path.exists():
        model, tokenizer = nano.load(base)
        score = evaluate(
            model, tokenizer, plain, split="train", samples=SAMPLES, max_new_tokens=nano.MAX_NEW_TOKENS, seed=1
        )
        found: dict[str, str] = {}
        for completion in score.completions:
            if completion.reward > 0:
                found.setdefault(completion.prompt, completion.text)
        atomic_write(path, json.dumps(found))
    answers = json.loads(path.read_text(encoding="utf-8"))
    shown = tuple(replace(e, solution=answers[e.prompt]) for e in plain.train if e.prompt in answers)
    return replace(plain, name=f"nano by {base}", train=shown)


def made_from(source: str, base: str) -> Path:
    """The folder in the user's cache of what was made from one base for another; it is new for a base trained again."""
    return kept(f"{base}-{_fingerprint(source)}")


@cache
def _fingerprint(base: str) -> str:
    return base_fingerprint(load_base(base)[0])[:12]
