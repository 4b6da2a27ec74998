"""What ``tinylora demo`` says at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from tinylora_lite.lab import untrained

if TYPE_CHECKING:
    from tinylora_lite.cli.demo import Demo


def report(demo: Demo) -> Table:
    """Three problems with their answers, what the untrained base can do, and where the files are."""
    report = Table.grid()
    for number, answers in enumerate(demo.examples(), start=1):
        lines = Table.grid(padding=(0, 1, 0, 0))
        lines.add_column(no_wrap=True)
        lines.add_row(f"test problem {number}", Text(answers[0].prompt, "italic"))
        for name, answer in zip(("base", "random", "calibrated"), answers, strict=True):
            verdict = "right" if answer.reward else "wrong"
            lines.add_row(name, Text(f"{answer.text or '(nothing)'}  [{verdict}]", "" if answer.reward else "dim"))
        report.add_row("")
        report.add_row(lines)
    report.add_row("")
    report.add_row(comparison())
    report.add_row("")
    for name, trained in (("random", demo.random), ("calibrated", demo.calibrated)):
        size = trained.file.stat().st_size
        report.add_row(
            f"{name}: {trained.parameters} numbers, {trained.payload_bytes} bytes, in a file of {size:,} bytes:\n"
            f"  {trained.file}"
        )
    report.add_row(f"{demo.seconds:.0f} seconds in all")
    return report


def comparison() -> str:
    """What the untrained base does when its first token or its prompt is chosen for it, from the record."""
    record = untrained.recorded()
    first, header = record["first_token"]["sampled"], record["header"]["sampled"]
    return (
        f"For comparison, the untrained base on {first['n']:,} test problems: {first['accuracy']:.1%} where its answer "
        f"must begin with a number, {header['accuracy']:.1%} with its best line of prompt. Here thirteen numbers make "
        "one choice, at one token, that a line of prompt makes too."
    )
