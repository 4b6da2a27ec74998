"""Training a population: one batch of samples, one backward pass, and an optimiser for each member.

A member's step is the one that it would make alone: its own prompts in its own order, its own random numbers, its own
loss and its own clipping. Only the arithmetic is shared, so what differs is rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor

from tinylora_lite.adapter.batched import Population
from tinylora_lite.adapter.weights import base_fingerprint
from tinylora_lite.evaluation.score import Completion, Score, judge
from tinylora_lite.sampling.logprobs import completion_logprobs
from tinylora_lite.sampling.rollouts import Rollouts, check_tokenizer, encode_prompts
from tinylora_lite.sampling.sampler import sample
from tinylora_lite.tasks.task import Example, Task
from tinylora_lite.training.batches import check_solutions, check_task, draw_prompts, encode_solutions, score
from tinylora_lite.training.losses import grpo_advantages, grpo_loss
from tinylora_lite.training.ready import ready_to_train
from tinylora_lite.training.settings import GRPOSettings, SFTSettings
from tinylora_lite.utils import distributed
from tinylora_lite.utils.progress import progress_bar
from tinylora_lite.utils.record import Run
from tinylora_lite.utils.seeds import seed_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OWN = ("seed", "learning_rate")
"""The settings that may differ between the members of a population."""

Settings = TypeVar("Settings", GRPOSettings, SFTSettings)


def train_population_grpo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    population: Population,
    task: Task,
    settings: Sequence[GRPOSettings],
    *,
    on_step: Callable[[list[Run]], None] | None = None,
    progress: bool = True,
) -> list[Run]:
    """GRPO for every member at once; :func:`~tinylora_lite.train_grpo` calls it for a population.

    Args:
        model: carries the population.
        tokenizer: the model's.
        population: the members.
        task: prompts come from its training split, evaluations from its validation split.
        settings: one for each member; all but seed and learning rate are the same.
        on_step: called with the runs so far after every step.
        progress: shows a bar where standard error is a terminal.

    Returns:
        A run for each member, with its ``reward``, ``length``, ``entropy``, ``truncated``, ``silent_groups``,
        ``gradient_norm`` and ``norm`` of every step. ``seconds`` are the member's share of the time that all took.

    Raises:
        ValueError: settings differ in what the members share, or ask for what populations do not do: a KL penalty,
            several epochs for a step; or whatever ``train_grpo`` refuses.
        FloatingPointError: the model puts out NaN, or a gradient is not finite.
    """
    check_settings(population, settings)
    shared = settings[0]
    if shared.kl or shared.epochs_per_step > 1:
        raise ValueError("populations train with kl=0 and epochs_per_step=1; train the members one by one for others")
    check_task(tokenizer, task, shared)
    K, prompts, group_size = len(population), shared.prompts_per_step, shared.group_size
    of_row = torch.arange(K).repeat_interleave(prompts * group_size)

    def step_of(step: int) -> tuple[Rollouts, Tensor, list[dict[str, float]]]:
        examples = [example for own in settings for example in draw_prompts(task.train, own, step)]
        ids, mask = encode_prompts(tokenizer, task, examples)
        rollouts = sample(
            model,
            tokenizer,
            ids.repeat_interleave(group_size, dim=0),
            mask.repeat_interleave(group_size, dim=0),
            max_new_tokens=shared.max_new_tokens,
            temperature=shared.temperature,
            members=of_row,
            streams=[
                (seed_of("rollout", own.seed, step), place) for own in settings for place in range(prompts * group_size)
            ],
        )
        rewards = score(rollouts, task, examples, shared).view(K, prompts, group_size)
        advantages = torch.cat([grpo_advantages(own, shared.scale).flatten() for own in rewards])
        counted = torch.ones_like(rollouts.truncated) if shared.truncated != "mask" else ~rollouts.truncated
        of_token = rollouts.lengths * counted
        denominators = {
            "token": of_token.view(K, -1).sum(dim=1).clamp(min=1).repeat_interleave(prompts * group_size),
            "sequence": prompts * group_size * rollouts.lengths,
            "constant": torch.tensor(prompts * group_size * shared.max_new_tokens),
        }
        rows = [
            {
                "reward": own.mean().item(),
                "length": rollouts.lengths[of_row == k].float().mean().item(),
                "entropy": (rollouts.entropies[of_row == k].sum() / rollouts.lengths[of_row == k].sum()).item(),
                "truncated": rollouts.truncated[of_row == k].float().mean().item(),
                "silent_groups": (own == own[:, :1]).all(dim=1).float().mean().item(),
            }
            for k, own in enumerate(rewards)
        ]
        return rollouts, advantages * counted / denominators[shared.normalise], rows

    return _train(model, tokenizer, population, task, settings, "grpo", step_of, shared.tis_cap, on_step, progress)


def train_population_sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    population: Population,
    task: Task,
    settings: Sequence[SFTSettings],
    *,
    on_step: Callable[[list[Run]], None] | None = None,
    progress: bool = True,
) -> list[Run]:
    """SFT for every member at once; :func:`~tinylora_lite.train_sft` calls it for a population.

    Arguments, result and errors as in :func:`train_population_grpo`; a run's steps hold ``loss`` (nats for a token,
    before the update) and ``length`` in place of what is sampled.
    """
    settings = [own.in_steps(len(task.train)) for own in settings]
    check_settings(population, settings)
    shared, K = settings[0], len(population)
    check_solutions(tokenizer, task, task.train, "training", shared.max_new_tokens)
    of_row = torch.arange(K).repeat_interleave(shared.prompts_per_step)

    def step_of(step: int) -> tuple[Rollouts, Tensor, list[dict[str, float]]]:
        examples = [example for own in settings for example in draw_prompts(task.train, own, step)]
        answers = replace(encode_solutions(tokenizer, task, examples), members=of_row)
        tokens = answers.lengths.view(K, -1).sum(dim=1)
        rows = [{"length": own.item() / shared.prompts_per_step} for own in tokens]
        return answers, (1.0 / tokens).repeat_interleave(shared.prompts_per_step), rows

    return _train(model, tokenizer, population, task, settings, "sft", step_of, None, on_step, progress)


def check_settings(population: Population, settings: Sequence[GRPOSettings] | Sequence[SFTSettings]) -> None:
    """Raises ``ValueError`` unless there is one for each member and they differ in ``OWN`` only."""
    if len(settings) != len(population):
        raise ValueError(f"the population has {len(population)} members, and there are settings for {len(settings)}")
    for own in settings:
        for name, value in asdict(own).items():
            if name not in OWN and value != getattr(settings[0], name):
                raise ValueError(
                    f"members share {name}, and these have {getattr(settings[0], name)!r} and {value!r}; "
                    f"only {' and '.join(OWN)} may differ"
                )
    if distributed.world_size() > 1:
        raise ValueError("a population trains in one process; start one for each part of it")


def _train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    population: Population,
    task: Task,
    settings: Sequence[Settings],
    method: str,
    step_of: Callable[[int], tuple[Rollouts, Tensor, list[dict[str, float]]]],
    tis_cap: float | None,
    on_step: Callable[[list[Run]], None] | None,
    progress: bool,
) -> list[Run]:
    """The loop of both methods: ``step_of`` gives completions, what their tokens count, and a row for each member."""
    shared, K = settings[0], len(population)
    optimizers = [
        torch.optim.Adam([v], lr=own.learning_rate) for v, own in zip(population.vectors, settings, strict=True)
    ]
    base = base_fingerprint(model)
    runs = [
        Run(method, asdict(own), population.describe(k), population.vectors[k].numel(), task.name, base)
        for k, own in enumerate(settings)
    ]
    started = time.perf_counter()
    with ready_to_train(model, population), progress_bar(f"{method} of {K}", shared.steps, show=progress) as advance:
        for step in range(shared.steps):
            completions, weights, rows = step_of(step)
            losses = _backward(model, population, completions, weights, shared, tis_cap)
            for k, (own, optimizer) in enumerate(zip(settings, optimizers, strict=True)):
                norm = torch.nn.utils.clip_grad_norm_([population.vectors[k]], own.max_grad_norm).item()
                if not math.isfinite(norm):
                    raise FloatingPointError(f"the gradient of member {k} is not finite; lower its learning rate")
                for group in optimizer.param_groups:
                    group["lr"] = own.learning_rate_at(step)
                if norm > 0:
                    optimizer.step()
                rows[k] |= {"gradient_norm": norm, "norm": population.vectors[k].detach().norm().item()}
                rows[k] |= {"loss": losses[k].item()} if method == "sft" else {}
            for run, row in zip(runs, rows, strict=True):
                run.seconds = (time.perf_counter() - started) / K
                run.steps.append({"step": step + 1} | row | {"seconds": run.seconds})
            if shared.evaluate_every and (step + 1) % shared.evaluate_every == 0:
                scores = evaluate_population(
                    model,
                    tokenizer,
                    population,
                    task,
                    split="validation",
                    problems=shared.evaluate_problems,
                    temperature=shared.temperature,
                    max_new_tokens=shared.max_new_tokens,
                )
                for run, found in zip(runs, scores, strict=True):
                    run.evaluations.append({"step": step + 1} | found.summary())
            advance(" ".join(f"{row.get('reward', row.get('loss', 0.0)):.2f}" for row in rows))
            if on_step is not None:
                on_step(runs)
    return runs


def _backward(
    model: PreTrainedModel,
    population: Population,
    completions: Rollouts,
    weights: Tensor,
    settings: GRPOSettings | SFTSettings,
    tis_cap: float | None,
) -> Tensor:
    """Gradients of every member's loss.

    Args:
        model: carries the population.
        population: its gradients are made anew.
        completions: of all members.
        weights: ``[batch]``, what a token of each completion counts in its member's loss, the denominator included.
        settings: the temperature of GRPO, and how many rows make a pass.
        tis_cap: the largest importance weight; ``None`` leaves the correction for the sampler out.

    Returns:
        The weighted sum of ``-log p`` of each member, ``[members]``: in SFT its loss.
    """
    for v in population.vectors:
        v.grad = None
    losses = torch.zeros(len(population))
    order = torch.argsort(completions.lengths, stable=True)  # rows of like length together: less padding to compute
    for chunk in order[weights[order] != 0].split(settings.micro_batch):
        if not len(chunk):
            continue
        rows = completions.rows(chunk)
        temperature = settings.temperature if isinstance(settings, GRPOSettings) else 1.0
        logprobs = completion_logprobs(model, rows, temperature)
        loss = grpo_loss(
            logprobs,
            logprobs.detach(),
            weights[chunk],
            rows.completion_mask,
            denominator=1.0,
            sampler_logprobs=None if tis_cap is None else rows.logprobs,
            tis_cap=tis_cap or 1.0,
        )
        loss.backward()
        assert rows.members is not None
        own = -(logprobs.detach() * rows.completion_mask).sum(dim=1) * weights[chunk]
        losses.index_add_(0, rows.members, own)
    for v in population.vectors:
        v.grad = torch.zeros_like(v) if v.grad is None else v.grad
    return losses


def evaluate_population(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    population: Population,
    task: Task,
    *,
    split: str = "test",
    problems: int | None = None,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 256,
    seed: int = 0,
    truncated: Literal["zero", "score"] = "zero",
) -> list[Score]:
    """The score of every member on the same problems with the same random numbers.

    Arguments as in :func:`~tinylora_lite.evaluate`; each member's completions are those that it gives alone.

    Raises:
        ValueError: as ``evaluate``.
    """
    check_tokenizer(tokenizer)
    examples: Sequence[Example] = getattr(task, split)[:problems]
    if not examples:
        raise ValueError(f"task {task.name} has no {split} problems to evaluate on")
    K = len(population)
    completions: list[list[Completion]] = [[] for _ in range(K)]
    for start in range(0, len(examples), batch_size):
        chunk = list(examples[start : start + batch_size])
        ids, mask = encode_prompts(tokenizer, task, chunk)
        stream = seed_of("evaluate", seed, start)
        rollouts = sample(
            model,
            tokenizer,
            ids.repeat(K, 1),
            mask.repeat(K, 1),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            members=torch.arange(K).repeat_interleave(len(chunk)),
            streams=[(stream, place) for place in range(len(chunk))] * K,
        )
        answers = zip(rollouts.texts, rollouts.lengths.tolist(), rollouts.truncated.tolist(), strict=True)
        for place, answer in enumerate(answers):
            member, problem = divmod(place, len(chunk))
            completions[member].append(judge(task, truncated, chunk[problem], *answer))
    return [Score.of(own) for own in completions]
