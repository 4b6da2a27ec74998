"""The record of a training run: everything that is needed to trust it, draw it and repeat it."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, str]:
    """Versions of what computed a result, and on what: tinylora_lite, torch, transformers, python, machine."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    from tinylora_lite import __version__  # the package imports this module

    return {
        "tinylora_lite": __version__,
        "torch": str(torch.__version__),  # a class of its own, which files would keep
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
        method: ``"grpo"`` or ``"sft"``.
        settings: the settings of training.
        adapter: the settings of the adapter in words, or ``"all weights"``.
        parameters: how many numbers train.
        task: the task's name.
        base: SHA-256 of the base that training started from (:mod:`~tinylora_lite.adapter.fingerprint`).
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
    base: str = ""
    steps: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    environment: dict[str, str] = field(default_factory=environment)

    @property
    def seed(self) -> int:
        """The seed of training."""
        return int(self.settings["seed"])

    def curve(self, key: str = "reward") -> list[float]:
        """One column of ``steps``. Raises ``KeyError`` for a column that they lack."""
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
        """Reads what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or is the record of something else.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:  # of json, of the encoding, of the fields
            raise ValueError(f"{path} is no record of a run, or is damaged: {error}") from error

    @classmethod
    def from_dict(cls, values: Any) -> Run:
        """A record from its fields. Raises ``ValueError`` where one is missing or unknown."""
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__} where fields are expected")
        unknown = values.keys() - {f.name for f in fields(cls)}
        required = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
        for what, names in (("unknown", unknown), ("missing", required - values.keys())):
            if names:
                raise ValueError(f"{what} fields: {', '.join(sorted(names))}")
        return cls(**values)
