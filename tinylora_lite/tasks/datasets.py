r"""GSM8K, MATH and the benchmarks beside them as tasks: one call, by name.

The paper leaves its GSM8K prompt and its answer parser open. Here GSM8K asks for the answer after ``####``, the format
of its own solutions, and mathematics is asked with SimpleRL's boxed template. The paper trains on all problems
(``validation=0``); here 500 are held out to choose with, so that the test set stays out of it.
"""

from __future__ import annotations

import ast
import random
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tinylora_lite.tasks.answers import Form, marked_answer
from tinylora_lite.tasks.catalog import PROBLEM_SETS, ProblemSet
from tinylora_lite.tasks.problem_files import Row, read_problems
from tinylora_lite.tasks.rewards import gsm8k_reward, keeps_format, math_reward
from tinylora_lite.tasks.task import Example, Task
from tinylora_lite.utils.record import seed_of


@dataclass(frozen=True)
class Prompt:
    """How a problem is asked.

    Attributes:
        user: what the user writes, the problem in place of ``{problem}``.
        form: the format it asks for; ``None`` where it asks for none, and every reward is the lenient one.
        system: the system message; ``None`` leaves the chat template's own.
    """

    user: str
    form: Form | None
    system: str | None = None


_BOXED = r"Please reason step by step, and put your final answer within \boxed{}."

PROMPTS: dict[str, Prompt] = {
    # SimpleRL-Zoo's "qwen-boxed" as its evaluation has it; its training files hold \boxed{{}}, a slip.
    "boxed": Prompt("{problem}\n" + _BOXED, "boxed", "You are a helpful assistant."),
    # Qwen2.5-Math's own: the request is the system message.
    "boxed-system": Prompt("{problem}", "boxed", _BOXED),
    # verl's prompt for GSM8K.
    "####": Prompt('{problem} Let\'s think step by step and output the final answer after "####".', "####"),
    "plain": Prompt("{problem}", None),
}
"""The prompts that :func:`load_task` knows; each goes through the model's chat template."""

PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}Question:\n{% endif %}{{ message.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}Answer:\n{% endif %}"
)
"""For base models whose tokenizer has no chat template (Llama's, for one): ``tokenizer.chat_template = ...``.

Qwen2.5's base models have one, and know it.
"""


def load_task(
    name: str,
    *,
    data: str | Path | None = None,
    prompt: str | None = None,
    validation: int | None = None,
    seed: int = 0,
) -> Task:
    """A problem set as a task, from the hub at a pinned commit or from a folder.

    ``Task.reward`` is the strict reward of the prompt's format and ``Task.lenient`` takes the answer from wherever it
    stands, as :func:`~tinylora_lite.gsm8k_reward` and :func:`~tinylora_lite.math_reward` have it.
    Problems whose row holds no answer are left out (two of ``math``): no completion could be right.

    Args:
        name: ``gsm8k`` and ``math`` (SimpleRL-Zoo's 8,523 hard problems of MATH; its test split is MATH-500) have
            training problems; ``math500``, ``minerva``, ``gaokao``, ``olympiadbench``, ``collegemath``, ``aime24`` and
            ``amc23`` are for evaluation alone.
        data: a folder instead of the hub: a copy of the hub's repository, or ``train.jsonl`` and ``test.jsonl``, in the
            folder itself or below the set's name. A number of problems other than the whole set's is a warning.
        prompt: a key of :data:`PROMPTS`; ``None`` takes ``"####"`` for GSM8K and ``"boxed"`` for the others.
        validation: training problems to hold out for choosing; ``None`` takes 500 where there is training, 0 none.
        seed: of the choice of those. It is not the seed of training, so that runs are chosen on the same problems.

    Raises:
        ValueError: the name or the prompt is unknown, a row lacks a column, too many problems are to be held out, or
            the hub's file is not the one that is expected.
        OSError: no such file, or no hub.
        ImportError: math-verify is not installed, or a file is parquet and ``datasets`` is not.
    """
    if name not in PROBLEM_SETS:
        raise ValueError(f"there is no problem set {name!r}; there are {', '.join(PROBLEM_SETS)}")
    source = PROBLEM_SETS[name]
    if (prompt or source.prompt) not in PROMPTS:
        raise ValueError(f"there is no prompt {prompt!r}; there are {', '.join(PROMPTS)}")
    asked = PROMPTS[prompt or source.prompt]
    if not source.numbers:
        from tinylora_lite.tasks import math_equal as equivalence

        equivalence.start()  # it gets ready while the problems are read and the model is loaded

    form = asked.form or source.form
    splits = {
        split: [example for row in rows if (example := _example(name, source, asked, form, row)) is not None]
        for split, rows in read_problems(name, source, data).items()
    }
    train = splits.get("train", [])
    held_out = (source.validation if validation is None else validation) if train else 0
    if not 0 <= held_out < max(1, len(train)):
        if validation is not None:
            raise ValueError(f"validation must be from 0 to {len(train) - 1}, the training problems but one")
        held_out = len(train) // 5  # a small folder of one's own
    chosen = set(random.Random(seed_of("validation", name, seed)).sample(range(len(train)), held_out))
    reward = partial(gsm8k_reward if source.numbers else math_reward, form=form)
    return Task(
        name=name,
        train=tuple(example for i, example in enumerate(train) if i not in chosen),
        validation=tuple(train[i] for i in sorted(chosen)),
        test=tuple(splits.get("test", [])),
        reward=reward if asked.form else partial(reward, lenient=True),
        system=asked.system,
        lenient=partial(reward, lenient=True),
        formatted=partial(keeps_format, form=form, number=source.numbers) if asked.form else None,
    )


def _example(name: str, source: ProblemSet, asked: Prompt, form: Form, row: Row) -> Example | None:
    problem, answer = (_column(name, columns, row) for columns in (source.problem, source.answer))
    gold = _gold(answer)
    if not gold:
        return None
    worked = next((row[column] for column in source.solution if isinstance(row.get(column), str)), None)
    return Example(
        prompt=asked.user.replace("{problem}", str(problem).strip()),
        gold=gold,
        solution=None if worked is None else _solution(worked, gold, form),
    )


def _column(name: str, columns: tuple[str, ...], row: Row) -> Any:
    for column in columns:
        if column in row:
            return row[column]
    raise ValueError(f"a row of {name} has no column {' or '.join(columns)}; it has {', '.join(row)}")


def _gold(answer: object) -> str:
    """The answer as a string: of a list its items, of a worked answer what stands after its mark, of 27.0 27."""
    if isinstance(answer, str) and re.fullmatch(r"\s*\[['\"].*\]\s*", answer, re.DOTALL):
        answer = ast.literal_eval(answer.strip())  # a list that became text on its way to the hub
    if isinstance(answer, list):
        return ", ".join(str(item).strip().strip("$") for item in answer)
    if isinstance(answer, float) and answer.is_integer():
        return str(int(answer))
    text = "" if answer is None else str(answer).strip()
    return marked_answer(text, "####") or marked_answer(text, "boxed") or text


def _solution(worked: str, gold: str, form: Form) -> str:
    r"""A worked answer that ends in the format asked for, without GSM8K's calculator notes ``<<48/2=24>>``."""
    text = re.sub(r"<<[^<>]*>>", "", worked).strip()
    if marked_answer(text, form) is not None:
        return text
    text = re.sub(r"\n?####.*$", "", text).strip()
    return f"{text}\n#### {gold}" if form == "####" else f"{text}\nThe final answer is \\boxed{{{gold}}}."
