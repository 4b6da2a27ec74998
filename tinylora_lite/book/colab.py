"""What a chapter at full size needs around its run: the GPU that is there, a folder that lasts, and what to look at.

The chapters on GPUs share it, so that each of them shows what is its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tinylora_lite.book.register_table import Row, Table
from tinylora_lite.experiment import presets
from tinylora_lite.planning.gpus import GPUS

if TYPE_CHECKING:
    from tinylora_lite.evaluation.score import Completion, Score
    from tinylora_lite.experiment.settings import RunSettings
    from tinylora_lite.planning.plan import Plan

OVERRIDES = "TINYLORA_OVERRIDES"
"""The environment variable with settings, ``key=value`` and spaces between, that go before those of a notebook."""

DRIVE = Path("/content/drive")
"""Where Colab shows Google Drive."""


def gpu_here() -> str | None:
    """The name of this machine's GPU in :data:`~tinylora_lite.planning.gpus.GPUS`; ``None`` where it is not known.

    Of GPUs that differ in memory alone it is the nearest.
    """
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
    if gpu in presets.GPUS:
        return gpu
    return "t4" if not GPUS[gpu].bfloat16 else "h100" if gpu.startswith("h") else "a100-80gb"


def place(folder: str = "tinylora") -> Path:
    """A folder that outlives the machine: on Google Drive in Colab, which asks for leave first, and here elsewhere."""
    if "google.colab" not in sys.modules:
        return Path(folder)
    if not DRIVE.is_dir():
        sys.modules["google.colab"].drive.mount(str(DRIVE))
    return DRIVE / "MyDrive" / folder


def overrides() -> list[str]:
    """The settings in ``TINYLORA_OVERRIDES``, for :meth:`~tinylora_lite.experiment.settings.RunSettings.override`."""
    return os.environ.get(OVERRIDES, "").split()


def hub_commit(settings: RunSettings) -> str:
    """The commit of the hub that the base was loaded from; empty for a base that is no model of the hub.

    Raises:
        FileNotFoundError: the model is not in the hub's cache.
    """
    from huggingface_hub import try_to_load_from_cache

    if settings.model == "nano" or Path(settings.model).is_dir():
        return ""
    found = try_to_load_from_cache(settings.model, "config.json", revision=settings.revision)
    if not isinstance(found, str):
        raise FileNotFoundError(f"{settings.model} is not in the hub's cache; load it first")
    return Path(found).parent.name


def plan_table(plan: Plan) -> str:
    """A plan as Markdown: what takes memory and when, whether it fits, and how long it may take."""
    lines = ["| memory | when | GiB |", "|---|---|---:|"]
    lines += [f"| {term.name} | {term.phase} | {_gib(term.bytes)} |" for term in plan.terms]
    lines += [f"| **all of it** | {phase} | **{_gib(needed)}** |" for phase, needed in plan.peaks.items()]
    lines += [f"| what the GPU has for it | | {_gib(plan.gpu.usable)} |", ""]
    hours, steps = plan.time.hours, plan.time.steps
    said = [f"**{plan.settings.model}, {plan.parameters:,} parameters, {plan.settings.task}, on a {plan.gpu.name}.**"]
    if plan.fits:
        said.append(f"It fits. {steps:,} steps, {hours.low:.1f} to {hours.high:.1f} hours, planned and not measured.")
        if plan.cost is not None:
            said.append(f"Cost: {plan.cost[0]:,.2f} to {plan.cost[1]:,.2f}, at {plan.price:g} an hour.")
    else:
        said += [f"It does not fit: {problem}." for problem in plan.problems]
        said.append(f"It fits with `{' '.join(plan.advice)}`." if plan.advice else "No change was found that helps.")
    return "\n".join([*lines, " ".join(said)])


@dataclass(frozen=True)
class Changed:
    """One problem on which two models differ: the completions of each."""

    before: Completion
    after: Completion

    @property
    def better(self) -> bool:
        """Whether the second one is right."""
        return self.after.reward > self.before.reward


def changed(base: Score, adapted: Score) -> Iterator[Changed]:
    """Problems whose first answer is worth something else after training, in the order of the task.

    Args:
        base: the score of the one; of several samples the first counts.
        adapted: the score of the other, on the same problems.
    """
    pairs = zip(base.completions[:: base.samples], adapted.completions[:: adapted.samples], strict=True)
    return (Changed(before, after) for before, after in pairs if before.reward != after.reward)


def shortened(whole: Table, counts: tuple[int, ...] = (0, 13, 196)) -> Table:
    """The rows of a table that train by rewards and as many numbers as ``counts`` says, and every row of the register.

    Rows of all weights stay, too.
    """

    def kept(row: Row) -> bool:
        own = row.value is None or row.where.startswith("runs/")
        return own or ("SFT" not in row.what and (row.parameters in counts or row.what.startswith("all weights")))

    return Table(whole.caption, tuple(row for row in whole.rows if kept(row)))


def _gib(count: float) -> str:
    return f"{count / 2**30:,.2f}" if count >= 2**30 / 100 else "under 0.01"
