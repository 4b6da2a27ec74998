"""The record of a training run: everything that is needed to trust it, draw it and repeat it."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, str]:
    """Versions of what computed a result, and on what."""
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads"
    )
    return {
        "tinylora_lite": _version("tinylora_lite"),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {device}",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@dataclass
class Run:
    """One training run.

    Attributes:
        method: ``"grpo"``.
        settings: the settings of training.
        adapter: the settings of the adapter in words, or ``"all weights"``.
        parameters: how many numbers train.
        task: the task's name.
        steps: one row per step: reward, length, entropy, gradient norm and more, and seconds since the start.
        evaluations: one row per evaluation: the step it follows, accuracy, low, high, n, samples.
        seconds: of training and evaluating, interruptions left out.
        environment: versions and machine.
    """

    method: str
    settings: dict[str, Any]
    adapter: str
    parameters: int
    task: str
    steps: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    environment: dict[str, str] = field(default_factory=environment)

    @property
    def seed(self) -> int:
        return self.settings["seed"]

    def curve(self, key: str = "reward") -> list[float]:
        """One column of ``steps``."""
        return [row[key] for row in self.steps]

    def save(self, path: str | Path) -> Path:
        """Writes the record as JSON; the file appears whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Reads what :meth:`save` wrote."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
