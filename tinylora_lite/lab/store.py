"""The records of the lab: one line of JSON for each run, in one file for each base.

A line is written whole, by one call, at the end of the file; a line that was cut off is passed over and its run is made
again. Nothing is ever changed in place.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tinylora_lite.lab.trial import Trial

Record = dict[str, Any]

_PACKAGED = Path(__file__).parents[1] / "results"
BOOK = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "book" / "results"
"""All stored results of the book: in a checkout beside it, inside the package where that was installed from a wheel."""
RESULTS = BOOK / "lab"
"""The records of the lab's claims."""
CHAPTERS = BOOK / "nano"
"""The records of the first chapters' runs, which no claim counts."""


class Store:
    """Records by trial.

    Attributes:
        folder: holds ``BASE.jsonl`` for each base.
        score: by which of a test record's scores points are compared: ``"sampled"`` (one answer at temperature 1) or
            ``"greedy"``. Learning rates are chosen by sampled answers in both cases.

    Raises:
        ValueError: ``folder`` is a file, or a record has settings that :class:`~tinylora_lite.lab.trial.Trial` does not
            know.
    """

    def __init__(self, folder: str | Path = RESULTS) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{folder} is a file; records lie in a folder")
        self.score = "sampled"
        self._records: dict[str, Record] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                record = _parsed(line)
                if record is not None:
                    self._records[_trial(record, path).key] = record

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, trial: Trial) -> bool:
        return trial.key in self._records

    def __getitem__(self, trial: Trial) -> Record:
        """The record of a trial. Raises ``KeyError`` where it was not run."""
        return self._records[trial.key]

    def add(self, trial: Trial, record: Record) -> None:
        """Keeps a record, on disk too."""
        # A trial is found again by its settings, which are therefore kept to the last digit.
        record = {"trial": trial.settings()} | rounded(record)
        self.folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps(record) + "\n"
        path = self.folder / f"{trial.base}.jsonl"
        # One call, so that two programs that write at the same time do not mix their lines.
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            torn = path.stat().st_size > 0 and not _ends_with_newline(path)
            os.write(handle, (("\n" if torn else "") + line).encode())
        finally:
            os.close(handle)
        self._records[trial.key] = json.loads(line)

    def scored(self, score: str) -> Store:
        """The same records, for points to be compared by another of their scores."""
        other = copy.copy(self)
        other.score = score
        return other

    def of(self, trials: Iterable[Trial]) -> list[Record]:
        """The records of those trials that were run."""
        return [self[trial] for trial in trials if trial in self]

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())


def rounded(value: Any) -> Any:
    """The same with five digits of every float: more would be noise, and twice the file."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def _trial(record: Record, path: Path) -> Trial:
    try:
        return Trial.of(record["trial"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} holds a record that this version of the lab does not know: {error}") from error


def _parsed(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
