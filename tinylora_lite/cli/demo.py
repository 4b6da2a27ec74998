"""See TinyLoRA work on this machine, in about three minutes and without a network.

Two adapters of 13 parameters are trained by GRPO on a small model that comes with the library: one with the paper's
random projections, and one whose projections were calibrated (this project's own method).
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tinylora_lite as tl
from tinylora_lite.cli import shared

if TYPE_CHECKING:
    from rich.table import Table

    from tinylora_lite.view.progress import Progress

EXAMPLE = "tinylora demo"
SEED_HELP = "of the random projections, the order of problems and the sampling"

PARAMETERS = 13
PROMPTS = 32
GROUP_SIZE = 8
LEARNING_RATES = {"random": 0.1, "calibrated": 0.2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``tinylora demo``."""
    add = parser.add_argument
    add("--steps", type=int, default=30, help="of training, for each adapter (default: %(default)s)")
    add("--problems", type=shared.at_least(1), default=500, help="of the test set (default: %(default)s)")
    add("--calibrate", action="store_true", help="make the calibrated basis anew, not take the shipped one")
    add("--folder", type=Path, default=Path("tinylora-demo"), help="where the files go (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Shows the progress while it runs and a report at the end, or JSON."""
    from rich.console import Console

    options = {name: getattr(arguments, name) for name in ("steps", "problems", "seed", "calibrate", "folder")}
    with shared.command_progress(Console(), plain=arguments.json) as progress:
        result, scores = run_demo(**options, progress=progress)
    shared.show(arguments, result, *shared.results(progress), report(result, scores))


def run_demo(
    *, steps: int, problems: int, folder: Path, seed: int = 0, calibrate: bool = False, progress: Progress | None = None
) -> tuple[dict[str, Any], dict[str, tl.Score]]:
    """Trains 13 parameters with random and with calibrated projections on the nano base, and evaluates all three.

    The arguments are those of the command. ``progress=None`` shows none. The adapters (``random.tinylora``,
    ``calibrated.tinylora``), the records of the runs and a new basis are written to ``folder``.

    Returns:
        What the command prints as JSON, the random adapter's results under ``random``; and the three scores.
    """
    from tinylora_lite import nano
    from tinylora_lite.experiment.models import load_tokenizer
    from tinylora_lite.experiment.runner import Runner
    from tinylora_lite.experiment.settings import EvaluationSettings, RunSettings
    from tinylora_lite.view.progress import Progress

    limit = nano.MAX_NEW_TOKENS
    training = tl.GRPOSettings(
        steps=steps, prompts_per_step=PROMPTS, group_size=GROUP_SIZE, max_new_tokens=limit, schedule="linear", seed=seed
    )
    progress, task = progress or Progress(), nano.task()
    folder.mkdir(parents=True, exist_ok=True)  # fails now rather than after a minute of training
    started = time.perf_counter()
    base = RunSettings(model="nano", task="nano", dtype="float32")
    runner = Runner.open(base, load_tokenizer("nano"), progress, device="cpu")
    if calibrate:
        options = {"rank": 8, "directions": PARAMETERS, "seed": seed, "max_new_tokens": limit}
        basis = runner.calibrate(task, folder / "basis.safetensors", **options)  # tl.load looks beside the adapter
    else:
        basis = nano.basis()
    testing = EvaluationSettings(problems=problems, temperature=1.0, max_new_tokens=limit)
    scores = {"base": runner.evaluate("base", task, testing, seed=seed)}
    configs = {
        "random": tl.plan(runner.base, PARAMETERS, seed=seed),
        "calibrated": tl.TinyLoraConfig(rank=basis.rank, u=PARAMETERS, n_tie="all", seed=seed, projection=basis),
    }
    results = {}
    for name, config in configs.items():
        settings = replace(training, learning_rate=LEARNING_RATES[name])
        with runner.trained(name, task, config, settings) as (adapter, run):
            assert adapter is not None  # there is a configuration
            run.save(folder / f"{name}.run.json")
            scores[name] = runner.evaluate(name, task, testing, seed=seed)
            file = tl.save(adapter, folder / f"{name}.tinylora").resolve()
        results[name] = {
            "parameters": run.parameters,
            "trained": scores[name].summary(),
            "file": file,
            "bytes": file.stat().st_size,
            "payload_bytes": 2 * run.parameters,  # of the trained parameters alone, as bfloat16
        }
    seconds = round(time.perf_counter() - started, 1)
    common = {"base": scores["base"].summary(), "seconds": seconds}
    return results["calibrated"] | common | {"random": results["random"]}, scores


def report(result: dict[str, Any], scores: dict[str, tl.Score]) -> Table:
    """Three problems with their answers, what the untrained base can do, and where the files are."""
    from rich.table import Table
    from rich.text import Text

    from tinylora_lite.lab import untrained

    report = Table.grid()
    for number, answers in enumerate(zip(*(score.completions[:3] for score in scores.values()), strict=True), start=1):
        lines = Table.grid(padding=(0, 1, 0, 0))
        lines.add_column(no_wrap=True)
        lines.add_row(f"test problem {number}", Text(answers[0].prompt, "italic"))
        for name, answer in zip(scores, answers, strict=True):
            verdict = "right" if answer.reward else "wrong"
            lines.add_row(name, Text(f"{answer.text or '(nothing)'}  [{verdict}]", "" if answer.reward else "dim"))
        report.add_row("")
        report.add_row(lines)
    record = untrained.recorded()
    first, header = record["first_token"]["sampled"], record["header"]["sampled"]
    report.add_row(
        f"\nFor comparison, the untrained base on {first['n']:,} test problems: {first['accuracy']:.1%} where its "
        f"answer must begin with a number, {header['accuracy']:.1%} with its best line of prompt. Here thirteen "
        "numbers make one choice, at one token, that a line of prompt makes too.\n"
    )
    for name, made in (("random", result["random"]), ("calibrated", result)):
        report.add_row(
            f"{name}: {made['parameters']} parameters, {made['payload_bytes']} bytes, in a file of "
            f"{made['bytes']:,} bytes:\n  {made['file']}"
        )
    report.add_row(f"{result['seconds']:.0f} seconds in all")
    return report
