"""A training run that survives being stopped: its record, its numbers and its optimizer in one file.

Everything random in a run depends on the seed and the step alone (:mod:`tinylora_lite.utils.seeds`), so a run that goes
on from a checkpoint computes what the uninterrupted one computes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from tinylora_lite.utils.record import Run


def save_checkpoint(
    folder: str | Path, run: Run, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Writes ``run.json`` and ``checkpoint.pt`` into ``folder``; each file appears whole or not at all."""
    folder = Path(folder)
    run.save(folder / "run.json")  # first, so that a finished checkpoint never stands beside an older record
    state = {
        "run": json.dumps(asdict(run)),
        "optimizer": optimizer.state_dict(),
        "parameters": [parameter.detach() for parameter in parameters],
    }
    temporary = folder / "checkpoint.pt.tmp"
    torch.save(state, temporary)
    os.replace(temporary, folder / "checkpoint.pt")


def check_same_run(folder: str | Path, saved: Run, run: Run) -> None:
    """Raises ``ValueError`` where ``folder`` holds a run of another method, task, adapter, base or other settings.

    ``save_every`` may differ, and under a constant learning rate ``steps`` may: they decide where training stops, not
    where it goes.
    """
    may_differ = {"save_every", "steps"} if run.settings.get("schedule") == "constant" else {"save_every"}
    for what, before, now in (
        ("method", saved.method, run.method),
        ("task", saved.task, run.task),
        ("adapter", saved.adapter, run.adapter),
        ("base", saved.base, run.base),
        *((key, saved.settings.get(key), run.settings.get(key)) for key in {**saved.settings, **run.settings}),
    ):
        if before != now and what not in may_differ:
            raise ValueError(
                f"{folder} holds a run with {what} = {before!r}, not {now!r}; give another folder, or delete that one"
            )


def resume(folder: str | Path, run: Run, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Puts run, parameters and optimizer where the checkpoint in ``folder`` left them; without one, changes nothing.

    Raises:
        ValueError: the checkpoint is damaged, or of another run (:func:`check_same_run`), or of more steps.
    """
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        return
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        saved, values, moments = Run.from_dict(json.loads(state["run"])), state["parameters"], state["optimizer"]
    except Exception as error:  # pickle, zip and tensor formats each raise their own
        raise ValueError(f"{path} is damaged ({type(error).__name__}); delete it to start the run again") from error
    check_same_run(folder, saved, run)
    if [v.shape for v in values] != [p.shape for p in parameters]:
        raise ValueError(f"{folder} holds a run of a model of another shape; give another folder, or delete that one")
    if len(saved.steps) > run.settings["steps"]:
        raise ValueError(f"{folder} holds a run of {len(saved.steps)} steps, more than steps={run.settings['steps']}")

    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
    optimizer.load_state_dict(moments)
    run.steps, run.evaluations = saved.steps, saved.evaluations
    run.seconds, run.environment = saved.seconds, saved.environment
