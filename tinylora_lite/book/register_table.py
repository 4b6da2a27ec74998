"""What was published and what is recorded, side by side, every row with its source.

Where nobody has sent in a run of a model on a task, the table says so.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tinylora_lite.book.published import KINDS, Published, load_published
from tinylora_lite.book.runs import Measured, Result, collect

if TYPE_CHECKING:
    from rich.table import Table as RichTable

TRAINING = {"grpo": "RL", "sft": "SFT"}


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        who: the source's title, or who sent in the run.
        what: method and settings in words.
        parameters: how many numbers trained; ``None`` where it is not known, or nothing has run.
        value: the accuracy, from 0 to 1; ``None`` where nothing has run.
        interval: its 95 % interval where it was measured here.
        untrained: the same for the untrained model.
        n, seeds: problems and runs.
        where: where the number stands: table, figure, file; for a run of the register the name of its file.
        url: of the source; empty for the register.
    """

    who: str
    what: str
    parameters: int | None = None
    value: float | None = None
    interval: tuple[float, float] | None = None
    untrained: float | None = None
    n: int | None = None
    seeds: int | None = None
    where: str = ""
    url: str = ""


COLUMNS = ("what trained", "numbers", "accuracy", "untrained", "measured on", "source")
_NUMBERS = range(1, 5)


@dataclass(frozen=True)
class Table:
    """Rows under a caption, for a page, a notebook and a terminal."""

    caption: str
    rows: tuple[Row, ...] = field(repr=False)

    def cells(self, row: Row) -> tuple[str, ...]:
        """A row as text, one for each of ``COLUMNS``."""
        if row.value is None:
            return (row.what, *[""] * len(_NUMBERS), row.who)
        measured = f"{row.value:.1%}" + ("" if row.interval is None else " [{:.1%}, {:.1%}]".format(*row.interval))
        return (
            row.what,
            "" if row.parameters is None else f"{row.parameters:,}",
            measured,
            "" if row.untrained is None else f"{row.untrained:.1%}",
            ", ".join(filter(None, (_several(row.n, "problem"), _several(row.seeds, "seed")))),
            f"{row.who}: {row.where}",
        )

    def markdown(self) -> str:
        """A table that Markdown pages and GitHub show."""
        lines = ["| " + " | ".join(COLUMNS) + " |"]
        lines.append("|" + "".join("---:|" if place in _NUMBERS else "---|" for place in range(len(COLUMNS))))
        for row in self.rows:
            *cells, source = (cell.replace("|", "\\|") for cell in self.cells(row))
            if row.url:
                source = source.replace(row.who, f"[{row.who}]({row.url})", 1)
            lines.append("| " + " | ".join([*cells, source]) + " |")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        heads = "".join(f'<th scope="col">{column}</th>' for column in COLUMNS)
        body = []
        for row in self.rows:
            what, *numbers, source = map(html.escape, self.cells(row))
            if row.url:
                who = html.escape(row.who)
                link = f'<a class="reference external" href="{html.escape(row.url)}">{who}</a>'
                source = source.replace(who, link, 1)
            cells = "".join(f'<td class="text-right">{number}</td>' for number in numbers)
            body.append(f'<tr><th scope="row">{what}</th>{cells}<td>{source}</td></tr>')
        return (
            '<div class="pst-scrollable-table-container" tabindex="0"><table class="table">'
            f"<caption>{html.escape(self.caption)}</caption><thead><tr>{heads}</tr></thead>"
            f"<tbody>{''.join(body)}</tbody></table></div>"
        )

    def rich(self) -> RichTable:
        """The table for a terminal."""
        from rich import box
        from rich.table import Table as RichTable

        drawn = RichTable(
            title=self.caption, title_justify="left", box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0)
        )
        for place, column in enumerate(COLUMNS):
            number = place in _NUMBERS
            drawn.add_column(column, justify="right" if number else "left", no_wrap=number, overflow="fold")
        for row in self.rows:
            drawn.add_row(*self.cells(row))
        return drawn


def table(
    model: str | None = None,
    task: str | None = None,
    *,
    published: Sequence[Published] | None = None,
    results: Iterable[Result] | None = None,
) -> Table:
    """The paper, those who repeated it, and every recorded run of a model on a task.

    Args:
        model: as the hub calls it, with or without its owner; ``None`` takes all that were published or recorded.
        task: as ``load_task`` calls it; ``None`` takes all.
        published: what was published; ``None`` reads ``published.json``.
        results: the register; ``None`` reads it.

    Raises:
        ValueError: nothing was published or recorded of the model on the task.
    """
    published = load_published() if published is None else published
    published = [row for row in published if row.metric == "accuracy" and row.source.kind != "press"]
    recorded = [(result, score) for result in (collect() if results is None else results) for score in result.scores]
    pairs = dict.fromkeys(
        [(_short(row.model), row.task) for row in published] + [(_short(r.model), s.task) for r, s in recorded]
    )
    wanted = [
        (name, kind)
        for name, kind in pairs
        if (model is None or name.lower() == _short(model).lower()) and (task is None or kind == task)
    ]
    if not wanted:
        known = ", ".join(sorted({name for name, _ in pairs}))
        raise ValueError(f"nothing is known of {model or 'any model'} on {task or 'any task'}; the models are: {known}")
    rows: list[Row] = []
    for name, kind in wanted:
        label = "" if len(wanted) == 1 else f"{name}, {kind}: "
        own = [row for row in published if (_short(row.model), row.task) == (name, kind)]
        rows += [_of_published(row, label) for row in sorted(own, key=lambda row: KINDS.index(row.source.kind))]
        runs = [
            _of_result(r, s, label) for r, s in recorded if (_short(r.model).lower(), s.task) == (name.lower(), kind)
        ]
        rows += runs or [Row("this book", f"{label}not yet run")]
    title = " on ".join(word for word in (model and _short(model), task) if word) or "Everything on record"
    return Table(title, tuple(rows))


def _several(count: int | None, what: str) -> str:
    return "" if count is None else f"{count:,} {what}{'' if count == 1 else 's'}"


def _short(model: str) -> str:
    return model.rpartition("/")[2]


def _of_published(row: Published, label: str) -> Row:
    words = [row.method, TRAINING.get(row.training or "", "")]
    words += [f"{name} = {value}" for name, value in (("r", row.rank), ("u", row.u), ("n_tie", row.n_tie)) if value]
    words += [word for word in (row.tying, row.precision, row.scoring, row.decoding) if word]
    if row.approximate:
        words.append("roughly")
    return Row(
        row.source.title,
        label + ", ".join(word for word in words if word),
        row.parameters if row.method != "untrained" else 0,
        row.value,
        untrained=row.untrained,
        n=row.n,
        seeds=row.seeds,
        where=row.where + (", read off" if row.how == "F" else ""),
        url=row.source.url,
    )


def _of_result(result: Result, score: Measured, label: str) -> Row:
    adapted = score.adapted
    way = "greedy" if score.temperature == 0 else f"temperature {score.temperature:g}"
    return Row(
        f"this book, {result.sent_by}",
        f"{label}{result.adapter}, {TRAINING[result.method]}, seed {result.seed}, {way}",
        result.parameters,
        adapted["accuracy"],
        (adapted["low"], adapted["high"]),
        score.base["accuracy"],
        int(adapted["n"]),
        1,
        f"runs/{result.name}.json",
    )
