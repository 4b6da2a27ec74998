"""The problem sets and prompts as data: where each set is on the hub, at which commit, and how its rows are read.

A commit is what makes a result repeatable, so each set has one, and the comment above it says who names it. Where no
public page was found that names a commit in full, the revision is what is citable: the first digits of the commit, or
the day whose last commit counts; :func:`~tinylora_lite.tasks.datasets.find_commit` looks it up in the history.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

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
    problem: tuple[str, ...] = ("problem", "question")
    answer: tuple[str, ...] = ("answer",)
    solution: tuple[str, ...] = ("solution",)
    validation: int = 0


PROBLEM_SETS: dict[str, ProblemSet] = {
    # Grade-school word problems (Cobbe et al., arXiv 2110.14168); MIT.
    # Commit: lighteval's task tables (hf_revision of openai/gsm8k).
    "gsm8k": ProblemSet(
        "openai/gsm8k",
        "e53f048856ff4f594e959d75785d2c2d37b678ee",
        {"train": 7473, "test": 1319},
        numbers=True,
        form="####",
        files={"train": "main/train-*.parquet", "test": "main/test-*.parquet"},
        solution=("answer",),
        validation=500,
    ),
    # MATH levels 3 to 5 as SimpleRL-Zoo trains on them, and MATH-500 (arXiv 2503.18892); Apache-2.0.
    # Commit: the repository's page of files, which shows seven digits.
    "math": ProblemSet(
        "hkust-nlp/SimpleRL-Zoo-Data",
        "50ec8f0",
        {"train": 8523, "test": 500},
        files={"train": "simplelr_qwen_level3to5/train.parquet", "test": "simplelr_qwen_level3to5/test.parquet"},
        problem=("question", "problem"),
        answer=("gt_answer", "answer"),
        validation=500,
    ),
    # 500 problems of MATH (Hendrycks et al., arXiv 2103.03874; Lightman et al., arXiv 2305.20050).
    # Commit: the asset check of the SWITCH C2 protocol, with the file's SHA-256, and two others.
    "math500": ProblemSet(
        "HuggingFaceH4/MATH-500",
        "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        {"test": 500},
        files={"test": "test.jsonl"},
    ),
    # Undergraduate science and mathematics (Lewkowycz et al., arXiv 2206.14858).
    # Commit: the EOPD replication's table of pinned sets (arXiv 2603.07079), and three others.
    "minerva": ProblemSet("math-ai/minervamath", "ee46ddc498933b1977577953250ca5c66be64f96", {"test": 272}),
    # China's college entrance examination of 2023 in English (Liao et al., arXiv 2401.08190); MIT.
    # Commit: the repository's page of commits.
    "gaokao": ProblemSet(
        "MARIO-Math-Reasoning/Gaokao2023-Math-En",
        "6c7bdecd205ed623b5e6c92335deb4f13a7cdd9b",
        {"test": 385},
        files={"test": "Gaokao2023-Math-En.jsonl"},
    ),
    # Olympiad problems in English without figures (He et al., arXiv 2402.14008).
    # Commit: the EOPD replication's table of pinned sets (arXiv 2603.07079), and three others.
    "olympiadbench": ProblemSet(
        "math-ai/olympiadbench",
        "4faaf1e6ec17d11a4218a9bf4c049ecaf954dd84",
        {"test": 674},
        answer=("final_answer", "answer"),
    ),
    # College textbooks (Tang et al., arXiv 2403.02884).
    # Day: the owner's page, last changed on 6 January, of 2025 to judge by its neighbours; it names no commit.
    "collegemath": ProblemSet("realtreetune/college_math", "2025-01-07", {"test": 2818}),
    # American Invitational Mathematics Examination 2024, I and II; Apache-2.0.
    # Commit: a data card that read the hub's own record of main on 11 August 2026, and two others.
    "aime24": ProblemSet(
        "math-ai/aime24",
        "83a7f387baaa524a8bda0022eac0541582297103",
        {"test": 30},
        answer=("answer", "solution"),
    ),
    # American Mathematics Competitions 12 of 2023.
    # Commit: the EOPD replication's table of pinned sets (arXiv 2603.07079), and six others.
    "amc23": ProblemSet("math-ai/amc23", "80815d37005feb82cd7f8fbc6901d5d3eff43057", {"test": 40}),
}


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
"""The prompts that :func:`~tinylora_lite.load_task` knows; each goes through the model's chat template."""

PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}Question:\n{% endif %}{{ message.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}Answer:\n{% endif %}"
)
"""For base models whose tokenizer has no chat template (Llama's, for one): ``tokenizer.chat_template = ...``.

Qwen2.5's base models have one, and know it.
"""
