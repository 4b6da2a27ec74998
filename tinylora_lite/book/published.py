"""What others have published about TinyLoRA, and what was run here, in one table.

``book/results/published.json`` holds the published numbers, each with its source: the paper's tables and figures,
those who repeated it, and evaluations of the models that it trains. ``book/results/runs`` holds a folder for each run
at full size that was sent in, with three of the files that ``tinylora train`` writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from tinylora_lite.lab.store import RESULTS as LAB
from tinylora_lite.utils.record import Run, describe

if TYPE_CHECKING:
    from pandas import DataFrame

RESULTS = LAB.parent
PUBLISHED = RESULTS / "published.json"
RUNS = RESULTS / "runs"
FILES = ("settings.yaml", "run.json", "outcome.json")
"""What a run's folder must hold, as ``tinylora train`` wrote it."""

HOW = {"P": "text or table", "F": "read off a figure", "S": "secondary source", "I": "inference"}
"""How a published number is known."""

Kind = Literal["paper", "quoted by the paper", "replication", "evaluation of the untrained model", "press"]
"""What published a number, in the order of the tables."""

COLUMNS = (
    *("model", "task", "kind", "what", "training", "parameters", "accuracy", "low", "high", "untrained"),
    *("n", "seeds", "who", "where", "url"),
)
"""Of the table. ``kind`` is one of ``Kind``; ``"run"``; or ``"not yet run"`` where a model has none on a task. Shares
(``accuracy`` with its 95 % interval, where it was measured here, and ``untrained``) are from 0 to 1."""

TRAINING = {"grpo": "RL", "sft": "SFT", None: ""}


class Source(BaseModel):
    """Who published a number; ``key`` is in ``book/references.bib``, ``warning`` says what makes its numbers weak."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Kind
    title: str
    url: str
    key: str | None = None
    warning: str | None = None


class Published(BaseModel):
    """One published number. ``None`` is what its source does not say.

    Attributes:
        model, task, method: as the source calls them, the method ``"untrained"`` for a base.
        parameters: how many were trained.
        metric: ``"accuracy"`` (a share from 0 to 1), or another in words.
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
    training: Literal["grpo", "sft"] | None = None
    rank: int | None = None
    u: int | None = None
    n_tie: int | str | None = None
    tying: str | None = None
    precision: str | None = None
    scoring: Literal["strict", "lenient"] | None = None
    decoding: str | None = None
    approximate: bool = False

    @model_validator(mode="after")
    def _shares(self) -> Published:
        if self.metric == "accuracy" and not all(0 <= share <= 1 for share in (self.value, self.untrained or 0)):
            raise ValueError("an accuracy is a share from 0 to 1")
        return self

    @property
    def what(self) -> str:
        """Method and settings in words."""
        settings = (("r", self.rank), ("u", self.u), ("n_tie", self.n_tie))
        words = [self.method, TRAINING[self.training], *(f"{name} = {value}" for name, value in settings if value)]
        how = (self.tying, self.precision, self.scoring, self.decoding, "roughly" if self.approximate else None)
        return ", ".join(word for word in (*words, *how) if word)


def load_published(path: str | Path = PUBLISHED) -> list[Published]:
    """Every published number, in the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or a row has no source, a field unknown or missing, or a value out of its range.
    """
    rows: list[Published] = []
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        sources = {key: Source(**value) for key, value in found["sources"].items()}
        for row in found["rows"]:
            if row.get("source") not in sources:
                raise ValueError(f"{row.get('source')!r} is none of the sources")
            rows.append(Published(**row | {"source": sources[row["source"]]}))
        return rows
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a list of published numbers; row {len(rows)}: {error}") from error


def recorded(folder: Path = RUNS) -> list[Path]:
    """The folders of the runs that were sent in, by name."""
    return sorted(path for path in folder.glob("*") if path.is_dir())


def load_run(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of one run, one for each task that it was scored on.

    Args:
        folder: holds ``FILES``, or is the folder of a finished experiment, where ``run.json`` may be in the subfolder
            of the learning rate that was chosen.

    Raises:
        ValueError: a file is missing or damaged, or they are of different runs.
    """
    folder = Path(folder)
    try:
        settings = YAML(typ="safe").load((folder / "settings.yaml").read_text(encoding="utf-8"))
        outcome = json.loads((folder / "outcome.json").read_text(encoding="utf-8"))
        temperature, chosen = settings["evaluation"]["temperature"], outcome["learning_rate"]
        runs = [Run.load(path) for path in sorted(folder.rglob("run.json"))]
        run = next((run for run in runs if run.settings["learning_rate"] == chosen), None)
        told = tuple(outcome[key] for key in ("adapter", "parameters", "model"))
        if run is None or (run.adapter, run.parameters, settings["model"]) != told:
            raise ValueError("the files are of different runs")
        adapter = describe(run.adapter, run.parameters) if isinstance(run.adapter, dict) else run.adapter
        decoding = "greedy" if temperature == 0 else f"temperature {temperature:g}"
        common = {
            "model": outcome["model"].rpartition("/")[2],
            "kind": "run",
            "what": f"{adapter}, {TRAINING[run.method]}, seed {run.seed}, {decoding}",
            "training": run.method,
            "parameters": run.parameters,
            "seeds": 1,
            "who": "this book",
            "where": f"runs/{folder.name}",
        }
        rows = []
        for task, base in outcome["base"].items():
            score = outcome["trained"][task]
            if base["n"] != score["n"] or not score["low"] <= score["accuracy"] <= score["high"]:
                raise ValueError(f"the scores on {task} are not of the same problems, or outside their interval")
            measured = {key: score[key] for key in ("accuracy", "low", "high", "n")}
            rows.append(common | measured | {"task": task, "untrained": base["accuracy"]})
        return rows
    except (AttributeError, KeyError, OSError, TypeError, ValueError, YAMLError) as error:
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

    rows = [_row(row) for row in load_published() if row.metric == "accuracy" and row.source.kind != "press"]
    for folder in recorded() if runs is None else runs:
        rows += load_run(folder)
    pairs = list(dict.fromkeys((row["model"], row["task"]) for row in rows))
    done = {(row["model"], row["task"]) for row in rows if row["kind"] == "run"}
    rows += [{"model": m, "task": t, "kind": "not yet run"} for m, t in pairs if (m, t) not in done]
    short = None if model is None else model.rpartition("/")[2].lower()
    chosen = [r for r in rows if short in (None, r["model"].lower()) and task in (None, r["task"])]
    if not chosen:
        known = ", ".join(sorted({name for name, _ in pairs}))
        raise LookupError(f"nothing is known of {model or 'any model'} on {task or 'any task'}; models are: {known}")
    kinds = [*get_args(Kind), "run", "not yet run"]
    chosen.sort(key=lambda row: (pairs.index((row["model"], row["task"])), kinds.index(row["kind"])))
    return DataFrame(chosen, columns=list(COLUMNS)).convert_dtypes()


def main_rows(rows: DataFrame, counts: tuple[int, ...] = (0, 13, 196), all_weights: bool = True) -> DataFrame:
    """Every run of ours, and what others trained by rewards with ``counts`` parameters, or with all weights."""
    others = rows.parameters.isin(counts) | (rows.what.str.startswith("all weights") & all_weights)
    return rows[rows.kind.isin(["run", "not yet run"]) | (others & rows.training.ne("sft").fillna(True))]


def markdown(rows: DataFrame) -> str:
    """Rows of :func:`table` as the book shows them."""
    known = rows.astype(object).where(rows.notna(), None)
    head = "| what trained | numbers | accuracy | untrained | measured on | source |\n|---|---:|---:|---:|---:|---|"
    return "\n".join([head, *(f"| {' | '.join(_cells(row))} |" for row in known.itertuples())])


def _cells(row: Any) -> Iterator[str]:
    if row.kind == "not yet run":
        yield from (row.kind, "", "", "", "", "this book")
        return
    yield row.what
    yield "" if row.parameters is None else f"{row.parameters:,}"
    yield f"{row.accuracy:.1%}" + ("" if row.low is None else f" [{row.low:.1%}, {row.high:.1%}]")
    yield "" if row.untrained is None else f"{row.untrained:.1%}"
    counted = ((row.n, "problem"), (row.seeds, "seed"))
    yield ", ".join(f"{count:,} {name}{'' if count == 1 else 's'}" for count, name in counted if count is not None)
    yield (f"{row.who}: " if row.url is None else f"[{row.who}]({row.url}): ") + row.where


def _row(row: Published) -> dict[str, Any]:
    return {
        "model": row.model.rpartition("/")[2],
        "task": row.task,
        "kind": row.source.kind,
        "what": row.what,
        "training": row.training,
        "parameters": 0 if row.method == "untrained" else row.parameters,
        "accuracy": row.value,
        "untrained": row.untrained,
        "n": row.n,
        "seeds": row.seeds,
        "who": row.source.title,
        "where": row.where + (", read off" if row.how == "F" else ""),
        "url": row.source.url,
    }
