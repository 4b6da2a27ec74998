"""The records of the lab: one line of JSON for each run, in one file for each base.

A line that was cut off is ignored, and its run is made again. Nothing is ever changed in place.
"""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tinylora_lite.lab.trial import Trial
from tinylora_lite.utils.files import atomic_write
from tinylora_lite.utils.record import short_hash

Record = dict[str, Any]

_PACKAGED = Path(__file__).parents[1] / "results"
BOOK = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "book" / "results"
"""All stored results of the book: in a checkout beside it, inside the package where that was installed from a wheel."""
RESULTS = BOOK / "lab"
"""The records of the lab's claims."""
CHAPTERS = BOOK / "nano"
"""The records of the first chapters' runs, which are not counted among the lab's."""
REAL_RESULTS = BOOK / "real"
"""The records of the runs on real models."""


class Store(dict[Trial, Record]):
    """Records by trial; what :meth:`add` puts in is kept on disk.

    Attributes:
        folder: holds ``BASE.jsonl`` for each base.
        score: by which of a test record's scores points are compared: ``"sampled"`` (one answer at temperature 1) or
            ``"greedy"``. Learning rates are chosen by sampled answers in both cases.
        reading: how answers are read: strictly (``"accuracy"``), or leniently (``"lenient"``) where records hold that.

    Raises:
        ValueError: ``folder`` is a file, or a record has settings that :class:`~tinylora_lite.lab.trial.Trial` does not
            know.
    """

    def __init__(self, folder: str | Path = RESULTS) -> None:
        super().__init__()
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{folder} is a file; records lie in a folder")
        self.score, self.reading = "sampled", "accuracy"
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                try:
                    self[Trial(**record["trial"])] = record
                except (KeyError, TypeError) as error:
                    raise ValueError(f"{path} holds a record of unknown settings: {error}") from error

    def of(self, trials: Iterable[Trial]) -> list[Record]:
        """The records of those trials that were run."""
        return [self[trial] for trial in trials if trial in self]

    def add(self, trial: Trial, record: Record) -> None:
        """Keeps a record, on disk too; its answers, where it has them, in a file of their own (:meth:`answers`)."""
        if answers := record.get("answers"):
            record = {key: value for key, value in record.items() if key != "answers"}
            atomic_write(self._answers(trial), gzip.compress(json.dumps(answers).encode(), mtime=0))
        # A trial is found again by its settings, which are therefore kept to the last digit.
        line = json.dumps({"trial": trial.settings()} | rounded(record)) + "\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{trial.base}.jsonl"
        torn = path.exists() and not (path.read_bytes() or b"\n").endswith(b"\n")
        # One unbuffered call, so that two programs that write at the same time do not mix their lines.
        with path.open("ab", buffering=0) as file:
            file.write((("\n" if torn else "") + line).encode())
        self[trial] = json.loads(line)

    def answers(self, trial: Trial) -> Record:
        """A trial's answers by score: the texts, and the rewards of each. Raises ``OSError`` where none were kept."""
        found: Record = json.loads(gzip.decompress(self._answers(trial).read_bytes()))
        return found

    def _answers(self, trial: Trial) -> Path:
        return self.folder / "answers" / f"{trial.base}-{short_hash(trial.key)}.json.gz"

    def scored(self, score: str, reading: str = "accuracy") -> Store:
        """The same records, for points to be compared by another of their scores, and of its readings."""
        other = copy.copy(self)
        other.score, other.reading = score, reading
        return other


def rounded(value: Any) -> Any:
    """The same with five digits of every float: more would be noise, and twice the file."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value
