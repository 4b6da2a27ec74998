"""Numbers that others have published about TinyLoRA, every one with its source and the place where it stands.

They lie in ``book/results/published.json``: the paper's tables and figures, those who repeated it, and evaluations of
the models that it trains.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tinylora_lite.book.register_checks import fields_of
from tinylora_lite.book.runs import RESULTS

PUBLISHED = RESULTS / "published.json"

HOW = {"P": "text or table", "F": "read off a figure", "S": "secondary source", "I": "inference"}
"""How a published number is known."""

KINDS = ("paper", "quoted by the paper", "replication", "evaluation of the untrained model", "press")
"""What published it, in the order of the tables."""


@dataclass(frozen=True)
class Source:
    """Who published a number.

    Attributes:
        kind: one of ``KINDS``.
        title: a paper, or a repository at a commit.
        url: where it is.
        key: in ``book/references.bib``.
        warning: what makes its numbers weak, if something does.
    """

    kind: str
    title: str
    url: str
    key: str | None = None
    warning: str | None = None


@dataclass(frozen=True)
class Published:
    """One published number. ``None`` stands for what its source does not say.

    Attributes:
        model, task, method: as the source calls them, the method ``"untrained"`` for a base.
        parameters: how many numbers trained.
        metric: ``"accuracy"`` (a share from 0 to 1), or another in words.
        value: the number.
        untrained: what the same source gives for the untrained model.
        seeds: the runs it is the mean of.
        n: the problems it is measured on.
        how: how it is known, a key of ``HOW``.
        source: who published it.
        where: the table, figure, section or file.
        training: ``"grpo"`` or ``"sft"``.
        rank, u, n_tie, tying, precision: of the adapter; for the paper inferred from its counts.
        scoring: ``"strict"`` or ``"lenient"``.
        decoding: greedy or sampled, in words.
        approximate: the source, or the reading of a figure, gives it roughly.
    """

    model: str
    task: str
    method: str
    parameters: int | None
    metric: str
    value: float
    untrained: float | None
    seeds: int | None
    n: int | None
    how: Literal["P", "F", "S", "I"]
    source: Source
    where: str
    training: str | None = None
    rank: int | None = None
    u: int | None = None
    n_tie: int | str | None = None
    tying: str | None = None
    precision: str | None = None
    scoring: str | None = None
    decoding: str | None = None
    approximate: bool = False

    def __post_init__(self) -> None:
        if not self.where.strip():
            raise ValueError(f"{self.model}, {self.task}: a published number needs the place where it stands")
        if self.how not in HOW or self.source.kind not in KINDS:
            raise ValueError(f"{self.where}: how must be one of {', '.join(HOW)}, the kind one of {', '.join(KINDS)}")
        numbers = [self.value, *([] if self.untrained is None else [self.untrained])]
        if not all(isinstance(number, float) and math.isfinite(number) for number in numbers):
            raise ValueError(f"{self.where}: value and untrained must be finite floats, not {numbers}")
        if self.metric == "accuracy" and not all(0 <= number <= 1 for number in numbers):
            raise ValueError(f"{self.where}: an accuracy is a share from 0 to 1, not {numbers}")
        for name, least in (("parameters", 0), ("seeds", 1), ("n", 1)):
            count = getattr(self, name)
            if count is not None and (type(count) is not int or count < least):
                raise ValueError(f"{self.where}: {name} must be a whole number of at least {least}, not {count!r}")


def load_published(path: str | Path = PUBLISHED) -> list[Published]:
    """Every published number, in the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or a row has no source, a field unknown or missing, or a value out of its range.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        sources = {key: Source(**fields_of(Source, value, f"source {key}")) for key, value in found["sources"].items()}
        rows = []
        for number, row in enumerate(found["rows"]):
            values = fields_of(Published, row, f"row {number}")
            if values["source"] not in sources:
                raise ValueError(f"row {number}: {values['source']!r} is none of the sources")
            rows.append(Published(**values | {"source": sources[values["source"]]}))
        return rows
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no list of published numbers: {error}") from error
