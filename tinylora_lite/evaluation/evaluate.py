"""Scores a model on a task, and keeps every completion, so that an evaluation that was stopped goes on.

A folder holds one evaluation: ``evaluation.json``, which says of what it is and ends with the scores, and
``completions.jsonl``, one completion a line. Until the last completion is there the lines are in
``completions.jsonl.part``, to which every batch is appended; a line that was cut off is dropped when it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from tinylora_lite.adapter.adapter import adapter_of
from tinylora_lite.adapter.weights import base_fingerprint
from tinylora_lite.evaluation.score import FILE, PART, Completion, Score, judge, read_rows, whole_lines
from tinylora_lite.sampling.rollouts import Rollouts, Sampler, check_tokenizer, encode_prompts
from tinylora_lite.sampling.sampler import ModelSampler, sample
from tinylora_lite.utils import distributed
from tinylora_lite.utils.record import atomic_write, check_same, environment, seed_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tinylora_lite.adapter.adapter import TinyLoraAdapter
    from tinylora_lite.adapter.batched import Population
    from tinylora_lite.tasks.task import Example, Task

RECORD = "evaluation.json"


@overload
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    population: Population,
    split: str = "test",
    problems: int | None = None,
    samples: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 256,
    seed: int | Sequence[int] = 0,
    truncated: Literal["zero", "score"] = "zero",
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]: ...


@overload
def evaluate(
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    split: str = "test",
    problems: int | None = None,
    samples: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 256,
    seed: int = 0,
    truncated: Literal["zero", "score"] = "zero",
    progress: Callable[[int, int], None] | None = None,
    sampler: Sampler | None = None,
    folder: str | Path | None = None,
    subject: Mapping[str, str] | None = None,
    population: None = None,
) -> Score: ...


def evaluate(
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    split: str = "test",
    problems: int | None = None,
    samples: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 256,
    seed: int | Sequence[int] = 0,
    truncated: Literal["zero", "score"] = "zero",
    progress: Callable[[int, int], None] | None = None,
    sampler: Sampler | None = None,
    folder: str | Path | None = None,
    subject: Mapping[str, str] | None = None,
    population: Population | None = None,
) -> Score | list[Score]:
    """Scores a model on a split of a task.

    Args:
        model: any causal language model of transformers, adapted or not; ``None`` where a ``sampler`` answers alone.
        tokenizer: the model's.
        task: the problems and the reward.
        split: ``"test"``, ``"validation"`` or ``"train"``.
        problems: how many of the split, from its start; ``None`` takes all.
        samples: completions for each problem; with ``temperature=0`` one is enough.
        temperature: of sampling; 0 is greedy.
        max_new_tokens: the length limit.
        batch_size: completions decoded together (of each adapter); another size draws other samples.
        seed: of the sampling; of a population, one for all adapters or one for each.
        truncated: what a completion cut off at the limit is worth, to both rewards: ``"zero"``, or ``"score"``, its
            text is scored like any other.
        progress: called with completions done and completions in all.
        sampler: what answers; ``None`` is the model itself. Given both, the sampler is brought into step with the
            adapter that the model carries first.
        folder: where all completions and a record are kept; an evaluation that was stopped goes on from the last
            complete batch. The rewards are computed anew from the texts.
        subject: what is evaluated, in words that tell it from others, for the record in ``folder``; by default the
            fingerprints of the model's weights and of its adapter's parameters.
        population: what the model carries, if it is one: every adapter answers the same problems with the same random
            numbers, as it does alone, and the result is a list. ``sampler`` and ``folder`` are not for it.

    Raises:
        ValueError: the split is empty or unknown, a number is below 1, the tokenizer lacks a pad token, an end token or
            a chat template, the reward is no finite number, there is neither model nor sampler, or ``folder`` holds
            an evaluation of something else.
    """
    check_tokenizer(tokenizer)
    if split not in ("test", "validation", "train"):
        raise ValueError(f"split must be test, validation or train, not {split!r}")
    if min(samples, batch_size, 1 if problems is None else problems) < 1:
        raise ValueError(
            f"problems, samples and batch_size must be at least 1, not {problems}, {samples}, {batch_size}"
        )
    if truncated not in ("zero", "score"):
        raise ValueError(f"truncated must be zero or score, not {truncated!r}")
    examples: Sequence[Example] = getattr(task, split)[:problems]
    if not examples:
        raise ValueError(f"task {task.name} has no {split} problems to evaluate on")
    task.score("", examples[0].gold)  # a reward that fails should do so before an hour of sampling
    if sampler is None and model is None:
        raise ValueError("give a model, or the sampler that answers in its place")
    if population is not None and (model is None or sampler is not None or folder is not None):
        raise ValueError("a population answers by its model; leave sampler and folder out")
    if not isinstance(seed, int) and (population is None or len(seed) != len(population)):
        raise ValueError("several seeds are for a population, one for each adapter")
    adapter = None if model is None else adapter_of(model)
    adapter = adapter if adapter is not None and adapter.enabled else None
    queue = [example for example in examples for _ in range(samples)]
    rows: list[dict[str, Any]] = []
    if folder is not None:
        if subject is None:
            if model is None:
                raise ValueError("a folder must say what was evaluated, and a sampler alone does not; give subject=")
            subject = subject_of(model, adapter)
        settings = {
            "task": task.name,
            "split": split,
            "problems": len(examples),
            "problems_sha256": problems_hash(task, examples),
            "samples": samples,
            "temperature": float(temperature),
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "seed": seed,
            "truncated": truncated,
            "sampler": ModelSampler.__name__ if sampler is None else type(sampler).__name__,
        }
        rows = open_evaluation(folder, settings | dict(subject), batch_size)

    def judged(problems: Iterable[Example], rollouts: Rollouts) -> list[Completion]:
        answers = zip(problems, rollouts.texts, rollouts.lengths.tolist(), rollouts.truncated.tolist(), strict=True)
        return [judge(task, truncated, *answer) for answer in answers]

    completions = [
        judge(task, truncated, example, row["text"], row["tokens"], row["truncated"])
        for example, row in zip(queue, rows, strict=False)
    ]
    K = 1 if population is None else len(population)
    seeds = [seed] * K if isinstance(seed, int) else list(seed)
    of_adapters: list[list[Completion]] = [completions, *([] for _ in range(K - 1))]
    if sampler is None and model is not None:
        sampler = ModelSampler(model, tokenizer)
    assert sampler is not None
    # Where several processes share a server, all of them are there when it is given an adapter.
    if model is not None and (len(rows) < len(queue) or distributed.world_size() > 1):
        sampler.sync(adapter)
    device = "cpu" if model is None else next(model.parameters()).device
    if progress and rows:
        progress(len(rows), len(queue))
    options: Any = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    for start in range(len(rows), len(queue), batch_size):
        chunk = queue[start : start + batch_size]
        streams = [seed_of("evaluate", one, start) for one in seeds]
        ids, mask = encode_prompts(tokenizer, task, chunk, device)
        if population is None:
            completions += judged(chunk, sampler.sample(ids, mask, seed=streams[0], **options))
        else:
            assert model is not None
            whose, of_rows = torch.arange(K).repeat_interleave(len(chunk)), product(streams, range(len(chunk)))
            rollouts = sample(
                model, tokenizer, ids.repeat(K, 1), mask.repeat(K, 1), adapters=whose, streams=list(of_rows), **options
            )
            answers = judged(chunk * K, rollouts)
            for k, own in enumerate(of_adapters):
                own += answers[k * len(chunk) : (k + 1) * len(chunk)]
        if folder is not None:
            append_rows(folder, _rows(completions[start:], start, samples))
        if progress:
            progress(len(completions), len(queue))
    scores = [Score.of(own, samples) for own in of_adapters]
    if folder is not None:
        result = {"score": scores[0].details(), "environment": environment()}
        close_evaluation(folder, _rows(completions, 0, samples), result)
    return scores[0] if population is None else scores


def open_evaluation(folder: str | Path, settings: Mapping[str, Any], batch_size: int = 1) -> list[dict[str, Any]]:
    """The completions that an evaluation with these settings has left in ``folder``, none where it is new.

    Args:
        folder: made where it is missing.
        settings: everything that a completion depends on, as JSON can hold it.
        batch_size: completions drawn together; of a batch that is not complete none is taken.

    Raises:
        ValueError: the folder holds the evaluation of another model or other settings, or a damaged one.
    """
    folder = Path(folder)
    if not (folder / RECORD).exists():
        for stray in (folder / FILE, folder / PART):
            if stray.exists():
                raise ValueError(f"{stray} is there without its {RECORD}; give another folder, or delete it")
        atomic_write(folder / RECORD, json.dumps({"settings": dict(settings)}, indent=1) + "\n")
        return []
    check_same(folder, "an evaluation", read_record(folder)["settings"], settings)
    if (folder / FILE).exists():
        return read_rows(folder)
    rows = whole_lines(folder / PART) if (folder / PART).exists() else []
    del rows[len(rows) // batch_size * batch_size :]
    atomic_write(folder / PART, _lines(rows))  # without a line that was cut off, after which nothing could be appended
    return rows


def append_rows(folder: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Adds a batch to an evaluation that is under way; it is on the disk when this returns."""
    with (Path(folder) / PART).open("a", encoding="ascii") as file:
        file.write(_lines(rows))
        file.flush()
        os.fsync(file.fileno())


def close_evaluation(folder: str | Path, rows: Iterable[dict[str, Any]], result: Mapping[str, Any]) -> None:
    """Writes all completions to their file and adds ``result`` to the record; each appears whole or not at all."""
    folder = Path(folder)
    atomic_write(folder / FILE, _lines(rows))
    (folder / PART).unlink(missing_ok=True)
    atomic_write(folder / RECORD, json.dumps({"settings": read_record(folder)["settings"], **result}, indent=1) + "\n")


def read_record(folder: str | Path) -> dict[str, Any]:
    """What ``evaluation.json`` holds. Raises ``ValueError`` where it is damaged."""
    path = Path(folder) / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record["settings"], dict):
            raise TypeError("its settings are no table")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete its folder to evaluate again") from error
    return dict(record)


def subject_of(model: nn.Module, adapter: TinyLoraAdapter | None) -> dict[str, Any]:
    """What is evaluated: the fingerprint of the weights, and the adapter's settings and the hash of its v."""
    base = {"base": base_fingerprint(model)}
    if adapter is None:
        return base | {"adapter": "none"}
    v = hashlib.sha256(adapter.vectors.detach().cpu().numpy().tobytes()).hexdigest()
    return base | {"adapter": f"{adapter.extra_repr()}; SHA-256 of v {v}"}


def problems_hash(task: Task, examples: Sequence[Example]) -> str:
    """SHA-256 of what is asked, in hexadecimal: the system message, the prompts and the right answers."""
    asked = [task.system, *([example.prompt, example.gold] for example in examples)]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _rows(completions: Sequence[Completion], first: int, samples: int) -> list[dict[str, Any]]:
    """Completions as they are written, the place of the problem and of the sample before them."""
    places = (divmod(place, samples) for place in range(first, first + len(completions)))
    return [
        {"problem": problem, "sample": sample} | asdict(completion)
        for (problem, sample), completion in zip(places, completions, strict=True)
    ]


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    # Escaped to ASCII: no text, whatever a model wrote, breaks a line or cannot be encoded.
    return "".join(json.dumps(row) + "\n" for row in rows)
