"""GSM8K, MATH and the benchmarks beside them as tasks: one call, by name.

The paper does not publish its GSM8K prompt and its answer parser. Here GSM8K asks for the answer after ``####``, the
format of its own solutions, and mathematics is asked with SimpleRL's boxed template. The paper trains on all problems
(``validation=0``); here 500 are held out to choose settings with, so that the test set stays out of the choice.
"""

from __future__ import annotations

import ast
import json
import random
import re
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tinylora_lite.tasks import math_equal
from tinylora_lite.tasks.answers import Form, marked_answer
from tinylora_lite.tasks.catalog import PROBLEM_SETS, PROMPTS, ProblemSet, Split
from tinylora_lite.tasks.rewards import gsm8k_reward, keeps_format, math_reward
from tinylora_lite.tasks.task import Example, Task
from tinylora_lite.utils.record import seed_of

_USUAL = ("{split}.jsonl", "{split}.json", "{split}.parquet", "{split}-*.parquet", "data/{split}-*.parquet")


def load_task(
    name: str,
    *,
    data: str | Path | None = None,
    prompt: str | None = None,
    validation: int | None = None,
    seed: int = 0,
) -> Task:
    """A problem set as a task, from the hub at a pinned commit (through its cache) or from a folder.

    ``Task.reward`` is the strict reward of the prompt's format, ``Task.lenient`` the lenient one; see
    :func:`~tinylora_lite.gsm8k_reward` and :func:`~tinylora_lite.math_reward`. Problems whose row holds no answer are
    left out (two of ``math``): no completion could be right.

    Args:
        name: ``gsm8k`` and ``math`` (SimpleRL-Zoo's 8,523 hard problems of MATH; its test split is MATH-500) have
            training problems; ``math500``, ``minerva``, ``gaokao``, ``olympiadbench``, ``collegemath``, ``aime24`` and
            ``amc23`` are for evaluation alone.
        data: a folder instead of the hub: a copy of the hub's repository, or ``train.jsonl`` and ``test.jsonl``, in the
            folder itself or below the set's name. A number of problems other than the whole set's is a warning.
        prompt: a key of :data:`~tinylora_lite.tasks.catalog.PROMPTS`; ``None`` takes ``"####"`` for GSM8K and
            ``"boxed"`` for the others.
        validation: training problems to hold out for choosing; ``None`` takes 500 where there is training, 0 none.
        seed: of the choice of those. It is not the seed of training, so that runs are chosen on the same problems.

    Raises:
        ValueError: the name or the prompt is unknown, a file cannot be read, a row lacks a column, too many problems
            are to be held out, or the hub's file has another number of rows than the set.
        FileNotFoundError: the folder holds no file of the set.
        OSError: the hub cannot be reached, or lacks the revision.
        ImportError: math-verify is not installed, or a file is parquet and ``datasets`` is not.
    """
    if name not in PROBLEM_SETS:
        raise ValueError(f"there is no problem set {name!r}; there are {', '.join(PROBLEM_SETS)}")
    source = PROBLEM_SETS[name]
    if (prompt or source.form) not in PROMPTS:
        raise ValueError(f"there is no prompt {prompt!r}; there are {', '.join(PROMPTS)}")
    asked = PROMPTS[prompt or source.form]
    if not source.numbers:
        math_equal.start()  # it gets ready while the problems are read and the model is loaded

    form = asked.form or source.form
    splits: dict[Split, list[Example]] = {"train": [], "test": []}
    for split, rows in _read_problems(name, source, data).items():
        for row in rows:
            gold, problem = _gold(_column(name, source.answer, row)), str(_column(name, source.problem, row)).strip()
            worked = next((row[column] for column in source.solution if isinstance(row.get(column), str)), None)
            if gold:
                solution = None if worked is None else _solution(worked, gold, form)
                splits[split].append(Example(asked.user.replace("{problem}", problem), gold, solution))

    train = splits["train"]
    held_out = (source.validation if validation is None else validation) if train else 0
    if not 0 <= held_out < max(1, len(train)):
        if validation is not None:
            raise ValueError(f"validation must be from 0 to {len(train) - 1}, the training problems but one")
        held_out = len(train) // 5  # a small folder of one's own
    chosen = set(random.Random(seed_of("validation", name, seed)).sample(range(len(train)), held_out))
    reward = partial(gsm8k_reward if source.numbers else math_reward, form=form)
    return Task(
        name=name,
        train=tuple(example for i, example in enumerate(train) if i not in chosen),
        validation=tuple(train[i] for i in sorted(chosen)),
        test=tuple(splits["test"]),
        reward=reward if asked.form else partial(reward, lenient=True),
        system=asked.system,
        lenient=partial(reward, lenient=True),
        formatted=partial(keeps_format, form=form, number=source.numbers) if asked.form else None,
    )


def find_commit(source: ProblemSet) -> str:
    """The commit, of 40 digits, that a source is pinned to; looked up in the history, or without network in the cache.

    Raises ``OSError`` where the history lacks it, and what ``huggingface_hub`` raises without a cache.
    """
    if len(source.revision) == 40:
        return source.revision
    from huggingface_hub import HfApi, constants

    is_day = "-" in source.revision
    try:
        history = HfApi().list_repo_commits(source.hub, repo_type="dataset")  # the newest first
    except Exception:
        cache = Path(constants.HF_HUB_CACHE) / f"datasets--{source.hub.replace('/', '--')}" / "snapshots"
        cached = [path.name for path in cache.glob("*" if is_day else f"{source.revision}*")]
        if len(cached) == 1:
            return cached[0]
        raise
    for commit in history:
        old_enough = is_day and f"{commit.created_at:%Y-%m-%d}" <= source.revision
        if old_enough or commit.commit_id.startswith(source.revision):
            return commit.commit_id
    raise OSError(f"{source.hub} has no commit {source.revision} in its history")


def _column(name: str, columns: Sequence[str], row: dict[str, Any]) -> Any:
    for column in columns:
        if column in row:
            return row[column]
    raise ValueError(f"a row of {name} has no column {' or '.join(columns)}; it has {', '.join(row)}")


def _gold(answer: object) -> str:
    """The answer as a string: of a list its items, of a worked answer what follows its mark, of 27.0 27."""
    if isinstance(answer, str) and re.fullmatch(r"\s*\[['\"].*\]\s*", answer, re.DOTALL):
        answer = ast.literal_eval(answer.strip())  # a list that became text on its way to the hub
    if isinstance(answer, list):
        return ", ".join(str(item).strip().strip("$") for item in answer)
    if isinstance(answer, float) and answer.is_integer():
        return str(int(answer))
    text = "" if answer is None else str(answer).strip()
    return marked_answer(text, "####") or marked_answer(text, "boxed") or text


def _solution(worked: str, gold: str, form: Form) -> str:
    r"""A worked answer that ends in the format asked for, without GSM8K's calculator notes ``<<48/2=24>>``."""
    text = re.sub(r"<<[^<>]*>>", "", worked).strip()
    if marked_answer(text, form) is not None:
        return text
    text = re.sub(r"\n?####.*$", "", text).strip()
    return f"{text}\n#### {gold}" if form == "####" else f"{text}\nThe final answer is \\boxed{{{gold}}}."


def _read_problems(name: str, source: ProblemSet, data: str | Path | None) -> dict[Split, list[dict[str, Any]]]:
    """The rows of each split as the files hold them; a split that a folder lacks is left out."""
    hub_name = source.hub.rpartition("/")[2]
    places = [_download(source)] if data is None else [Path(data) / part for part in (name, source.hub, hub_name, ".")]
    by_place = ({split: _files(folder, source, split) for split in source.rows} for folder in places)
    found = next((files for files in by_place if data is None or any(files.values())), None)
    if found is None:
        wanted, looked = " or ".join(f"{split}.jsonl" for split in source.rows), ", ".join(map(str, places))
        raise FileNotFoundError(f"no {wanted} of {name}, and no copy of {source.hub}, in {looked}")
    rows = {split: [row for path in paths for row in _read(path)] for split, paths in found.items()}
    for split, expected in source.rows.items():
        count = len(rows[split])
        if data is None and count != expected:
            raise ValueError(
                f"{source.hub} at {source.revision} has {count} {split} problems where {expected} are expected; "
                "empty its folder in the hub's cache and try again"
            )
        if count not in (0, expected):
            warnings.warn(f"{found[split][0]} makes {count} problems of {name}, the whole is {expected}", stacklevel=3)
    return rows


def _download(source: ProblemSet) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [pattern for split in source.rows for pattern in _patterns(source, split)]
    try:
        commit = find_commit(source)
        return Path(snapshot_download(source.hub, repo_type="dataset", revision=commit, allow_patterns=wanted))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"{source.hub} cannot be loaded from the hub ({reason}); pass data=, a folder that holds it"
        ) from error


def _patterns(source: ProblemSet, split: Split) -> list[str]:
    usual = [pattern.format(split=split) for pattern in _USUAL]
    return [source.files[split], *usual] if split in source.files else usual


def _files(folder: Path, source: ProblemSet, split: Split) -> list[Path]:
    return next((files for pattern in _patterns(source, split) if (files := sorted(folder.glob(pattern)))), [])


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            return list(parquet.read_table(path).to_pylist())
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(x) for x in text.split("\n") if x.strip()]
    except ModuleNotFoundError as error:
        raise ImportError('parquet files need datasets: pip install "tinylora_lite[train]"') from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds something other than rows of named columns")
    return rows
