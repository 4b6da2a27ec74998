"""Train by a settings file: score the base, train, score again, compare, and keep everything in one folder.

`tinylora preset` prints settings to start from, and `tinylora plan-run` estimates what they take. An interrupted run
goes on where it stopped. Several GPUs: `accelerate launch -m tinylora_lite train settings.yaml`. On CPUs, a measurement
of a second chooses dtype, threads and processes where the settings leave them open.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tinylora_lite.cli import shared
from tinylora_lite.cli.processes import computing

if TYPE_CHECKING:
    from tinylora_lite.experiment.settings import RunSettings

EXAMPLE = "tinylora train settings.yaml training.learning_rate=1e-4"
SEED_HELP = "of training, in place of the settings file's"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``tinylora train``."""
    shared.add_settings_arguments(parser, "the GPU that a preset is for (default: its own choice)")


def run(arguments: argparse.Namespace) -> None:
    """Shows the progress while it runs and the comparison at the end, or JSON."""
    from tinylora_lite.experiment.run import dtype_of

    settings = shared.read_settings(arguments.settings, arguments.gpu, arguments.overrides, arguments.seed)
    settings = settings.with_dtype(dtype_of(Path(settings.folder)) or "auto")
    with computing(settings, arguments.words, shares=_shares(settings), folder=Path(settings.folder)) as settings:
        _run(arguments, settings)


def _run(arguments: argparse.Namespace, settings: RunSettings) -> None:
    from rich.console import Console

    from tinylora_lite.experiment.run import run_experiment
    from tinylora_lite.utils import distributed

    shown = shared.command_progress(Console(), plain=arguments.json or distributed.rank() > 0)
    if distributed.rank() > 0:  # the first process shows the progress and the result
        run_experiment(settings)
        return
    with shown as progress:
        outcome = run_experiment(settings, progress=progress)
    lines = [f"{name}: {comparison}" for name, comparison in outcome.comparisons.items()]
    lines += [f"learning rate {rate:g}: {score} on the validation split" for rate, score in outcome.rates.items()]
    lines += [f"{outcome.run.parameters:,} parameters, {outcome.run.seconds:.0f} seconds of training"]
    lines += [f"{outcome.folder.resolve()}"]
    shared.show(arguments, outcome.summary(), *shared.results(progress), "\n".join(lines))


def _shares(settings: RunSettings) -> int:
    """Into how many equal parts a step can be divided; 1 where one process must do everything."""
    adapter, training = settings.adapter, settings.training_settings(1)
    to_make = adapter.calibrated and adapter.projection == "calibrated"
    made = Path(settings.folder, "basis.safetensors").exists()
    if settings.sampler.engine != "transformers" or settings.trainer == "trl" or (to_make and not made):
        return 1
    return training.prompts_per_step // getattr(training, "mini_batches", 1)
