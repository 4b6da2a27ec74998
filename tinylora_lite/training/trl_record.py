"""What TRL logs, as the record of a run; and whether a checkpoint is of that run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from tinylora_lite.adapter.adapter import TinyLoraAdapter
from tinylora_lite.training.loop import RECORDED_PARAMETERS
from tinylora_lite.training.settings import GRPOSettings
from tinylora_lite.utils.record import Run

RECORDED = {
    "reward": "reward",
    "length": "completions/mean_length",
    "truncated": "completions/clipped_ratio",
    "entropy": "entropy",
    "gradient_norm": "gradient_norm",
    "clipped": "clip_ratio/region_mean",
    "gap": "sampling/sampling_logp_difference/mean",
    "largest_gap": "sampling/sampling_logp_difference/max",
    "silent_groups": "frac_reward_zero_std",
    "norm": "norm",
    "strict": "strict",
    "lenient": "lenient",
    "formatted": "formatted",
    "seconds": "seconds",
} | {f"v{i}": f"v{i}" for i in range(RECORDED_PARAMETERS)}
"""Columns of a run's record, and what TRL's log calls them."""


def numbers_of(adapter: TinyLoraAdapter) -> dict[str, float]:
    """The numbers v for a log: its norm, its largest entry, and every number (``v0`` and so on) where they are few."""
    v = adapter.vectors.detach().flatten()
    summary = {"norm": v.norm().item(), "largest": v.abs().max().item()}
    return summary | ({f"v{i}": value for i, value in enumerate(v.tolist())} if len(v) <= RECORDED_PARAMETERS else {})


def rows_of(history: Iterable[Mapping[str, float]], settings: GRPOSettings) -> list[dict[str, float]]:
    """The rows of a run's record from what TRL has logged; one of our steps is ``epochs_per_step`` of TRL's."""
    return [
        {"step": entry["step"] // settings.epochs_per_step}
        | {ours: entry[theirs] for ours, theirs in RECORDED.items() if theirs in entry}
        for entry in history
        if "reward" in entry
    ]


def check_same_run(folder: Path, saved: Run, now: Run) -> None:
    """Raises ``ValueError`` where a checkpoint is of another base, adapter, task or other settings.

    ``save_every`` may differ, and under a constant learning rate ``steps`` may.
    """
    may_differ = {"save_every", "steps"} if now.settings["schedule"] == "constant" else {"save_every"}
    for what, before, here in (
        *((name, getattr(saved, name), getattr(now, name)) for name in ("method", "task", "adapter", "base")),
        *((key, saved.settings.get(key), value) for key, value in now.settings.items() if key not in may_differ),
    ):
        if before != here:
            raise ValueError(
                f"{folder} holds a run with {what} = {before!r}, not {here!r}; give another folder, or delete it"
            )
