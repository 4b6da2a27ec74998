"""What a chapter at full size needs around its run: the GPU that is there, a folder that lasts, and what to look at."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tinylora_lite.book.glue import Markdown, table
from tinylora_lite.planning.gpus import GPUS

if TYPE_CHECKING:
    from tinylora_lite.evaluation.score import Completion, Score
    from tinylora_lite.planning.plan import Plan

DRIVE = Path("/content/drive")
"""Where Colab mounts Google Drive."""


def gpu_here() -> str | None:
    """The name in ``GPUS`` of this machine's GPU, of several the nearest by memory; ``None`` where it is not known."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    words = found.name.upper().replace("-", " ").split()
    same = [name for name in GPUS if name.split("-")[0].upper() in words]
    return min(same, key=lambda name: abs(GPUS[name].memory - found.total_memory), default=None)


def preset_gpu(gpu: str) -> str:
    """The GPU of :func:`~tinylora_lite.experiment.presets.preset` that is most like ``gpu``, a name of ``GPUS``.

    >>> [preset_gpu(name) for name in ("t4", "l4", "h200", "h100")]
    ['t4', 'a100-80gb', 'h100', 'h100']
    """
    return "t4" if not GPUS[gpu].bfloat16 else "h100" if gpu.startswith("h") else "a100-80gb"


def place(folder: str = "tinylora") -> Path:
    """A folder that outlives the machine: on Google Drive in Colab, which asks for permission first, else here."""
    if "google.colab" not in sys.modules:
        return Path(folder)
    if not DRIVE.is_dir():
        sys.modules["google.colab"].drive.mount(str(DRIVE))
    return DRIVE / "MyDrive" / folder


def overrides() -> list[str]:
    """Settings that override a notebook's: the environment's ``TINYLORA_OVERRIDES``, ``key=value`` between spaces."""
    return os.environ.get("TINYLORA_OVERRIDES", "").split()


def plan_table(plan: Plan) -> Markdown:
    """What takes memory and when, whether it fits, and how long it may take."""

    def gib(count: float) -> str:
        return f"{count / 2**30:,.2f}" if count >= 2**30 / 100 else "under 0.01"

    rows: list[tuple[str, ...]] = [(term.name, term.phase, gib(term.bytes)) for term in plan.terms]
    rows += [("**all of it**", phase, f"**{gib(needed)}**") for phase, needed in plan.peaks.items()]
    rows.append(("what the GPU has for it", "", gib(plan.gpu.usable)))
    said = [f"**{plan.settings.model}, {plan.parameters:,} parameters, {plan.settings.task}, on a {plan.gpu.name}.**"]
    if plan.fits:
        steps, hours = plan.time.steps, plan.time.hours
        said.append(f"It fits. {steps:,} steps, {hours.low:.1f} to {hours.high:.1f} hours, planned and not measured.")
        if plan.cost is not None:
            said.append(f"Cost: {plan.cost[0]:,.2f} to {plan.cost[1]:,.2f}, at {plan.price:g} an hour.")
    else:
        said += [f"It does not fit: {problem}." for problem in plan.problems]
        said.append(f"It fits with `{' '.join(plan.advice)}`." if plan.advice else "No change was found that helps.")
    return Markdown(f"{table(('memory', 'when', 'GiB'), 'llr', rows)}\n\n{' '.join(said)}")


def changed(base: Score, adapted: Score) -> Iterator[tuple[Completion, Completion]]:
    """The problems whose first answer is rewarded differently by the other score of the same problems, in order."""
    pairs = zip(base.completions[:: base.samples], adapted.completions[:: adapted.samples], strict=True)
    return ((before, after) for before, after in pairs if before.reward != after.reward)
