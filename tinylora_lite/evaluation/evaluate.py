"""How often a model is right, how sure of that we are, and every completion to read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from tinylora_lite.adapter.adapter import adapter_of
from tinylora_lite.adapter.batched import Population
from tinylora_lite.evaluation.log import (
    append_rows,
    close_evaluation,
    open_evaluation,
    problems_hash,
    subject_of,
)
from tinylora_lite.evaluation.score import Completion, Score, judge
from tinylora_lite.sampling.rollouts import Sampler, check_tokenizer, encode_prompts
from tinylora_lite.sampling.sampler import ModelSampler
from tinylora_lite.tasks.task import Example, Task
from tinylora_lite.utils import distributed
from tinylora_lite.utils.record import environment
from tinylora_lite.utils.seeds import seed_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@overload
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    population: Population,
    split: str = "test",
    problems: int | None = None,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 256,
    seed: int = 0,
    truncated: Literal["zero", "score"] = "zero",
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
    seed: int = 0,
    truncated: Literal["zero", "score"] = "zero",
    progress: Callable[[int, int], None] | None = None,
    sampler: Sampler | None = None,
    folder: str | Path | None = None,
    subject: Mapping[str, str] | None = None,
    population: Population | None = None,
) -> Score | list[Score]:
    """Scores a model on a split of a task.

    Args:
        model: any causal language model of transformers, adapted or not; ``None`` where a ``sampler`` answers as it is.
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
        folder: where all completions and a record are kept (:mod:`tinylora_lite.evaluation.log`), and an evaluation
            that was stopped goes on from the last complete batch. The rewards are computed anew from the texts.
        subject: what is evaluated, in words that tell it from others, for the record in ``folder``; by default the
            fingerprints of the model's weights and of its adapter's numbers.
        population: what the model carries, if it is one: every member answers the same problems with the same random
            numbers, and the result is a list. ``samples``, ``progress``, ``sampler`` and ``folder`` are not for it.

    Raises:
        ValueError: the split is empty or unknown, a number is below 1, the tokenizer lacks a pad token, an end token or
            a chat template, the reward is no finite number, there is neither model nor sampler, or ``folder`` holds
            an evaluation of something else.
    """
    if population is not None:
        from tinylora_lite.training.population_training import evaluate_population  # which builds on this module

        if model is None or sampler is not None or folder is not None or samples != 1 or progress is not None:
            raise ValueError("a population answers by its model, once, without samples, progress, sampler and folder")
        return evaluate_population(
            model,
            tokenizer,
            population,
            task,
            split=split,
            problems=problems,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed,
            truncated=truncated,
        )
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
    completions = [
        judge(task, truncated, example, row["text"], row["tokens"], row["truncated"])
        for example, row in zip(queue, rows, strict=False)
    ]

    if sampler is None:
        assert model is not None
        sampler = ModelSampler(model, tokenizer)
    # Where several processes share a server, all of them are there when it is given an adapter.
    if model is not None and (len(rows) < len(queue) or distributed.world_size() > 1):
        sampler.sync(adapter)
    device = "cpu" if model is None else next(model.parameters()).device
    if progress and rows:
        progress(len(rows), len(queue))
    for start in range(len(rows), len(queue), batch_size):
        chunk = queue[start : start + batch_size]
        rollouts = sampler.sample(
            *encode_prompts(tokenizer, task, chunk, device),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed_of("evaluate", seed, start),
        )
        answers = zip(chunk, rollouts.texts, rollouts.lengths.tolist(), rollouts.truncated.tolist(), strict=True)
        completions += [judge(task, truncated, *answer) for answer in answers]
        if folder is not None:
            append_rows(folder, _rows(completions[start:], start, samples))
        if progress:
            progress(len(completions), len(queue))
    score = Score.of(completions, samples)
    if folder is not None:
        result = {"score": score.details(), "environment": environment()}
        close_evaluation(folder, _rows(completions, 0, samples), result)
    return score


def _rows(completions: Sequence[Completion], first: int, samples: int) -> list[dict[str, Any]]:
    """Completions as they are written, the place of the problem and of the sample before them."""
    places = (divmod(place, samples) for place in range(first, first + len(completions)))
    return [
        {"problem": problem, "sample": sample} | asdict(completion)
        for (problem, sample), completion in zip(places, completions, strict=True)
    ]
