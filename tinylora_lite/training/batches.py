"""What a step trains on: completions that were sampled and scored (GRPO), or worked answers (SFT)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinylora_lite.sampling.rollouts import Rollouts, Sampler, encode_prompts
from tinylora_lite.sampling.sampler import sample
from tinylora_lite.training.settings import GRPOSettings, TrainingSettings
from tinylora_lite.utils import distributed
from tinylora_lite.utils.record import seed_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tinylora_lite.tasks.task import Example, Task

WORTH_A_PART = 256
"""Tokens of padding that a further part must save, since prompts are read once more there."""


@dataclass(frozen=True)
class Batch:
    """The rows of one step, those of one adapter after those of another.

    Attributes:
        advantages: ``[batch]`` float32; 1 in imitation.
        denominators: ``[batch]`` float32, what the sum over a row's tokens is divided by in its adapter's loss.
        counted: ``[batch]`` bool, the rows that take part in the loss.
        mini_batch: ``[batch]`` int64, the update that a row takes part in, counted from 0.
        tokens: ``[adapters]`` int64, tokens of the rows that take part, in all processes.
        metrics: what the record of each adapter's run says of the batch.
    """

    rollouts: Rollouts
    advantages: Tensor
    denominators: Tensor
    counted: Tensor
    mini_batch: Tensor
    tokens: Tensor
    metrics: list[dict[str, float]]


def draw_prompts(examples: Sequence[Example], settings: TrainingSettings, step: int) -> list[Example]:
    """The problems of a step: the training problems in an order of the seed's, reshuffled when all were used."""

    @cache
    def order(epoch: int) -> list[int]:
        return random.Random(seed_of("prompts", settings.seed, epoch)).sample(range(len(examples)), len(examples))

    first = step * settings.prompts_per_step
    places = (divmod(place, len(examples)) for place in range(first, first + settings.prompts_per_step))
    return [examples[order(epoch)[index]] for epoch, index in places]


def rollout(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    settings: GRPOSettings | Sequence[GRPOSettings],
    step: int,
    sampler: Sampler | None = None,
) -> Rollouts:
    """``group_size`` completions of every prompt, those of one prompt in consecutive rows.

    The ``sampler`` answers where there is one, already in step with the model, else the model. ``examples`` are this
    process's share of the step's problems, and ``step`` moves the seed. Where the model carries a population,
    ``settings`` is a list, and the examples of one adapter come after those of another.
    """
    several = settings if isinstance(settings, Sequence) else [settings]
    shared, seeds = several[0], [seed_of("rollout", own.seed, step) for own in several]
    ids, mask = encode_prompts(tokenizer, task, examples, next(model.parameters()).device)
    ids, mask = (tensor.repeat_interleave(shared.group_size, dim=0) for tensor in (ids, mask))
    options: Any = {"max_new_tokens": shared.max_new_tokens, "temperature": shared.temperature}
    options["first_row"] = distributed.rank() * len(ids)
    if sampler is not None:
        return sampler.sample(ids, mask, seed=seeds[0], **options)
    if isinstance(settings, Sequence):
        options["adapters"] = torch.arange(len(seeds)).repeat_interleave(len(ids) // len(seeds))
    return sample(model, tokenizer, ids, mask, seed=seeds, **options)


def score(rollouts: Rollouts, task: Task, examples: Sequence[Example], settings: GRPOSettings) -> Tensor:
    """Rewards of a rollout, ``[prompts, group_size]`` float32. Raises ``ValueError`` where one is no finite number."""
    golds = [example.gold for example in examples for _ in range(settings.group_size)]
    rewards = torch.tensor([task.score(text, gold) for text, gold in zip(rollouts.texts, golds, strict=True)])
    if settings.truncated != "score":
        rewards[rollouts.truncated.cpu()] = 0.0
    return rewards.view(len(examples), settings.group_size)


def micro_batches(lengths: Tensor, live: Tensor, size: int) -> Iterator[Tensor]:
    """Indices of the live rows in parts of at most ``size``, rows of like length together: less padding to compute.

    On a CPU, parts are cut where that saves padding; a GPU computes few large parts faster.
    """
    order = torch.argsort(lengths, stable=True)
    parts = [order[live[order]]] if live.any() else []
    while parts:
        part = parts.pop()
        saved = (lengths[part[-1]] - lengths[part]) * torch.arange(1, len(part) + 1, device=part.device)
        if lengths.device.type == "cpu" and saved.max() > WORTH_A_PART:
            cut = int(saved.argmax()) + 1
            parts += [part[cut:], part[:cut]]
        else:
            yield from part.split(size)
