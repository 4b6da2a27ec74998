"""The rows of a problem set: from the hub at its pinned commit, or from a folder."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

from tinylora_lite.tasks.catalog import ProblemSet, Split

Row = dict[str, Any]

_USUAL = ("{split}.jsonl", "{split}.json", "{split}.parquet", "{split}-*.parquet", "data/{split}-*.parquet")


def read_problems(name: str, source: ProblemSet, data: str | Path | None = None) -> dict[Split, list[Row]]:
    """The rows of each split as the files hold them; a split that a folder lacks is left out.

    From the hub, ``huggingface_hub`` fetches the files of the one commit into its cache (``HF_HOME``), from where they
    are read again without network (``HF_HUB_OFFLINE=1``).

    Args:
        name: of the problem set; a folder may hold several, each below its name.
        source: where it comes from.
        data: a folder instead of the hub. The files are looked for in ``data/name``, in ``data/owner/name`` and
            ``data/name`` of the hub, and in ``data`` itself, in the hub's layout or as ``train.jsonl`` and
            ``test.jsonl``.

    Raises:
        FileNotFoundError: the folder holds no file of the set.
        ImportError: a file is parquet and ``datasets`` is not installed.
        OSError: the hub could not be reached, or lacks the revision.
        ValueError: a file cannot be read, or the hub's has another number of rows than the set.
    """
    if data is None:
        folder = _download(source)
        found = {split: _files(folder, source, split) for split in source.rows}
    else:
        places = [Path(data) / part for part in (name, source.hub, source.hub.rpartition("/")[2], ".")]
        for folder in places:
            found = {split: _files(folder, source, split) for split in source.rows}
            if any(found.values()):
                break
        else:
            wanted = " or ".join(f"{split}.jsonl" for split in source.rows)
            looked = ", ".join(str(place) for place in places)
            raise FileNotFoundError(f"no {wanted} of {name}, and no copy of {source.hub}, in {looked}")
    rows = {split: [row for path in paths for row in _read(path)] for split, paths in found.items() if paths}
    for split, expected in source.rows.items():
        count = len(rows.get(split, []))
        if data is None and count != expected:
            raise ValueError(
                f"{source.hub} at {source.revision} has {count} {split} problems where {expected} are expected; "
                "empty its folder in the hub's cache and try again"
            )
        if split in rows and count != expected:
            warnings.warn(f"{found[split][0]} makes {count} problems of {name}, the whole is {expected}", stacklevel=3)
    return rows


def find_commit(source: ProblemSet) -> str:
    """The commit, of 40 digits, that a source is pinned to.

    Raises:
        OSError: it has to be looked up in the history, and the hub cannot be reached; or the history lacks it.
    """
    if re.fullmatch(r"[0-9a-f]{40}", source.revision):
        return source.revision
    from huggingface_hub import HfApi, constants

    day = source.revision if re.fullmatch(r"\d{4}-\d\d-\d\d", source.revision) else None
    try:
        history = HfApi().list_repo_commits(source.hub, repo_type="dataset")  # the newest first
    except Exception as error:
        cache = Path(constants.HF_HUB_CACHE) / f"datasets--{source.hub.replace('/', '--')}" / "snapshots"
        cached = [path.name for path in cache.glob("*" if day else f"{source.revision}*")]
        if len(cached) == 1:
            return cached[0]
        raise OSError(_unreachable(source, error)) from error
    for commit in history:
        fits = f"{commit.created_at:%Y-%m-%d}" <= day if day else commit.commit_id.startswith(source.revision)
        if fits:
            return commit.commit_id
    raise OSError(f"{source.hub} has no commit {source.revision} in its history")


def _download(source: ProblemSet) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [pattern for split in source.rows for pattern in _patterns(source, split)]
    commit = find_commit(source)
    try:
        return Path(snapshot_download(source.hub, repo_type="dataset", revision=commit, allow_patterns=wanted))
    except Exception as error:
        raise OSError(_unreachable(source, error)) from error


def _unreachable(source: ProblemSet, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{source.hub} cannot be loaded from the hub ({reason}); pass data=, a folder that holds it"


def _patterns(source: ProblemSet, split: Split) -> list[str]:
    usual = [pattern.format(split=split) for pattern in _USUAL]
    return [source.files[split], *usual] if split in source.files else usual


def _files(folder: Path, source: ProblemSet, split: Split) -> list[Path]:
    return next((files for pattern in _patterns(source, split) if (files := sorted(folder.glob(pattern)))), [])


def _read(path: Path) -> list[Row]:
    try:
        if path.suffix == ".parquet":
            return _read_parquet(path)
        text = path.read_text(encoding="utf-8")
        rows = (
            json.loads(text)
            if path.suffix == ".json"
            else [json.loads(line) for line in text.split("\n") if line.strip()]
        )
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds something other than rows of named columns")
    return rows


def _read_parquet(path: Path) -> list[Row]:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ImportError('parquet files need datasets: pip install "tinylora_lite[train]"') from error
    rows: list[Row] = parquet.read_table(path).to_pylist()
    return rows
