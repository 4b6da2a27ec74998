"""Completions on disk: kept while they come, so that an evaluation that is stopped goes on from where it was.

A folder holds one evaluation: ``evaluation.json``, which says of what it is and ends with the scores, and
``completions.jsonl``, one completion a line. Until the last completion is there the lines stand in
``completions.jsonl.part``, to which every batch is appended; a line that was cut off is dropped when it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylora_lite.adapter.weights import base_fingerprint
from tinylora_lite.tasks.task import Example, Task

if TYPE_CHECKING:
    from torch import nn

    from tinylora_lite.adapter.adapter import TinyLoraAdapter

Row = dict[str, Any]

FILE = "completions.jsonl"
PART = "completions.jsonl.part"
RECORD = "evaluation.json"


def open_evaluation(folder: str | Path, settings: Mapping[str, Any], batch_size: int = 1) -> list[Row]:
    """The completions that an evaluation with these settings has left in ``folder``, none where it is new.

    Args:
        folder: made where it is missing.
        settings: everything that a completion depends on, as JSON can hold it.
        batch_size: completions drawn together; of a batch that is not complete none is taken.

    Raises:
        ValueError: the folder holds the evaluation of another model or other settings, or a damaged one.
    """
    folder = Path(folder)
    record = folder / RECORD
    if not record.exists():
        for stray in (folder / FILE, folder / PART):
            if stray.exists():
                raise ValueError(f"{stray} stands without its {RECORD}; give another folder, or delete it")
        write_whole(record, json.dumps({"settings": dict(settings)}, indent=1) + "\n")
        return []
    saved = read_record(folder)["settings"]
    for key in {**saved, **settings}:
        before, now = saved.get(key), settings.get(key)
        if before != now:
            raise ValueError(
                f"{folder} holds an evaluation with {key} = {before!r}, not {now!r}; give another folder, or delete it"
            )
    if (folder / FILE).exists():
        return read_rows(folder)
    rows = _whole_lines(folder / PART) if (folder / PART).exists() else []
    del rows[len(rows) // batch_size * batch_size :]
    write_rows(folder / PART, rows)  # without a line that was cut off, after which nothing could be appended
    return rows


def append_rows(folder: str | Path, rows: Iterable[Row]) -> None:
    """Adds a batch to an evaluation that is under way; it is on the disk when this returns."""
    with (Path(folder) / PART).open("a", encoding="ascii") as file:
        file.write(_lines(rows))
        file.flush()
        os.fsync(file.fileno())


def close_evaluation(folder: str | Path, rows: Sequence[Row], result: Mapping[str, Any]) -> None:
    """Writes all completions to their file and adds ``result`` to the record; each appears whole or not at all."""
    folder = Path(folder)
    write_rows(folder / FILE, rows)
    (folder / PART).unlink(missing_ok=True)
    write_whole(folder / RECORD, json.dumps({"settings": read_record(folder)["settings"], **result}, indent=1) + "\n")


def read_rows(folder: str | Path) -> list[Row]:
    """The completions of a finished evaluation.

    Raises:
        FileNotFoundError: there is none in ``folder``.
        ValueError: the file is damaged.
    """
    path = Path(folder) / FILE
    if not path.exists():
        state = "not finished" if (Path(folder) / PART).exists() else "not there"
        raise FileNotFoundError(f"the evaluation in {folder} is {state}; run it with this folder")
    rows = _whole_lines(path)
    if path.read_bytes().count(b"\n") != len(rows):
        raise ValueError(f"{path} is damaged; delete it to evaluate again")
    return rows


def read_record(folder: str | Path) -> Row:
    """What ``evaluation.json`` holds. Raises ``ValueError`` where it is damaged."""
    path = Path(folder) / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record["settings"], dict):
            raise TypeError("its settings are no table")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete its folder to evaluate again") from error
    return dict(record)


def subject_of(model: nn.Module, adapter: TinyLoraAdapter | None) -> dict[str, str]:
    """What is evaluated: the fingerprint of the weights, and the adapter's settings and the hash of its numbers."""
    if adapter is None:
        return {"base": base_fingerprint(model), "adapter": "none"}
    numbers = hashlib.sha256(adapter.vectors.detach().cpu().numpy().tobytes()).hexdigest()
    return {"base": base_fingerprint(model), "adapter": f"{adapter.extra_repr()}; SHA-256 of v {numbers}"}


def problems_hash(task: Task, examples: Sequence[Example]) -> str:
    """SHA-256 of what is asked, in hexadecimal: the system message, the prompts and the right answers."""
    asked = [task.system, *([example.prompt, example.gold] for example in examples)]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes a file of completions, whole or not at all."""
    write_whole(path, _lines(rows))


def write_whole(path: Path, text: str) -> None:
    """Writes a file that appears whole or not at all, and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _lines(rows: Iterable[Row]) -> str:
    # Escaped to ASCII: no text, whatever a model wrote, breaks a line or cannot be encoded.
    return "".join(json.dumps(row) + "\n" for row in rows)


def _whole_lines(path: Path) -> list[Row]:
    rows: list[Row] = []
    for line in path.read_bytes().split(b"\n")[:-1]:  # after the last line break stands nothing, or what was cut off
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not (isinstance(row, dict) and {"text", "tokens", "truncated"} <= row.keys()):
            break
        rows.append(row)
    return rows
