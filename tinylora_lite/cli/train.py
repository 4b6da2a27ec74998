"""Train by a settings file: score the base, train, score again, compare, and keep everything in one folder.

`tinylora preset` prints settings to start from, and `tinylora plan-run` estimates what they take. An interrupted run
goes on where it stopped. Several GPUs: `accelerate launch -m tinylora_lite train settings.yaml`.
"""

from __future__ import annotations

import argparse
import os
from datetime import timedelta

from tinylora_lite.cli import shared

EXAMPLE = "tinylora train settings.yaml training.learning_rate=1e-4"
SEED_HELP = "of training, in place of the settings file's"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``tinylora train``."""
    shared.add_settings_arguments(parser, "the GPU that a preset is for (default: its own choice)")


def run(arguments: argparse.Namespace) -> None:
    """Shows the progress while it runs and the comparison at the end, or JSON."""
    from rich.console import Console

    from tinylora_lite.utils import distributed

    settings = shared.read_settings(arguments.settings, arguments.gpu, arguments.overrides, arguments.seed)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _join()
    from tinylora_lite.experiment.run import run_experiment

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


def _join() -> None:
    """Joins the other processes of ``accelerate launch``; waiting for a long evaluation must not end a process."""
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ImportError('several processes need accelerate; pip install "tinylora_lite[train]" brings it') from error
    import torch

    PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=12))
