"""The lab: the paper's claims, tested in miniature. `list` them, `run` what is not recorded yet, `draw` and `table`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from tinylora_lite.lab.claim import Claim
    from tinylora_lite.lab.store import Record, Store
    from tinylora_lite.lab.trial import Trial

EXAMPLE = "tinylora lab run rl-parameters --minutes 30"
SEED_HELP = "taken by every command; the claims set the seeds of the lab's runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``tinylora lab``."""
    parser.add_argument("action", choices=("list", "run", "draw", "table"), help="what to do")
    parser.add_argument(
        "claims",
        nargs="*",
        metavar="CLAIM",
        help="names from `tinylora lab list`, paths of files that define CLAIM, or all; "
        "chapters: the runs of the book's first chapters",
    )
    parser.add_argument("--folder", type=Path, help="the folder of the records (default: the book's)")
    parser.add_argument("--workers", type=_whole, help="processes, each on one core (default: one for each core)")
    parser.add_argument("--minutes", type=_minutes, help="after which `run` starts nothing new (default: no limit)")
    parser.add_argument(
        "--score",
        choices=("sampled", "greedy"),
        default="sampled",
        help="by which answers `draw` and `table` compare: one sampled at temperature 1, or the greedy one "
        "(default: sampled)",
    )
    parser.add_argument("--out", type=Path, help="where `draw` puts its picture (default: CLAIM.svg); .png works too")


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
        raise ValueError("the records of `chapters` are in a folder of their own; name it alone, or give --folder")
    store = Store(folders.pop()).scored(arguments.score)
    {"list": _list, "run": _run, "draw": _draw, "table": _table}[arguments.action](chosen, store, arguments)


def _list(chosen: list[Claim], store: Store, arguments: argparse.Namespace) -> None:
    from tinylora_lite.lab.plan import progress_of

    runs = [progress_of(claim, store) for claim in chosen]
    if arguments.json:
        pairs = zip(chosen, runs, strict=True)
        print(json.dumps([{"claim": claim.name, "title": claim.title} | of_claim for claim, of_claim in pairs]))
        return
    table = Table("claim", "what it says", "runs", "to go", box=box.SIMPLE)
    for claim, of_claim in zip(chosen, runs, strict=True):
        table.add_row(claim.name, claim.title, str(of_claim["recorded"]), str(of_claim["missing"] or "done"))
    Console().print(table)


def _run(chosen: list[Claim], store: Store, arguments: argparse.Namespace) -> None:
    from tinylora_lite.lab.running import execute

    started, made = time.monotonic(), 0

    def report(trials: list[Trial], records: list[Record], left: int) -> None:
        nonlocal made
        made += len(trials)
        accuracies = " ".join(f"{record['scores']['sampled']['accuracy']:.3f}" for record in records)
        first = trials[0]
        what = f"{first.base} {first.method} {first.numbers} r={first.rank} {first.split}"
        print(
            f"[{(time.monotonic() - started) / 60:5.1f} min] {left} known to go; {what}: {accuracies}", file=sys.stderr
        )

    seconds = None if arguments.minutes is None else arguments.minutes * 60
    complete = execute(chosen, store, workers=arguments.workers, seconds=seconds, report=report)
    if arguments.json:
        print(json.dumps({"runs": made, "complete": complete, "seconds": round(time.monotonic() - started, 1)}))
    else:
        Console().print(f"{made} runs made; {'nothing is missing' if complete else 'more to go: call it again'}.")


def _draw(chosen: list[Claim], store: Store, arguments: argparse.Namespace) -> None:
    if arguments.out is not None and len(chosen) > 1:
        raise ValueError("--out is for one claim; without it each picture is named after its claim")
    if arguments.out is not None and arguments.out.is_dir():
        raise ValueError(f"{arguments.out} is a folder; --out takes the picture's name, as in {arguments.out}/x.svg")
    written = []
    for claim in chosen:
        path = arguments.out or Path(f"{claim.name}.svg")
        temporary = path.with_name(f".{path.name}")
        claim.draw(store).savefig(temporary, format=path.suffix.lstrip(".") or "svg", facecolor="white")
        temporary.replace(path)
        written.append(str(path))
    print(json.dumps({"files": written}) if arguments.json else "\n".join(written))


def _table(chosen: list[Claim], store: Store, arguments: argparse.Namespace) -> None:
    from tinylora_lite.lab.plan import rows_of

    rows = rows_of(chosen, store)
    if arguments.json:
        print(json.dumps(rows))
        return
    table = Table("claim", "paper", "ours", "verdict", box=box.SIMPLE)
    for row in rows:
        table.add_row(row["title"], row["paper"], row["ours"], row["finding"])
    Console().print(table)


def _minutes(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {text}")
    return value


def _whole(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value
