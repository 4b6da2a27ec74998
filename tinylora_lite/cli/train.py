"""Train by a settings file: score the base, train, score again, compare, and keep everything in one folder.

`tinylora preset` prints settings to start from, and `tinylora plan-run` estimates what they take. An interrupted run
goes on where it stopped. Several GPUs: `accelerate launch -m tinylora_lite train settings.yaml`.
"""

from __future__ import annotations

import argparse
import json
import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from tinylora_lite.cli.shared import show_results

if TYPE_CHECKING:
    from rich.table import Table

    from tinylora_lite.experiment.run import Outcome
    from tinylora_lite.experiment.settings import RunSettings

EXAMPLE = "tinylora train settings.yaml training.learning_rate=1e-4"
SEED_HELP = "of training, in place of the settings file's"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``tinylora train``."""
    parser.add_argument("settings", help="a settings file, or the name of a preset (`tinylora preset` lists them)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that differ: adapter.u=2, folder=out"
    )
    parser.add_argument("--gpu", help="the GPU that a preset is for (default: its own choice)")


def run(arguments: argparse.Namespace) -> None:
    """Shows the progress while it runs and the comparison at the end, or JSON."""
    from rich.console import Console
    from transformers.utils import logging

    from tinylora_lite.utils import distributed

    logging.disable_progress_bar()
    settings = read(arguments.settings, arguments.gpu, arguments.overrides)
    if arguments.seed:
        settings = settings.override([f"training.seed={arguments.seed}"])
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _join()
    from tinylora_lite.experiment.run import run_experiment
    from tinylora_lite.view.progress import progress_for

    if distributed.rank() > 0:  # the first process shows the progress and the result
        run_experiment(settings)
        return
    console = Console()
    with progress_for(console, plain=arguments.json) as progress:
        outcome = run_experiment(settings, progress=progress)
    if arguments.json:
        print(json.dumps(outcome.summary()))
        return
    show_results(console, progress)
    console.print(report(outcome))


def read(name: str, gpu: str | None, overrides: list[str]) -> RunSettings:
    """A settings file, or a preset by its name."""
    from tinylora_lite.experiment.presets import preset
    from tinylora_lite.experiment.settings import load_settings

    if Path(name).suffix in (".yaml", ".yml") or Path(name).is_file():
        if gpu is not None:
            raise ValueError("--gpu chooses among presets; a settings file says everything itself")
        return load_settings(name, overrides)
    return (preset(name) if gpu is None else preset(name, gpu=gpu)).override(overrides)


def report(outcome: Outcome) -> Table:
    """What changed, on which problems, and where the files are."""
    from rich.table import Table

    table = Table.grid()
    for name, comparison in outcome.comparisons.items():
        table.add_row(f"{name}: {comparison}")
    for rate, score in outcome.rates.items():
        table.add_row(f"learning rate {rate:g}: {score} on the validation split")
    table.add_row(f"{outcome.run.parameters:,} parameters, {outcome.run.seconds:.0f} seconds of training")
    table.add_row(f"{outcome.folder.resolve()}")
    return table


def _join() -> None:
    """Joins the other processes of ``accelerate launch``; waiting for a long evaluation must not end a process."""
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ImportError('several processes need accelerate; pip install "tinylora_lite[train]" brings it') from error
    import torch

    PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=12))
