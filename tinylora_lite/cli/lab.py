"""The lab: the paper's claims, tested in miniature. `list` them, `run` what is not recorded yet, `draw` and `table`."""

from __future__ import annotations

import argparse
import io
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tinylora_lite.cli import shared
from tinylora_lite.utils.files import atomic_write

if TYPE_CHECKING:
    from tinylora_lite.lab.claim import Claim
    from tinylora_lite.lab.store import Record, Store
    from tinylora_lite.lab.trial import Trial

EXAMPLE = "tinylora lab run rl-parameters --minutes 30"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``tinylora lab``."""
    add = parser.add_argument
    add("action", choices=("list", "run", "draw", "table"), help="what to do")
    named = "names from `tinylora lab list`, files that define CLAIM, all; or chapters, real-smollm2, real-qwen"
    add("claims", nargs="*", metavar="CLAIM", help=named)
    add("--folder", type=Path, help="the folder of the records (default: the book's)")
    add("--workers", type=shared.at_least(1), help="processes, each on one core (default: one for each core)")
    add("--minutes", type=shared.at_least(0, float), help="after which `run` starts nothing new (default: no limit)")
    scores = "answers that `draw` and `table` compare: sampled at temperature 1, or greedy (default: sampled)"
    add("--score", choices=("sampled", "greedy"), default="sampled", help=scores)
    add("--out", type=Path, help="where `draw` puts its picture (default: CLAIM.svg); .png works too")


def run(arguments: argparse.Namespace) -> None:
    """Does one of the four."""
    from tinylora_lite.lab.claims import claim_of, claims
    from tinylora_lite.lab.store import Store

    names = arguments.claims
    if arguments.action in ("run", "draw") and not names:
        raise ValueError(f"say which claim to {arguments.action}: {', '.join(claims())}, or all")
    chosen = list(claims().values()) if not names or "all" in names else [claim_of(name) for name in names]
    folders = {arguments.folder or claim.folder for claim in chosen}
    if len(folders) > 1:
        raise ValueError("the records of these are in different folders; name one alone, or give --folder")
    store = Store(folders.pop()).scored(arguments.score)
    {"list": _list, "run": _run, "draw": _draw, "table": _table}[arguments.action](chosen, store, arguments)


def _list(chosen: list[Claim], store: Store, arguments: argparse.Namespace) -> None:
    from tinylora_lite.lab.plan import progress_of

    rows = [{"claim": claim.name, "title": claim.title} | progress_of(claim, store) for claim in chosen]
    shared.show(arguments, rows, shared.table(rows))


def _run(chosen: list[Claim], store: Store, arguments: argparse.Namespace) -> None:
    from tinylora_lite.lab.running import execute

    started, made = time.monotonic(), 0

    def report(trials: list[Trial], records: list[Record], left: int) -> None:
        nonlocal made
        made += len(trials)
        accuracies = " ".join(f"{next(iter(record['scores'].values()))['accuracy']:.3f}" for record in records)
        first = trials[0]
        what = f"{first.base} {first.method} {first.numbers} r={first.rank} {first.split}"
        minutes = (time.monotonic() - started) / 60
        print(f"[{minutes:5.1f} min] {left} known to go; {what}: {accuracies}", file=sys.stderr)

    seconds = None if arguments.minutes is None else arguments.minutes * 60
    complete = execute(chosen, store, workers=arguments.workers, seconds=seconds, report=report)
    result = {"runs": made, "complete": complete, "seconds": round(time.monotonic() - started, 1)}
    left = "nothing is missing" if complete else "more to go: call it again"
    shared.show(arguments, result, f"{made} runs made; {left}.")


def _draw(chosen: list[Claim], store: Store, arguments: argparse.Namespace) -> None:
    if arguments.out is not None and len(chosen) > 1:
        raise ValueError("--out is for one claim; without it each picture is named after its claim")
    if arguments.out is not None and arguments.out.is_dir():
        raise ValueError(f"{arguments.out} is a folder; --out takes the picture's name, as in {arguments.out}/x.svg")
    written = []
    for claim in chosen:
        path = arguments.out or Path(f"{claim.name}.svg")
        picture = io.BytesIO()
        claim.draw(store).savefig(picture, format=path.suffix.lstrip(".") or "svg", facecolor="white")
        written.append(str(atomic_write(path, picture.getvalue())))
    shared.show(arguments, {"files": written}, *written)


def _table(chosen: list[Claim], store: Store, arguments: argparse.Namespace) -> None:
    from tinylora_lite.lab.plan import rows_of

    rows = rows_of(chosen, store)
    columns = {"title": "claim", "paper": "paper", "ours": "ours", "finding": "verdict"}
    table = shared.table([{name: row[key] for key, name in columns.items()} for row in rows])
    shared.show(arguments, rows, table)
