"""Scores a model on a task, and keeps every completion, so that an evaluation that was stopped goes on.

A folder holds one evaluation: ``evaluation.json``, which says of what it is and ends with the score, and
``completions.jsonl``, one completion a line; ``completions.jsonl.part``, to which every batch is appended, until then.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from tinylora_lite.adapter.adapter import TinyLoraAdapter
from tinylora_lite.adapter.attached import adapter_of
from tinylora_lite.adapter.weights import base_fingerprint
from tinylora_lite.evaluation.score import FILE, PART, RECORD, Completion, Score, judge, read_completions
from tinylora_lite.sampling.policy import check_tokenizer
from tinylora_lite.sampling.rollouts import Rollouts, Sampler, encode_prompts
from tinylora_lite.sampling.sampler import ModelSampler, sample
from tinylora_lite.utils import distributed
from tinylora_lite.utils.files import atomic_write
from tinylora_lite.utils.record import base_gguf, check_same, environment, seed_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tinylora_lite.adapter.batched import Population
    from tinylora_lite.tasks.task import Example, Task


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
) -> Score:
    """Scores a model on a split of a task.

    Where ``torch.distributed`` is initialised, every process calls this with the same arguments: each answers its share
    of every batch, with the random numbers of one process, the first one writes, and all return the same score.

    Args:
        model: any causal language model of transformers, adapted or not; ``None`` where a ``sampler`` answers alone.
        tokenizer: the model's.
        task: the problems and the reward.
        split: ``"test"``, ``"validation"`` or ``"train"``.
        problems: how many of the split, from its start; ``None`` takes all.
        samples: completions for each problem; with ``temperature=0`` one is enough.
        temperature: of sampling; 0 is greedy.
        max_new_tokens: the length limit.
        batch_size: completions decoded together; another size draws other samples.
        seed: of the sampling.
        truncated: what a completion cut off at the limit is worth, to both rewards: ``"zero"``, or ``"score"``, its
            text is scored like any other.
        progress: called with completions done and completions in all.
        sampler: what answers; ``None`` is the model itself. Given both, the sampler is brought into step with the
            adapter that the model carries first.
        folder: where all completions and a record are kept; an evaluation that was stopped goes on from the last
            complete batch. The rewards are computed anew from the texts.
        subject: what is evaluated, in words that tell it from others, for the record in ``folder``; by default the
            fingerprints of the model's weights and of its adapter's parameters.

    Raises:
        ValueError: the split is empty or unknown, a number is below 1, the tokenizer lacks a pad token, an end token or
            a chat template, the reward is no finite number, there is neither model nor sampler, or ``folder`` holds
            an evaluation of something else.
    """
    queue = _queue(tokenizer, task, split, problems, samples, batch_size, truncated)
    carried = None if model is None else adapter_of(model)
    adapter = carried if isinstance(carried, TinyLoraAdapter) and carried.enabled else None
    settings: dict[str, Any] = {}
    completions: list[Completion] = []
    part = None if folder is None else Path(folder) / PART
    if part is not None:
        if subject is None:
            if model is None:
                raise ValueError("a folder must say what was evaluated, and a sampler alone does not; give subject=")
            subject = _subject(model, adapter)
        shown = [[shot.prompt, shot.solution] for shot in task.shots]
        asked = [task.system, *shown, *([example.prompt, example.gold] for example in queue[::samples])]
        settings = {
            "task": task.name,
            "split": split,
            "problems": len(queue) // samples,
            "problems_sha256": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
            "samples": samples,
            "temperature": float(temperature),
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "seed": seed,
            "truncated": truncated,
            "sampler": ModelSampler.__name__ if sampler is None else type(sampler).__name__,
            **subject,
        }
        found = distributed.all_gather_object(_open(part.parent, settings))[0]
        completions = [
            judge(task, truncated, e, c.text, c.tokens, c.truncated) for e, c in zip(queue, found, strict=False)
        ]
        part = part if distributed.rank() == 0 else None
    if part is not None:
        atomic_write(part, _lines(completions, samples))
    if sampler is None:
        if model is None:
            raise ValueError("give a model, or the sampler that answers in its place")
        sampler = ModelSampler(model, tokenizer)
    # Where several processes share a server, all of them are there when it is given an adapter.
    if model is not None and (len(completions) < len(queue) or distributed.world_size() > 1):
        sampler.sync(adapter)
    device = "cpu" if model is None else next(model.parameters()).device
    rank, processes = distributed.rank(), distributed.world_size()
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    if progress and completions:
        progress(len(completions), len(queue))
    for start in range(len(completions), len(queue), batch_size):
        chunk = queue[start : start + batch_size]
        first, last = (len(chunk) * place // processes for place in (rank, rank + 1))
        own = chunk[first:last] or chunk[:1]  # whoever has nothing to answer must sample too: a base may be sharded
        ids, mask = encode_prompts(tokenizer, task, own, device)
        options["seed"] = seed_of("evaluate", seed, start)
        judged = _judged(task, truncated, own, sampler.sample(ids, mask, first_row=first, **options))
        for share in distributed.all_gather_object(judged[: last - first]):
            completions += share
        if part is not None:
            with part.open("a", encoding="ascii") as file:
                file.write(_lines(completions[start:], samples, start))
                file.flush()
                os.fsync(file.fileno())
        if progress:
            progress(len(completions), len(queue))
    score = Score.of(completions, samples)
    if part is not None:
        part.replace(part.with_name(FILE))
        record = {"settings": settings, "score": score.details(), "environment": environment()}
        atomic_write(part.with_name(RECORD), json.dumps(record, indent=1) + "\n")
    return score


def evaluate_population(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    population: Population,
    *,
    split: str = "test",
    problems: int | None = None,
    samples: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 256,
    seed: int | Sequence[int] = 0,
    truncated: Literal["zero", "score"] = "zero",
) -> list[Score]:
    """The score of each adapter of the population that a model carries: the one it has alone.

    The arguments and errors are those of :func:`evaluate`; ``batch_size`` counts the completions of each adapter.
    ``seed`` is one for all adapters, which then answer with the same random numbers, or one for each.
    """
    queue = _queue(tokenizer, task, split, problems, samples, batch_size, truncated)
    K, device = len(population), next(model.parameters()).device
    seeds = [seed] * K if isinstance(seed, int) else seed
    if len(seeds) != K:
        raise ValueError(f"the population has {K} adapters, and there are {len(seeds)} seeds")
    completions: list[list[Completion]] = [[] for _ in range(K)]
    for start in range(0, len(queue), batch_size):
        chunk = queue[start : start + batch_size]
        ids, mask = encode_prompts(tokenizer, task, chunk, device)
        rollouts = sample(
            model,
            tokenizer,
            ids.repeat(K, 1),
            mask.repeat(K, 1),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            adapters=torch.arange(K).repeat_interleave(len(chunk)),
            seed=[seed_of("evaluate", own, start) for own in seeds],
        )
        judged = _judged(task, truncated, chunk * K, rollouts)
        for k, own in enumerate(completions):
            own += judged[k * len(chunk) : (k + 1) * len(chunk)]
    return [Score.of(own, samples) for own in completions]


def _queue(
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    split: str,
    problems: int | None,
    samples: int,
    batch_size: int,
    truncated: str,
) -> list[Example]:
    """The problems to answer, each as often as it has samples."""
    check_tokenizer(tokenizer)
    if truncated not in ("zero", "score"):
        raise ValueError(f"truncated must be zero or score, not {truncated!r}")
    if split not in ("test", "validation", "train"):
        raise ValueError(f"split must be test, validation or train, not {split!r}")
    if min(samples, batch_size, 1 if problems is None else problems) < 1:
        raise ValueError(
            f"problems, samples and batch_size must be at least 1, not {problems}, {samples}, {batch_size}"
        )
    examples: Sequence[Example] = getattr(task, split)[:problems]
    if not examples:
        raise ValueError(f"task {task.name} has no {split} problems to evaluate on")
    task.score("", examples[0].gold)  # a reward that fails should do so before an hour of sampling
    return [example for example in examples for _ in range(samples)]


def _judged(task: Task, truncated: str, examples: Iterable[Example], rollouts: Rollouts) -> list[Completion]:
    answers = zip(examples, rollouts.texts, rollouts.lengths.tolist(), rollouts.truncated.tolist(), strict=True)
    return [judge(task, truncated, *answer) for answer in answers]


def _open(folder: Path, settings: dict[str, Any]) -> Sequence[Completion]:
    """The completions in complete batches that an evaluation with these settings has left, none where it is new."""
    record = folder / RECORD
    if not record.exists():
        for stray in (folder / FILE, folder / PART):
            if stray.exists():
                raise ValueError(f"{stray} is there without its {RECORD}; give another folder, or delete it")
        atomic_write(record, json.dumps({"settings": settings}, indent=1) + "\n")
        return []
    try:
        saved = dict(json.loads(record.read_text(encoding="utf-8"))["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{record} is damaged ({error}); delete its folder to evaluate again") from error
    check_same(folder, "an evaluation", saved, settings)
    if (folder / FILE).exists():
        return Score.load(folder).completions
    found = read_completions(folder / PART) if (folder / PART).exists() else []
    return found[: len(found) // settings["batch_size"] * settings["batch_size"]]


def _subject(model: nn.Module, adapter: TinyLoraAdapter | None) -> dict[str, str]:
    """The fingerprint of the weights, and the adapter's settings and the hash of its v."""
    base = {"base": base_fingerprint(model)}
    if gguf := base_gguf(model):
        base["base_gguf"] = gguf
    if adapter is None:
        return base | {"adapter": "none"}
    v = hashlib.sha256(adapter.vectors.detach().cpu().numpy().tobytes()).hexdigest()
    return base | {"adapter": f"{adapter.extra_repr()}; SHA-256 of v {v}"}


def _lines(completions: Iterable[Completion], samples: int, first: int = 0) -> str:
    """Completions as they are written, with the places of problem and sample; ``first`` is the first one's place."""
    rows = (
        {"problem": place // samples, "sample": place % samples} | asdict(completion)
        for place, completion in enumerate(completions, first)
    )
    # Escaped to ASCII: no text, whatever a model wrote, breaks a line or cannot be encoded.
    return "".join(json.dumps(row) + "\n" for row in rows)
