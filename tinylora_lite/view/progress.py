"""The progress of a run: a live display on a terminal, plain lines in a log, nothing in a library call."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Self, TextIO

from rich import progress
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tinylora_lite.evaluation.score import Score

COLOURS = ("#D55E00", "#009E73", "#0072B2")
"""One for each run in order, of those in the book's figures."""

LOG_EVERY = 30.0
"""Seconds without a line after which a log gets one."""


class Progress:
    """The state of a run, shown nowhere; subclasses show it.

    Attributes:
        bar: the current phase, the time it took and the time it may still take, for rich to print.
        steps: the length of a complete curve.
        measure: what the curves hold, ``"reward"`` or ``"loss"``.
        curves, lengths: a value and the mean tokens of a completion per step, by the name of the run.
        vectors: the trained parameters at the last step, by the name of the run.
        scores: pass@1 by the name of what was evaluated.
    """

    def __init__(self) -> None:
        self.bar = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=20),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            speed_estimate_period=3600,  # one step of training can take minutes
        )
        self._task = self.bar.add_task("", total=None)
        self.steps, self.measure = 1, "reward"
        self.curves: dict[str, list[float]] = {}
        self.lengths: dict[str, list[float]] = {}
        self.vectors: dict[str, list[float]] = {}
        self.scores: dict[str, Score] = {}

    def begin(self, phase: str, total: int = 0) -> None:
        """Starts a phase of ``total`` parts; 0 means unknown."""
        self.bar.remove_task(self._task)
        self._task = self.bar.add_task(phase, total=total or None)
        self.tell(phase)

    def advance(self, done: int, total: int) -> None:
        """``done`` of ``total`` parts of the phase are over."""
        self.bar.update(self._task, completed=done, total=total)
        self.tell(f"  {done:,} of {total:,}", minor=True)

    def step(self, name: str, curve: Sequence[float], vectors: Sequence[float]) -> None:
        """A run made a step of training; ``curve`` has one value for each of its steps so far."""
        self.vectors[name], self.curves[name] = list(vectors), list(curve)  # v first: Live draws in a thread
        self.bar.update(self._task, completed=len(curve))
        self.tell(f"  {name}: step {len(curve)} of {self.steps}, {self.measure} {curve[-1]:.3f}")

    def scored(self, name: str, score: Score) -> None:
        """An evaluation ended."""
        self.scores[name] = score
        self.tell(f"  {name}: pass@1 {score}")

    def tell(self, line: str, minor: bool = False) -> None:
        """Shows a change that ``line`` describes; ``minor`` ones may be left out."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None


class PlainProgress(Progress):
    """A line for each phase, step and score, and every ``LOG_EVERY`` seconds in between; on stderr by default."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()
        self._stream = stream
        self._started = self._told = time.perf_counter()

    def tell(self, line: str, minor: bool = False) -> None:
        now = time.perf_counter()
        if not minor or now - self._told >= LOG_EVERY:
            print(f"[{now - self._started:6.1f} s] {line}", file=self._stream or sys.stderr, flush=True)
            self._told = now


class LiveProgress(Progress):
    """A display that is drawn four times a second and disappears at the end; printed later, it shows the results."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._live = Live(Group(self.bar, self), console=console, transient=True, vertical_overflow="crop")

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(8, min(60, options.max_width - 34))
        runs = Table.grid(padding=(0, 1, 0, 0))
        for number, (name, curve) in enumerate(list(self.curves.items())):
            colour, v = COLOURS[number % len(COLOURS)], self.vectors[name]
            line = sparkline(curve, width, (0.0, 1.0) if self.measure == "reward" else (0.0,), self.steps)
            runs.add_row(Text(name, colour), Text(line, colour), f"{self.measure} {curve[-1]:.2f}")
            if v:
                line = sparkline(v[:width], width, [-value for value in v])
                runs.add_row("  v", Text(line, colour), f"±{max(map(abs, v)):.3g}")
        yield runs
        if self.scores:
            yield score_table(self.scores)


def progress_for(console: Console, plain: bool = False) -> Progress:
    """The live display where the console is a terminal that can show it, and plain lines on stderr otherwise."""
    can_draw = console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")
    return LiveProgress(console) if can_draw and not plain else PlainProgress()


def sparkline(values: Sequence[float], width: int, scale: Sequence[float], length: int = 0) -> str:
    """Values as a row of at most ``width`` blocks, the mean of those that share a block.

    The scale includes ``scale``, too. A row that is complete with ``length`` values leaves space for those to come.

    >>> sparkline([0.1, 0.5, 1.0], 8, (0.0, 1.0), length=4)
    '▁▅█ '
    """
    finite = [value for value in (*values, *scale) if math.isfinite(value)]
    low, reach = min(finite, default=0.0), max(finite, default=0.0) - min(finite, default=0.0)
    length = max(length, len(values))
    blocks, width = "", min(width, length)
    for i in range(width):
        part = [value for value in values[i * length // width : (i + 1) * length // width] if math.isfinite(value)]
        height = (sum(part) / len(part) - low) / reach if part and reach else 0.0
        blocks += "▁▂▃▄▅▆▇█"[min(7, int(8 * height))] if part else " "
    return blocks


def score_table(scores: Mapping[str, Score]) -> Table:
    """pass@1 with its 95 % interval, one row for each score; the interval is drawn on a scale from 0 to 100 %."""
    titles = ("", "pass@1 [95 % interval]", "0    50   100")
    table = Table(*titles, box=None, padding=(0, 1, 0, 0), show_header=bool(scores))
    for name, score in list(scores.items()):
        low, middle, high = (round(12 * min(1.0, max(0.0, x))) for x in (score.low, score.accuracy, score.high))
        scale = "".join("●" if i == middle else "━" if low <= i <= high else "·" for i in range(13))
        lenient = "" if score.lenient is None else f", lenient {score.lenient.accuracy:.1%}"
        table.add_row(Text(name), f"{score}{lenient}", scale)
    if not scores:
        table.add_row("not evaluated yet")
    return table
