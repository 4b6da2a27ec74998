"""What a training run leaves behind: its record, and files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import secrets
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tinylora_lite import __version__

CACHE = "TINYLORA_CACHE"
"""The environment variable that names another folder than ``~/.cache/tinylora_lite``; ``off`` keeps no cache."""


def atomic_write(path: str | Path, content: str | bytes) -> Path:
    """Writes a file under a temporary name and renames it, so that no reader finds half of it.

    Text is written as UTF-8. The folder is made where it is missing. A failed write leaves no temporary file.

    Returns:
        The path.

    Raises:
        OSError: the folder cannot be made or written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def cache_folder(name: str) -> Path | None:
    """The folder of that name in the user's cache; ``None`` where ``TINYLORA_CACHE=off`` keeps no cache."""
    root = os.environ.get(CACHE)
    if root == "off":
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(root) if root else home / "tinylora_lite") / name


def environment() -> dict[str, str]:
    """Versions of what computed a result, and on what: tinylora_lite, torch, transformers, python, machine."""
    import torch  # here, so that whoever only reads records starts without it

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
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
    """One training run: everything that is needed to trust it, draw it and repeat it.

    Attributes:
        method: ``"grpo"``, ``"sft"`` or ``"es"``.
        settings: the settings of training.
        adapter: what trains: the adapter's settings and a hash of its modules, or ``{"kind": "all weights"}``. Records
            of version 0.1.0 before this was a dictionary hold a sentence.
        parameters: how many parameters train.
        task: the task's name.
        base: SHA-256 of the base before training (:mod:`tinylora_lite.adapter.weights`).
        steps: one row for each step: reward, length, entropy, gradient norm and more, and seconds since the start.
        evaluations: one row for each evaluation: the step it follows, accuracy, low, high, n, samples.
        seconds: of training and evaluating, interruptions left out.
        environment: versions and machine.
    """

    method: str
    settings: dict[str, Any]
    adapter: dict[str, Any] | str
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
        return atomic_write(path, json.dumps(asdict(self), indent=1) + "\n")

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
        """A record from its fields; of those that have a default, any may be missing.

        Raises:
            ValueError: a field without a default is missing, or one is unknown.
        """
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__} where fields are expected")
        unknown = values.keys() - {f.name for f in fields(cls)}
        required = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
        for what, names in (("unknown", unknown), ("missing", required - values.keys())):
            if names:
                raise ValueError(f"{what} fields: {', '.join(sorted(names))}")
        return cls(**values)
