"""What others have published about TinyLoRA, and what was run here, in one table.

``book/results/published.json`` holds the published numbers, each with its source: the paper's tables and figures,
those who repeated it, and evaluations of the models that it trains. ``book/results/runs`` holds a folder for each run
at full size that was sent in, with three of the files that ``tinylora train`` writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt, TypeAdapter
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from tinylora_lite.book import glue
from tinylora_lite.lab.store import BOOK as RESULTS
from tinylora_lite.utils.record import Run, describe

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

NOT_YET = "not yet run"
"""The kind of the row that a table ends with where a model has no run on a task."""

COLUMNS = (
    *("model", "task", "kind", "what", "training", "parameters", "accuracy", "low", "high", "untrained"),
    *("n", "seeds", "who", "where", "url"),
)
"""Of the table. Shares (``accuracy`` with its 95 % interval, where it was measured here, and ``untrained``) are from 0
to 1."""

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
    """One published number, or one of a run. ``None`` is what its source does not say.

    Attributes:
        model, task, method: as the source calls them, the method ``"untrained"`` for a base.
        parameters: how many were trained.
        metric: ``"accuracy"`` (a share from 0 to 1), or another in words.
        low, high: the 95 % interval of a run's value.
        untrained: what the same source gives for the untrained model.
        seeds: the runs that ``value`` is the mean of.
        n: the problems it is measured on.
        how: how it is known, a key of ``HOW``.
        where: the table, figure, section or file of the source.
        rank, u, n_tie, tying, precision: of the adapter; for the paper inferred from its counts.
        decoding: greedy or sampled, in words.
        approximate: the source, or the reading of a figure, gives the value roughly.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    model: str
    task: str
    method: str
    parameters: NonNegativeInt | None
    metric: str
    value: FiniteFloat
    untrained: FiniteFloat | None
    seeds: PositiveInt | None
    n: PositiveInt | None
    how: Literal["P", "F", "S", "I"]
    source: Source
    where: Annotated[str, Field(pattern=r"\S")]
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    training: Literal["grpo", "sft"] | None = None
    rank: int | None = None
    u: int | None = None
    n_tie: int | str | None = None
    tying: str | None = None
    precision: str | None = None
    scoring: Literal["strict", "lenient"] | None = None
    decoding: str | None = None
    approximate: bool = False

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
    """The rows of one run, one for each task that it was scored on.

    Args:
        folder: holds ``FILES``, or is the folder of a finished experiment, where ``run.json`` may be in the subfolder
            of the learning rate that was chosen.

    Raises:
        ValueError: a file is missing or damaged, or they are of different runs.
    """
    folder = Path(folder)
    try:
        settings = YAML(typ="safe").load(folder / "settings.yaml")
        outcome = json.loads((folder / "outcome.json").read_text(encoding="utf-8"))
        temperature, chosen = settings["evaluation"]["temperature"], outcome["learning_rate"]
        runs = [Run.load(path) for path in sorted(folder.rglob("run.json"))]
        run = next((run for run in runs if run.settings["learning_rate"] == chosen), None)
        told = tuple(outcome[key] for key in ("adapter", "parameters", "model"))
        if run is None or (run.adapter, run.parameters, settings["model"]) != told:
            raise ValueError("the files are of different runs")
        common: dict[str, Any] = {
            "model": outcome["model"].rpartition("/")[2],
            "method": run.adapter if isinstance(run.adapter, str) else describe(run.adapter, run.parameters),
            "training": run.method,
            "parameters": run.parameters,
            "metric": "accuracy",
            "seeds": 1,
            "how": "P",
            "decoding": f"seed {run.seed}, {f'temperature {temperature:g}' if temperature else 'greedy'}",
            "source": HERE,
            "where": f"runs/{folder.name}",
        }
        rows = [
            {"task": task, "value": score["accuracy"], "untrained": outcome["base"][task]["accuracy"]}
            | {key: score[key] for key in ("low", "high", "n")}
            for task, score in outcome["trained"].items()
        ]
        return [Published(**common | row) for row in rows]
    except (KeyError, OSError, TypeError, ValueError, YAMLError) as error:
        raise ValueError(f"{folder} is not the record of a run ({', '.join(FILES)}): {error}") from error


def table(model: str | None = None, task: str | None = None, runs: Iterable[str | Path] | None = None) -> DataFrame:
    """The paper, those who repeated it, and every recorded run, one number a row.

    Args:
        model: as the hub calls it, with or without its owner; ``None`` takes all.
        task: as ``load_task`` calls it; ``None`` takes all.
        runs: folders of runs; ``None`` takes those that were sent in.

    Returns:
        ``COLUMNS``, with missing values where nothing is known.

    Raises:
        LookupError: nothing is known of the model on the task.
        ValueError: a run's folder is damaged.
    """
    from pandas import DataFrame

    rows = [row for row in load_published() if row.metric == "accuracy" and row.source.kind != "press"]
    rows += (row for folder in (recorded() if runs is None else runs) for row in load_run(folder))
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        values = dict(row) | {"accuracy": row.value, "kind": row.source.kind, "what": row.what}
        values |= {"who": row.source.title, "url": row.source.url}
        values["where"] += ", read off" if row.how == "F" else ""
        groups.setdefault((row.model, row.task), []).append(values)
    short = None if model is None else model.rpartition("/")[2].lower()
    chosen = []
    for (name, on), own in groups.items():
        if short in (None, name.lower()) and task in (None, on):
            chosen += sorted(own, key=lambda values: get_args(Kind).index(values["kind"]))
            if chosen[-1]["kind"] != "run":
                chosen.append({"model": name, "task": on, "kind": NOT_YET})
    if not chosen:
        known = ", ".join(sorted({name for name, _ in groups}))
        raise LookupError(f"nothing is known of {model or 'any model'} on {task or 'any task'}; models are: {known}")
    return DataFrame(chosen, columns=list(COLUMNS)).convert_dtypes()


def main_rows(rows: DataFrame, counts: tuple[int, ...] = (0, 13, 196), all_weights: bool = True) -> DataFrame:
    """Every run of ours, and what others trained by rewards with ``counts`` parameters, or with all weights."""
    others = rows.parameters.isin(counts) | (rows.what.str.startswith("all weights") & all_weights)
    return rows[rows.kind.isin(["run", NOT_YET]) | (others & rows.training.ne("sft").fillna(True))]


def markdown(rows: DataFrame) -> glue.Markdown:
    """Rows of :func:`table` as the book shows them."""
    known = rows.astype(object).where(rows.notna(), None)
    columns = ("what trained", "numbers", "accuracy", "untrained", "measured on", "source")
    return glue.table(columns, "lrrrrl", map(_cells, known.itertuples()))


def _cells(row: Any) -> tuple[str, ...]:
    if row.kind == NOT_YET:
        return (NOT_YET, "", "", "", "", HERE.title)
    counted = ((row.n, "problem"), (row.seeds, "seed"))
    return (
        row.what,
        "" if row.parameters is None else f"{row.parameters:,}",
        f"{row.accuracy:.1%}" + ("" if row.low is None else f" [{row.low:.1%}, {row.high:.1%}]"),
        "" if row.untrained is None else f"{row.untrained:.1%}",
        ", ".join(f"{count:,} {name}{'' if count == 1 else 's'}" for count, name in counted if count is not None),
        (f"{row.who}: " if row.url is None else f"[{row.who}]({row.url}): ") + row.where,
    )
