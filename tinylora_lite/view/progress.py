"""Progress for people: a live picture on a terminal, plain lines in a log, nothing in a library call."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tinylora_lite.evaluation.score import Score
from tinylora_lite.view.braille import Canvas

COLOURS = ("#D55E00", "#009E73", "#0072B2")
"""Okabe and Ito's, in the order in which the lines appear; the book's figures use the same."""

WIDE = 96
"""Columns from which plot and table stand side by side."""

SIDE = 44
"""Columns of the table then."""

BARS_HEIGHT = 5
"""Rows of the bars of one adapter, the frame included."""


@dataclass
class Progress:
    """What is going on; a subclass shows it.

    Attributes:
        phase: what is done now, in words.
        done, total: how far it is; ``total=0`` where nobody knows.
        steps: the length of the curves when they are complete.
        curves: mean reward of every step, 0 to 1, by the name of the adapter.
        lengths: mean tokens of a completion in every step, by the same names, where completions are sampled.
        vectors: the trained numbers as they are now, by the same names.
        scores: pass@1 by the name of what was evaluated.
    """

    phase: str = ""
    done: int = 0
    total: int = 0
    steps: int = 1
    curves: dict[str, list[float]] = field(default_factory=dict)
    lengths: dict[str, list[float]] = field(default_factory=dict)
    vectors: dict[str, list[float]] = field(default_factory=dict)
    scores: dict[str, Score] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def begin(self, phase: str, total: int = 0) -> None:
        """A new phase of ``total`` parts."""
        self.phase, self.done, self.total = phase, 0, total

    def advance(self, done: int, total: int) -> None:
        """``done`` of ``total`` parts of the phase are over."""
        self.done, self.total = done, total

    def step(self, name: str, rewards: Sequence[float], vectors: Sequence[float]) -> None:
        """An adapter has made a step of training."""
        self.curves[name], self.vectors[name] = list(rewards), list(vectors)
        self.done = len(rewards)

    def scored(self, name: str, score: Score) -> None:
        """Something was evaluated."""
        self.scores[name] = score

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class PlainProgress(Progress):
    """One line for every phase, step and score, on stderr by default."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()
        self._stream = stream

    def _say(self, text: str) -> None:
        seconds = time.perf_counter() - self.started
        print(f"[{seconds:6.1f} s] {text}", file=self._stream or sys.stderr, flush=True)

    def begin(self, phase: str, total: int = 0) -> None:
        """A new phase, in a line."""
        super().begin(phase, total)
        self._say(phase)

    def step(self, name: str, rewards: Sequence[float], vectors: Sequence[float]) -> None:
        """A step of training, in a line."""
        super().step(name, rewards, vectors)
        self._say(f"  {name}: step {len(rewards)} of {self.steps}, reward {rewards[-1]:.3f}")

    def scored(self, name: str, score: Score) -> None:
        """A score, in a line."""
        super().scored(name, score)
        self._say(f"  {name}: pass@1 {score}")


class LiveProgress(Progress):
    """A picture that is drawn anew four times a second and disappears at the end."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._live = Live(self, console=console, transient=True, refresh_per_second=4, vertical_overflow="crop")

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield picture(self, options.max_width, console.height)


def progress_for(console: Console, plain: bool = False) -> Progress:
    """The picture where the console is a terminal that can show it, and plain lines on stderr otherwise."""
    can_draw = console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")
    return LiveProgress(console) if can_draw and not plain else PlainProgress()


def picture(progress: Progress, width: int, height: int) -> Group:
    """Curves, scores, numbers and the phase, within ``width`` columns and, where it can be, ``height`` rows."""
    styles = dict(zip(progress.curves, COLOURS, strict=False))
    wide = width >= WIDE
    side = SIDE if wide else width
    scores = _panel("pass@1 on test problems", score_table(progress.scores, styles), side)
    bars = [_bars(name, values, styles[name], side) for name, values in progress.vectors.items()]
    room = height - 8 if wide else height - 10 - len(progress.scores) - BARS_HEIGHT * len(bars)
    plot_width = width - SIDE - 1 if wide else width
    plot = _curves(progress, styles, plot_width - 4, max(5, min(16 if wide else 12, room)))
    curves = _panel("reward of each training step", plot, plot_width)
    if wide:
        body = Table.grid(padding=(0, 1, 0, 0))
        body.add_row(curves, Group(scores, *bars))
        return Group(body, _phase(progress, width))
    return Group(curves, scores, *(bars if room >= 5 else []), _phase(progress, width))


def score_table(scores: Mapping[str, Score], styles: Mapping[str, str] | None = None) -> Table:
    """pass@1 and its 95 % interval, one row for each score, drawn on a scale from 0 to 100 %."""
    table = Table(box=None, padding=(0, 1, 0, 0), show_header=bool(scores))
    table.add_column("")
    table.add_column("pass@1", justify="right")
    table.add_column("95 %", justify="right")
    table.add_column("0    50   100")
    for name, score in scores.items():
        interval = f"{100 * score.low:.0f}-{100 * score.high:.0f}"
        style = (styles or {}).get(name, "")
        table.add_row(Text(name, style), f"{100 * score.accuracy:.1f}", interval, Text(_scale(score), style))
    if not scores:
        table.add_row(Text("not evaluated yet", "dim"))
    return table


def _scale(score: Score, width: int = 13) -> str:
    low, middle, high = (round(value * (width - 1)) for value in (score.low, score.accuracy, score.high))
    return "".join("●" if i == middle else "━" if low <= i <= high else "·" for i in range(width))


def _panel(title: str, content: RenderableType, width: int) -> Panel:
    return Panel(content, title=title, title_align="left", border_style="dim", width=width)


def _phase(progress: Progress, width: int) -> Table:
    seconds = int(time.perf_counter() - progress.started)
    line = Table.grid(padding=(0, 1))
    cells: list[RenderableType] = [Text(f"{seconds // 60}:{seconds % 60:02d}", "dim"), Text(progress.phase, "bold")]
    if progress.total:
        bar = ProgressBar(progress.total, progress.done, width=max(10, min(30, width - 50)))
        cells += [bar, f"{progress.done}/{progress.total}"]
    line.add_row(*cells)
    return line


def _curves(progress: Progress, styles: Mapping[str, str], width: int, height: int) -> Group:
    labels = 5
    canvas = Canvas(width - labels, height)
    right, bottom = canvas.width * 2 - 1, canvas.height * 4 - 1
    base = next(iter(progress.scores.values()), None)
    if base is not None:
        for x in range(0, right, 6):
            canvas.line(x, round((1 - base.accuracy) * bottom), x + 1, round((1 - base.accuracy) * bottom), "dim")
    for name, rewards in progress.curves.items():
        points = [
            (round(i * right / max(1, progress.steps - 1)), round((1 - reward) * bottom))
            for i, reward in enumerate(rewards)
        ]
        for start, end in zip(points, points[1:] or points, strict=False):
            canvas.line(*start, *end, styles[name])
    rows = canvas.rows()
    ticks = {0: "1.0", height // 2: "0.5", height - 1: "0.0"}
    lines = [Text(f"{ticks.get(i, ''):>{labels - 1}} ").append_text(row) for i, row in enumerate(rows)]
    legend = Text(" " * labels)
    for name, rewards in progress.curves.items():
        legend.append("━ ", styles[name]).append(f"{name} {rewards[-1]:.2f}   ")
    if base is not None:
        legend.append("┄ base", "dim")
    axis = Text(f"{' ' * labels}step 1{f'step {progress.steps}':>{max(0, width - labels - 6)}}", "dim")
    return Group(*lines, axis, legend)


def _bars(name: str, values: Sequence[float], style: str, width: int) -> Panel:
    most = max(map(abs, values), default=0.0)
    shown = values[:20]
    canvas = Canvas(2 * len(shown), BARS_HEIGHT - 2)
    middle = canvas.height * 2
    for i, value in enumerate(shown):
        reach = round(value / most * middle) if most else 0
        for x in (4 * i, 4 * i + 1):
            if reach > 0:
                canvas.line(x, middle - 1, x, middle - reach, style)
            elif reach < 0:
                canvas.line(x, middle, x, middle - 1 - reach, style)
    return _panel(f"v of {name}, up to ±{most:.3f}", Group(*canvas.rows()), width)
