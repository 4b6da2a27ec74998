"""GRPO: sample a group of answers to each prompt, and make the better ones likelier.

One step: ``rollout`` samples, ``score`` rewards, ``grpo_advantages`` compares, ``update_policy`` moves the numbers.

What was left out, and why: no value network (that is the idea of GRPO), no reward model (answers are checked),
no top-k or top-p in training (the sampler's probabilities would not be the trainer's), no dropout (nor would they).
A step whose gradient is zero, because every group agrees, moves nothing: Adam's momentum waits for the next one.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tinylora_lite.adapter import TinyLoraAdapter
from tinylora_lite.checkpoint import resume, save_checkpoint
from tinylora_lite.evaluate import evaluate
from tinylora_lite.fingerprint import base_fingerprint
from tinylora_lite.grpo_settings import GRPOSettings
from tinylora_lite.losses import grpo_advantages, grpo_loss
from tinylora_lite.progress import progress_bar
from tinylora_lite.runs import Run
from tinylora_lite.sampler import Rollouts, check_tokenizer, completion_logprobs, encode_prompts, sample
from tinylora_lite.seeds import seed_of
from tinylora_lite.tasks import Example, Task
from tinylora_lite.training import check_adapter, ready_to_train

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["GRPOSettings", "check_task", "draw_prompts", "rollout", "score", "train_grpo", "update_policy"]


def train_grpo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: TinyLoraAdapter | None,
    task: Task,
    settings: GRPOSettings | None = None,
    *,
    folder: str | Path | None = None,
    on_step: Callable[[Run], None] | None = None,
    progress: bool = True,
) -> Run:
    """Trains an adapter's numbers by GRPO, or all weights of the model where ``adapter`` is ``None``.

    Args:
        model: any causal language model of transformers. Where its gradient checkpointing is on, it is used.
        tokenizer: the model's.
        adapter: attached to the model; ``None`` trains every weight, in place.
        task: prompts come from its training split, evaluations from its validation split.
        settings: see :class:`~tinylora_lite.grpo_settings.GRPOSettings`; ``None`` takes its defaults.
        folder: where the run is saved; called again with the same base and settings, an interrupted run goes on from
            its last checkpoint to the same numbers as one that was never interrupted.
        on_step: called with the run so far after every step.
        progress: shows a bar where standard error is a terminal.

    Returns:
        The :class:`~tinylora_lite.runs.Run`.

    Raises:
        ValueError: the task is empty, the reward returns something other than a finite number, the tokenizer lacks a
            token, the adapter is not the model's, or ``folder`` holds a damaged run or one of other settings.
        FloatingPointError: the model puts out NaN, or the gradient is not finite; the numbers stay those of the last
            update.
    """
    settings = settings or GRPOSettings()
    check_task(tokenizer, task, settings)
    check_adapter(model, adapter)
    parameters: list[Tensor] = list(model.parameters()) if adapter is None else [adapter.vectors]
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    run = Run(
        method="grpo",
        settings=asdict(settings),
        adapter="all weights" if adapter is None else adapter.extra_repr(),
        parameters=sum(p.numel() for p in parameters),
        task=task.name,
        base=base_fingerprint(model),
    )
    reference = copy.deepcopy(model) if adapter is None and settings.kl > 0 else None
    if folder is not None:
        resume(folder, run, parameters, optimizer)

    started = time.perf_counter() - run.seconds
    with ready_to_train(model, adapter), progress_bar("GRPO", settings.steps, len(run.steps), progress) as advance:
        for step in range(len(run.steps), settings.steps):
            examples = draw_prompts(task.train, settings, step)
            rollouts = rollout(model, tokenizer, task, examples, settings, step)
            rewards = score(rollouts, task, examples, settings)
            advantages = grpo_advantages(rewards, settings.scale).flatten()
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate_at(step)
            gradient_norm, clipped = update_policy(model, adapter, reference, optimizer, rollouts, advantages, settings)
            row = {
                "step": step + 1,
                "reward": rewards.mean().item(),
                "length": rollouts.lengths.float().mean().item(),
                "truncated": rollouts.truncated.float().mean().item(),
                "entropy": (rollouts.entropies.sum() / rollouts.completion_mask.sum()).item(),
                "gradient_norm": gradient_norm,
                "clipped": clipped,
                "silent_groups": (rewards == rewards[:, :1]).all(dim=1).float().mean().item(),
                "norm": math.sqrt(sum(p.detach().float().pow(2).sum().item() for p in parameters)),
            }
            run.seconds = time.perf_counter() - started
            run.steps.append(row | {"seconds": run.seconds})
            if settings.evaluate_every and (step + 1) % settings.evaluate_every == 0:
                run.evaluations.append({"step": step + 1} | _validate(model, tokenizer, task, settings))
                run.seconds = time.perf_counter() - started
            if folder is not None and ((step + 1) % settings.save_every == 0 or step + 1 == settings.steps):
                save_checkpoint(folder, run, parameters, optimizer)
            advance(f"reward {row['reward']:.2f}")
            if on_step is not None:
                on_step(run)
    return run


def draw_prompts(examples: Sequence[Example], settings: GRPOSettings, step: int) -> list[Example]:
    """The prompts of a step: the training problems in an order of the seed's, reshuffled when all were used."""

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
    examples: list[Example],
    settings: GRPOSettings,
    step: int,
) -> Rollouts:
    """``group_size`` completions of every prompt, those of one prompt in consecutive rows."""
    ids, mask = encode_prompts(tokenizer, task, examples, next(model.parameters()).device)
    repeated = (tensor.repeat_interleave(settings.group_size, dim=0) for tensor in (ids, mask))
    return sample(
        model,
        tokenizer,
        *repeated,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=seed_of("rollout", settings.seed, step),
    )


def score(rollouts: Rollouts, task: Task, examples: list[Example], settings: GRPOSettings) -> Tensor:
    """Rewards of a rollout, ``[prompts, group_size]`` float32. Raises ``ValueError`` where one is no finite number."""
    golds = [example.gold for example in examples for _ in range(settings.group_size)]
    rewards = torch.tensor([task.score(text, gold) for text, gold in zip(rollouts.texts, golds, strict=True)])
    if settings.truncated != "score":
        rewards[rollouts.truncated.cpu()] = 0.0
    return rewards.view(len(examples), settings.group_size)


def update_policy(
    model: PreTrainedModel,
    adapter: TinyLoraAdapter | None,
    reference: PreTrainedModel | None,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    advantages: Tensor,
    settings: GRPOSettings,
) -> tuple[float, float]:
    """``epochs_per_step`` updates from one batch.

    Rows without advantage pull nowhere unless there is a KL penalty, and are not computed.

    Args:
        model: the policy.
        adapter: its adapter; without it the model is the reference policy. ``None`` where all weights train.
        reference: the reference policy where all weights train and ``settings.kl > 0``.
        optimizer: of the numbers that train.
        rollouts: what the policy sampled.
        advantages: ``[batch]``, one for each row of ``rollouts``.
        settings: see :class:`~tinylora_lite.grpo_settings.GRPOSettings`.

    Returns:
        The gradient's norm before clipping, of the last update, and the share of tokens whose ratio was clipped.

    Raises:
        FloatingPointError: a gradient is not finite; that update is not made.
    """
    advantages = advantages.to(rollouts.logprobs.device)
    counted = torch.ones_like(rollouts.truncated) if settings.truncated != "mask" else ~rollouts.truncated
    tokens = max(1, int(rollouts.lengths[counted].sum()))
    constant = len(rollouts) * settings.max_new_tokens
    denominator = {"token": tokens, "sequence": len(rollouts), "constant": constant}[settings.normalise]
    live = counted & (advantages != 0) if settings.kl == 0 else counted
    order = torch.argsort(rollouts.lengths, stable=True)  # rows of like length together: less padding to compute
    index = [chunk for chunk in order[live[order]].split(settings.micro_batch) if len(chunk)]
    batches = [(rollouts.rows(chunk), advantages[chunk]) for chunk in index]

    def logprobs_of(policy: PreTrainedModel) -> list[Tensor]:
        with torch.no_grad():
            return [completion_logprobs(policy, rows, settings.temperature) for rows, _ in batches]

    olds: list[Tensor | None] = [None] * len(batches)
    references: list[Tensor | None] = [None] * len(batches)
    if settings.epochs_per_step > 1:
        olds = [*logprobs_of(model)]
    if settings.kl > 0:
        with nullcontext() if adapter is None else adapter.disabled():
            references = [*logprobs_of(model if reference is None else reference)]

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradient_norm, clipped = 0.0, 0
    for _ in range(settings.epochs_per_step):
        optimizer.zero_grad()
        for (rows, advantage), old, ref in zip(batches, olds, references, strict=True):
            logprobs = completion_logprobs(model, rows, settings.temperature)
            old = logprobs.detach() if old is None else old
            loss = grpo_loss(
                logprobs,
                old,
                advantage,
                rows.completion_mask,
                clip_low=settings.clip_low,
                clip_high=settings.clip_high,
                normalise=settings.normalise,
                denominator=denominator,
                sampler_logprobs=None if settings.tis_cap is None else rows.logprobs,
                tis_cap=settings.tis_cap or 1.0,
                ref_logprobs=ref,
                kl=settings.kl,
            )
            loss.backward()
            ratio, A = torch.exp(logprobs.detach() - old), advantage[:, None]
            outside = ((ratio < 1 - settings.clip_low) & (A < 0)) | ((ratio > 1 + settings.clip_high) & (A > 0))
            clipped += int((outside & rows.completion_mask.bool()).sum())
        gradient_norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm).item()
        if not math.isfinite(gradient_norm):
            raise FloatingPointError("the gradient is not finite; lower the learning rate, or load a wider dtype")
        if gradient_norm > 0:
            optimizer.step()
    return gradient_norm, clipped / tokens / settings.epochs_per_step


def check_task(tokenizer: PreTrainedTokenizerBase, task: Task, settings: GRPOSettings) -> None:
    """Raises ``ValueError`` where training would fail for want of problems, tokens or a reward that is a number."""
    check_tokenizer(tokenizer)
    if not task.train:
        raise ValueError(f"task {task.name} has no training problems")
    if settings.evaluate_every and not task.validation:
        raise ValueError(f"task {task.name} has no validation problems; set evaluate_every=0")
    task.score("", task.train[0].gold)


def _validate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, settings: GRPOSettings
) -> dict[str, float | int]:
    return evaluate(
        model,
        tokenizer,
        task,
        split="validation",
        problems=settings.evaluate_problems,
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        seed=settings.seed,
        truncated="score" if settings.truncated == "score" else "zero",
    ).summary()
