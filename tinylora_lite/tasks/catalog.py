"""The problem sets, the prompts and a chat template, which ``catalog.yaml`` holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ruamel.yaml import YAML

from tinylora_lite.tasks.answers import Form

Split = Literal["train", "test"]


@dataclass(frozen=True)
class ProblemSet:
    """A data set on the hub.

    Attributes:
        hub: its name there.
        revision: a commit of 40 digits, or its first digits, or a day, ``YYYY-MM-DD`` (UTC).
        rows: how many rows each split has at that revision.
        numbers: whether answers are numbers, compared exactly, or mathematics.
        form: the format of the worked solutions; the default prompt asks for it.
        files: the files of each split, as a glob below the repository; the usual names where it is empty.
        problem, answer, solution: the columns, the first that a row has.
        validation: problems that are held out of training by default.
    """

    hub: str
    revision: str
    rows: dict[Split, int]
    numbers: bool = False
    form: Form = "boxed"
    files: dict[Split, str] = field(default_factory=dict)
    problem: Sequence[str] = ("problem", "question")
    answer: Sequence[str] = ("answer",)
    solution: Sequence[str] = ("solution",)
    validation: int = 0


@dataclass(frozen=True)
class Prompt:
    """How a problem is asked.

    Attributes:
        user: what the user writes, the problem in place of ``{problem}``.
        form: the format it asks for; ``None`` where it asks for none, and every reward is the lenient one.
        system: the system message; ``None`` leaves the chat template's own.
    """

    user: str
    form: Form | None = None
    system: str | None = None


_CATALOG = YAML(typ="safe").load(Path(__file__).with_name("catalog.yaml"))

PROBLEM_SETS: dict[str, ProblemSet] = {name: ProblemSet(**fields) for name, fields in _CATALOG["problem_sets"].items()}

PROMPTS: dict[str, Prompt] = {name: Prompt(**fields) for name, fields in _CATALOG["prompts"].items()}
"""The prompts that :func:`~tinylora_lite.load_task` knows; each goes through the model's chat template."""

PLAIN_CHAT_TEMPLATE: str = _CATALOG["plain_chat_template"]
"""For base models whose tokenizer has no chat template (Llama's, for one): ``tokenizer.chat_template = ...``."""
