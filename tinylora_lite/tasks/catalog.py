"""The problem sets: where each stands on the hub, at which commit, and how its rows are read.

A commit is what makes a result repeatable, so each has one, and the place that names it. Where no public page was found
that names a commit in full, the revision is what is citable: the first digits of the commit, or the day whose last
commit counts; :func:`~tinylora_lite.tasks.problem_files.find_commit` looks it up in the repository's history.
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
        revision: a commit of 40 digits; or its first digits; or a day, ``YYYY-MM-DD`` (UTC).
        cited: who names that revision.
        rows: how many rows each split has at that revision.
        numbers: whether answers are numbers, compared exactly, or mathematics.
        prompt: the default prompt, a key of :data:`~tinylora_lite.tasks.datasets.PROMPTS`.
        files: the files of each split, as a glob below the repository; the usual names where it is empty.
        problem, answer, solution: the columns, the first that a row has.
        validation: problems that are held out of training by default.
        licence: as the hub states it; ``None`` where that was not seen.
        paper: what it is, in a line.
    """

    hub: str
    revision: str
    cited: str
    rows: dict[Split, int]
    paper: str
    numbers: bool = False
    prompt: Literal["####", "boxed"] = "boxed"
    files: dict[Split, str] = field(default_factory=dict)
    problem: tuple[str, ...] = ("problem", "question")
    answer: tuple[str, ...] = ("answer",)
    solution: tuple[str, ...] = ("solution",)
    validation: int = 0
    licence: str | None = None

    @property
    def form(self) -> Form:
        """The format of the worked solutions."""
        return self.prompt


PROBLEM_SETS: dict[str, ProblemSet] = {
    "gsm8k": ProblemSet(
        "openai/gsm8k",
        "e53f048856ff4f594e959d75785d2c2d37b678ee",
        "lighteval's task tables (hf_revision of openai/gsm8k)",
        {"train": 7473, "test": 1319},
        "grade-school word problems (Cobbe et al., arXiv 2110.14168)",
        numbers=True,
        prompt="####",
        files={"train": "main/train-*.parquet", "test": "main/test-*.parquet"},
        solution=("answer",),
        validation=500,
        licence="mit",
    ),
    "math": ProblemSet(
        "hkust-nlp/SimpleRL-Zoo-Data",
        "50ec8f0",
        "the repository's page of files, which shows seven digits",
        {"train": 8523, "test": 500},
        "MATH levels 3 to 5 as SimpleRL-Zoo trains on them, and MATH-500 (arXiv 2503.18892)",
        files={
            "train": "simplelr_qwen_level3to5/train.parquet",
            "test": "simplelr_qwen_level3to5/test.parquet",
        },
        problem=("question", "problem"),
        answer=("gt_answer", "answer"),
        validation=500,
        licence="apache-2.0",
    ),
    "math500": ProblemSet(
        "HuggingFaceH4/MATH-500",
        "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        "the asset check of the SWITCH C2 protocol, with the file's SHA-256, and two others",
        {"test": 500},
        "500 problems of MATH (Hendrycks et al., arXiv 2103.03874; Lightman et al., arXiv 2305.20050)",
        files={"test": "test.jsonl"},
    ),
    "minerva": ProblemSet(
        "math-ai/minervamath",
        "ee46ddc498933b1977577953250ca5c66be64f96",
        "the EOPD replication's table of pinned sets (arXiv 2603.07079), and three others",
        {"test": 272},
        "undergraduate science and mathematics (Lewkowycz et al., arXiv 2206.14858)",
    ),
    "gaokao": ProblemSet(
        "MARIO-Math-Reasoning/Gaokao2023-Math-En",
        "6c7bdecd205ed623b5e6c92335deb4f13a7cdd9b",
        "the repository's page of commits",
        {"test": 385},
        "China's college entrance examination of 2023 in English (Liao et al., arXiv 2401.08190)",
        files={"test": "Gaokao2023-Math-En.jsonl"},
        licence="mit",
    ),
    "olympiadbench": ProblemSet(
        "math-ai/olympiadbench",
        "4faaf1e6ec17d11a4218a9bf4c049ecaf954dd84",
        "the EOPD replication's table of pinned sets (arXiv 2603.07079), and three others",
        {"test": 674},
        "olympiad problems in English without figures (He et al., arXiv 2402.14008)",
        answer=("final_answer", "answer"),
    ),
    "collegemath": ProblemSet(
        "realtreetune/college_math",
        "2025-01-07",
        "the owner's page: last changed on 6 January, of 2025 to judge by its neighbours; no commit is named",
        {"test": 2818},
        "college textbooks (Tang et al., arXiv 2403.02884)",
    ),
    "aime24": ProblemSet(
        "math-ai/aime24",
        "83a7f387baaa524a8bda0022eac0541582297103",
        "a data card that read the hub's own record of main on 11 August 2026, and two others",
        {"test": 30},
        "American Invitational Mathematics Examination 2024, I and II",
        answer=("answer", "solution"),
        licence="apache-2.0",
    ),
    "amc23": ProblemSet(
        "math-ai/amc23",
        "80815d37005feb82cd7f8fbc6901d5d3eff43057",
        "the EOPD replication's table of pinned sets (arXiv 2603.07079), and six others",
        {"test": 40},
        "American Mathematics Competitions 12 of 2023",
    ),
}
