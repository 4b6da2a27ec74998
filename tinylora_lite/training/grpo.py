"""GRPO: sample a group of answers to each prompt, and make the better ones likelier.

One step: ``rollout`` samples, ``score`` rewards, ``grpo_advantages`` compares, ``update_policy`` moves the numbers.

What was left out, and why: no value network (that is the idea of GRPO), no reward model (answers are checked),
no top-k or top-p in training (the sampler's probabilities would not be the trainer's), no dropout (nor would they).
A step whose gradient is zero, because every group agrees, moves nothing: Adam's momentum waits for the next one.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from tinylora_lite.adapter.adapter import TinyLoraAdapter
from tinylora_lite.adapter.batched import Population
from tinylora_lite.adapter.weights import base_fingerprint
from tinylora_lite.evaluation.evaluate import evaluate
from tinylora_lite.sampling.rollouts import Rollouts, Sampler
from tinylora_lite.sampling.sampler import ModelSampler
from tinylora_lite.tasks.task import Task
from tinylora_lite.training.batches import check_task, draw_prompts, rollout, score
from tinylora_lite.training.checkpoint import resume, save_checkpoint
from tinylora_lite.training.losses import grpo_advantages
from tinylora_lite.training.policy_update import update_policy
from tinylora_lite.training.ready import check_adapter, ready_to_train
from tinylora_lite.training.settings import GRPOSettings
from tinylora_lite.utils import distributed
from tinylora_lite.utils.progress import progress_bar
from tinylora_lite.utils.record import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


RECORDED_NUMBERS = 64
"""Up to how many numbers a run's record holds v at every step."""


@overload
def train_grpo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Population,
    task: Task,
    settings: Sequence[GRPOSettings],
    *,
    on_step: Callable[[list[Run]], None] | None = None,
    progress: bool = True,
) -> list[Run]: ...


@overload
def train_grpo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: TinyLoraAdapter | None,
    task: Task,
    settings: GRPOSettings | None = None,
    *,
    sampler: Sampler | None = None,
    folder: str | Path | None = None,
    on_step: Callable[[Run], None] | None = None,
    on_rollouts: Callable[[Rollouts, Tensor], None] | None = None,
    progress: bool = True,
) -> Run: ...


def train_grpo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: TinyLoraAdapter | Population | None,
    task: Task,
    settings: GRPOSettings | Sequence[GRPOSettings] | None = None,
    *,
    sampler: Sampler | None = None,
    folder: str | Path | None = None,
    on_step: Callable[..., None] | None = None,
    on_rollouts: Callable[[Rollouts, Tensor], None] | None = None,
    progress: bool = True,
) -> Run | list[Run]:
    """Trains an adapter's numbers by GRPO, or all weights of the model where ``adapter`` is ``None``.

    Where ``torch.distributed`` is initialised, every process calls this with the same arguments: each answers its share
    of a step's prompts, and all make the same update. The samples and the numbers are those of one process, but for
    rounding.

    Args:
        model: any causal language model of transformers. Where its gradient checkpointing is on, it is used.
        tokenizer: the model's.
        adapter: attached to the model; ``None`` trains every weight, in place; a
            :class:`~tinylora_lite.Population` trains all its members at once, without ``sampler``,
            ``folder`` and ``on_rollouts`` (:mod:`tinylora_lite.training.population_training`).
        task: prompts come from its training split, evaluations from its validation split.
        settings: see :class:`~tinylora_lite.GRPOSettings`; ``None`` takes its defaults. A population
            takes one for each member.
        sampler: who answers the prompts, in training and in evaluations; ``None`` takes the model itself. Another
            engine's log-probabilities differ a little from the model's: ``gap``, ``largest_gap`` and ``capped`` of a
            step say by how much, and ``settings.tis_cap`` corrects for it.
        folder: where the run is saved; called again with the same base and settings, an interrupted run goes on from
            its last checkpoint to the same numbers as one that was never interrupted.
        on_step: called with the run so far after every step.
        on_rollouts: called in every step with what this process sampled and its rewards, ``[prompts, group_size]``.
        progress: shows a bar where standard error is a terminal.

    Returns:
        The :class:`~tinylora_lite.Run`, or one for each member.

    Raises:
        ValueError: the task is empty, the reward returns something other than a finite number, the tokenizer lacks a
            token, the adapter is not the model's, all weights train and another engine samples, or ``folder`` holds a
            damaged run or one of other settings.
        FloatingPointError: the model puts out NaN, or the gradient is not finite; the numbers stay those of the last
            update.
    """
    if isinstance(adapter, Population):
        from tinylora_lite.training.population_training import train_population_grpo  # which builds on this module

        if sampler is not None or folder is not None or on_rollouts is not None:
            raise ValueError("a population trains without sampler, folder and on_rollouts; leave them out")
        members = list(settings) if isinstance(settings, Sequence) else [settings or GRPOSettings()]
        return train_population_grpo(model, tokenizer, adapter, task, members, on_step=on_step, progress=progress)
    if isinstance(settings, Sequence):
        raise ValueError("an adapter alone takes one GRPOSettings; a list of them is for a population")
    settings = settings or GRPOSettings()
    check_task(tokenizer, task, settings)
    check_adapter(model, adapter)
    if adapter is None and not isinstance(sampler, ModelSampler | None):
        raise ValueError("another engine follows an adapter, and not weights that all train; leave sampler out")
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
    sampler = sampler or ModelSampler(model, tokenizer)
    mine = distributed.shard(settings.prompts_per_step, "prompts_per_step")
    if folder is not None:
        resume(folder, run, parameters, optimizer)
    if len(set(distributed.all_gather_object(len(run.steps)))) > 1:
        raise ValueError(f"not every process finds the checkpoint in {folder}; give a folder that all of them share")

    started = time.perf_counter() - run.seconds
    with (
        ready_to_train(model, adapter),
        progress_bar("GRPO", settings.steps, len(run.steps), progress and not distributed.rank()) as advance,
    ):
        for step in range(len(run.steps), settings.steps):
            examples = draw_prompts(task.train, settings, step)[mine]
            sampler.sync(adapter)
            sampling = time.perf_counter()
            rollouts = rollout(model, tokenizer, task, examples, settings, step, sampler)
            sampling = time.perf_counter() - sampling
            own = score(rollouts, task, examples, settings)
            if on_rollouts is not None:
                on_rollouts(rollouts, own)
            rewards = distributed.all_gather(own.to(rollouts.logprobs.device))
            advantages = grpo_advantages(rewards, settings.scale)[mine].flatten()
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate_at(step)
            update = update_policy(model, adapter, reference, optimizer, rollouts, advantages, settings)
            row = {
                "step": step + 1,
                "reward": rewards.mean().item(),
                **_lengths(rollouts),
                **asdict(update),
                "silent_groups": (rewards == rewards[:, :1]).all(dim=1).float().mean().item(),
                "norm": math.sqrt(sum(p.detach().float().pow(2).sum().item() for p in parameters)),
                "sampling_seconds": sampling,
                **_numbers(adapter),
            }
            run.seconds = time.perf_counter() - started
            run.steps.append(row | {"seconds": run.seconds})
            if settings.evaluate_every and (step + 1) % settings.evaluate_every == 0:
                run.evaluations.append({"step": step + 1} | validate(model, tokenizer, task, settings, sampler))
                run.seconds = time.perf_counter() - started
            if folder is not None and ((step + 1) % settings.save_every == 0 or step + 1 == settings.steps):
                if distributed.rank() == 0:
                    save_checkpoint(folder, run, parameters, optimizer)
                distributed.barrier()
            advance(f"reward {row['reward']:.2f}")
            if on_step is not None:
                on_step(run)
    return run


def _lengths(rollouts: Rollouts) -> dict[str, float]:
    """What the completions of all processes were like: mean tokens, the share cut off, mean entropy in nats."""
    sums = torch.stack([rollouts.lengths.sum(), rollouts.truncated.sum(), rollouts.entropies.sum()]).float()
    tokens, truncated, entropy = distributed.all_reduce(sums).tolist()
    completions = len(rollouts) * distributed.world_size()
    return {"length": tokens / completions, "truncated": truncated / completions, "entropy": entropy / tokens}


def _numbers(adapter: TinyLoraAdapter | None) -> dict[str, float]:
    """The numbers v, where they are few enough for a record: ``v0`` and so on."""
    if adapter is None or adapter.num_parameters > RECORDED_NUMBERS:
        return {}
    return {f"v{i}": value for i, value in enumerate(adapter.vectors.flatten().tolist())}


def validate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    settings: GRPOSettings,
    sampler: Sampler,
) -> dict[str, float | int]:
    """An evaluation on the validation split, as training makes it: accuracy, low, high, n, samples."""
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
        sampler=sampler,
    ).summary()
