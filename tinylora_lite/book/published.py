"""What others have published about TinyLoRA, and what was run here, in one table.

``book/results/published.json`` holds the published numbers, each with its source. ``book/results/runs`` holds a folder
for each run at full size that was sent in, with three of the files that ``tinylora train`` writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt, TypeAdapter

from tinylora_lite.book import glue
from tinylora_lite.lab.store import BOOK as RESULTS
from tinylora_lite.utils.record import describe

if TYPE_CHECKING:
    from pandas import DataFrame

PUBLISHED = RESULTS / "published.json"
RUNS = RESULTS / "runs"
FILES = ("settings.yaml", "run.json", "outcome.json")
"""What a run's folder must hold, as ``tinylora train`` wrote it."""

HOW = {"P": "text or table", "F": "read off a figure", "S": "secondary source", "I": "inference"}
"""How a published number is known."""

Kind = Literal["paper", "quoted by the paper", "replication", "evaluation of the untrained model", "press", "run"]
"""What gave a number, in the order of the tables."""

COLUMNS = (
    *("model", "task", "kind", "what", "training", "parameters", "accuracy", "low", "high", "untrained"),
    *("n", "seeds", "who", "where", "url"),
)
"""Of the table. ``accuracy`` with the 95 % interval of a run, and ``untrained``, are shares from 0 to 1."""

TRAINING = {"grpo": "RL", "sft": "SFT", None: ""}


class Source(BaseModel):
    """Who published a number; ``key`` is in ``book/references.bib``, ``warning`` says what makes its numbers weak."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Kind
    title: str
    url: str | None = None
    key: str | None = None
    warning: str | None = None


class Published(BaseModel):
    """One published number, or one of a run. ``None`` is what its source does not say."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    model: str
    task: str
    method: str  # as its source calls it; "untrained" for a base
    parameters: NonNegativeInt | None  # that were trained
    metric: str  # "accuracy", a share from 0 to 1, or another in words
    value: FiniteFloat
    low: FiniteFloat | None = None  # the 95 % interval of a run
    high: FiniteFloat | None = None
    untrained: FiniteFloat | None  # the value that the same source gives for the untrained model
    seeds: PositiveInt | None  # the runs that the value is the mean of
    n: PositiveInt | None  # the problems that it is measured on
    how: Literal["P", "F", "S", "I"]
    source: Source
    where: Annotated[str, Field(pattern=r"\S")]  # the table, figure, section or file of the source
    training: Literal["grpo", "sft"] | None = None
    rank: int | None = None  # this and the next four are of the adapter; the paper's are inferred from its counts
    u: int | None = None
    n_tie: int | str | None = None
    tying: str | None = None
    precision: str | None = None
    scoring: Literal["strict", "lenient"] | None = None
    decoding: str | None = None  # greedy or sampled, in words
    approximate: bool = False  # given, or read off, roughly

    @property
    def what(self) -> str:
        """Method and settings in words."""
        settings = (("r", self.rank), ("u", self.u), ("n_tie", self.n_tie))
        words = [self.method, TRAINING[self.training], *(f"{name} = {value}" for name, value in settings if value)]
        how = (self.tying, self.precision, self.scoring, self.decoding, "roughly" if self.approximate else None)
        return ", ".join(word for word in (*words, *how) if word)


HERE = Source(kind="run", title="this book")


def load_published() -> list[Published]:
    """Every published number, in the order of the file.

    Raises:
        ValueError: a row has no source, a field unknown or missing, or a value out of its range.
    """
    found = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    rows = [row | {"source": found["sources"].get(row.get("source"))} for row in found["rows"]]
    return TypeAdapter(list[Published]).validate_python(rows)


def recorded() -> list[Path]:
    """The folders of the runs that were sent in, by name."""
    return sorted(path for path in RUNS.glob("*") if path.is_dir())


def load_run(folder: str | Path) -> list[Published]:
    """The rows of one run, one for each task that it was scored on, from ``outcome.json`` in its folder.

    Raises:
        ValueError: the file is missing or damaged.
    """
    path = Path(folder) / "outcome.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        adapter, temperature = found["adapter"], found.get("temperature")
        decoding = f"temperature {temperature:g}" if temperature else "greedy"
        common: dict[str, Any] = {
            "model": found["model"].rpartition("/")[2],
            "method": adapter if isinstance(adapter, str) else describe(adapter, found["parameters"]),
            "training": found["method"],
            # Version 0.1.0 first wrote neither.
            "decoding": None if temperature is None else f"seed {found['seed']}, {decoding}",
            "where": f"runs/{path.parent.name}",
        }
        common |= {"parameters": found["parameters"], "metric": "accuracy", "seeds": 1, "how": "P", "source": HERE}
        rows = []
        for task, score in found["trained"].items():
            values = {"value": score["accuracy"], "untrained": found["base"][task]["accuracy"]}
            rows.append(Published(task=task, low=score["low"], high=score["high"], n=score["n"], **values, **common))
        return rows
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the outcome of a run: {error}") from error


def table(model: str | None = None, task: str | None = None, runs: Iterable[str | Path] | None = None) -> DataFrame:
    """The paper, those who repeated it, and every recorded run, one number a row, with the columns ``COLUMNS``.

    Args:
        model: as the hub calls it, with or without its owner; ``None`` takes all.
        task: as ``load_task`` calls it; ``None`` takes all.
        runs: folders of runs; ``None`` takes those that were sent in.

    Raises:
        LookupError: nothing is known of the model on the task.
        ValueError: a run's folder is damaged.
    """
    from pandas import DataFrame

    rows = [row for row in load_published() if row.metric == "accuracy" and row.source.kind != "press"]
    rows += (row for folder in (recorded() if runs is None else runs) for row in load_run(folder))
    name, known = model and model.rpartition("/")[2].lower(), ", ".join(sorted({row.model for row in rows}))
    rows = [row for row in rows if name in (None, row.model.lower()) and task in (None, row.task)]
    if not rows:
        raise LookupError(f"nothing is known of {model or 'any model'} on {task or 'any task'}; models are: {known}")
    values = []
    for row in sorted(rows, key=lambda row: get_args(Kind).index(row.source.kind)):
        where = row.where + (", read off" if row.how == "F" else "")
        source = {"kind": row.source.kind, "who": row.source.title, "where": where, "url": row.source.url}
        values.append(dict(row) | source | {"what": row.what, "accuracy": row.value})
    return DataFrame(values, columns=list(COLUMNS)).convert_dtypes()


def main_rows(rows: DataFrame, counts: tuple[int, ...] = (0, 13, 196), all_weights: bool = True) -> DataFrame:
    """Every run of ours, and what others trained by rewards with ``counts`` parameters, or with all weights."""
    others = rows.parameters.isin(counts) | (rows.what.str.startswith("all weights") & all_weights)
    return rows[rows.kind.eq("run") | (others & rows.training.ne("sft").fillna(True))]


def markdown(rows: DataFrame) -> glue.Markdown:
    """Rows of :func:`table` as the book shows them; where none is a run, the last line says so."""
    known = rows.astype(object).where(rows.notna(), None)
    columns = ("what trained", "numbers", "accuracy", "untrained", "measured on", "source")
    missing = [] if rows.kind.eq("run").any() else [("not yet run", "", "", "", "", HERE.title)]
    return glue.table(columns, "lrrrrl", [*map(_cells, known.itertuples()), *missing])


def _cells(row: Any) -> tuple[str, ...]:
    counted = ((row.n, "problem"), (row.seeds, "seed"))
    return (
        row.what,
        "" if row.parameters is None else f"{row.parameters:,}",
        f"{row.accuracy:.1%}" + ("" if row.low is None else f" [{row.low:.1%}, {row.high:.1%}]"),
        "" if row.untrained is None else f"{row.untrained:.1%}",
        ", ".join(f"{count:,} {name}{'' if count == 1 else 's'}" for count, name in counted if count is not None),
        (f"{row.who}: " if row.url is None else f"[{row.who}]({row.url}): ") + row.where,
    )
