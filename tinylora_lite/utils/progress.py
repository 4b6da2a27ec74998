"""A progress bar on a terminal, and nothing in a log, a pipe or a notebook's stored output."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(name: str, total: int, done: int = 0, show: bool = True) -> Iterator[Callable[[str], None]]:
    """Shows a bar on standard error while the block runs; calling what it yields moves it on by one.

    Args:
        name: what is going on.
        total: steps in all.
        done: steps behind us.
        show: ``False`` shows nothing; nor is anything shown where standard error is no terminal.

    Yields:
        ``advance(note)``: one step is done; the note is shown beside the bar.
    """
    if not (show and sys.stderr.isatty()):
        yield lambda note: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(name),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=done)

        def advance(note: str) -> None:
            bar.update(task, advance=1, description=note)

        yield advance
