"""GRPO: sample a group of answers to each prompt, and make the better ones likelier.

One step: ``rollout`` samples, ``grpo_advantages`` compares, ``update_policy`` moves the numbers.

What was left out, and why: no value network (that is the idea of GRPO), no reward model (answers are checked),
no top-k or top-p in training (the sampler's probabilities would not be the trainer's).
"""

from __future__ import annotations

import copy
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tinylora_lite.adapter import TinyLoraAdapter
from tinylora_lite.evaluate import evaluate
from tinylora_lite.losses import Normalise, Scale, grpo_advantages, grpo_loss
from tinylora_lite.runs import Run
from tinylora_lite.sampler import (
    Rollouts,
    check_tokenizer,
    completion_logprobs,
    encode_prompts,
    sample,
)
from tinylora_lite.tasks import Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class GRPOSettings:
    """How to train. :meth:`variant` gives the settings of GRPO, Dr. GRPO and DAPO.

    Attributes:
        steps: updates of the policy from fresh samples.
        prompts_per_step: prompts drawn for one step, without repetition until all were used.
        group_size: G, completions sampled for one prompt.
        max_new_tokens: the length limit of a completion.
        temperature: of sampling and of the log-probabilities.
        learning_rate: of Adam, constant after ``warmup`` steps.
        warmup: steps over which the learning rate rises linearly.
        max_grad_norm: gradients longer than this are shortened to it.
        epochs_per_step: updates from the same samples; above 1 the clipping of the ratio matters.
        scale, normalise, clip_low, clip_high, tis_cap, kl: see :mod:`tinylora_lite.losses`; ``tis_cap=None`` leaves
            the correction for the sampler out.
        truncated: what a completion cut off at the limit is worth: ``"zero"`` reward, ``"mask"`` (it takes no part in
            the loss), or ``"score"`` (its text is scored like any other).
        micro_batch: completions in one forward and backward pass; changes memory and speed, not the result.
        evaluate_every: steps between evaluations on the validation split; 0 never evaluates.
        evaluate_problems: problems of an evaluation.
        save_every: steps between checkpoints, where a folder is given.
        seed: moves the order of prompts and the sampling.
    """

    steps: int = 40
    prompts_per_step: int = 32
    group_size: int = 8
    max_new_tokens: int = 256
    temperature: float = 1.0
    learning_rate: float = 1e-2
    warmup: int = 0
    max_grad_norm: float = 1.0
    epochs_per_step: int = 1
    scale: Scale = "group"
    normalise: Normalise = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    tis_cap: float | None = 2.0
    kl: float = 0.0
    truncated: Literal["zero", "mask", "score"] = "zero"
    micro_batch: int = 64
    evaluate_every: int = 0
    evaluate_problems: int = 128
    save_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "prompts_per_step",
            "max_new_tokens",
            "epochs_per_step",
            "micro_batch",
            "save_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.group_size < 2:
            raise ValueError(
                f"group_size must be at least 2 (a group of one has no better half), not {self.group_size}"
            )
        if not (self.temperature > 0 and self.learning_rate > 0):
            raise ValueError("temperature and learning_rate must be above 0")
        if self.truncated not in ("zero", "mask", "score"):
            raise ValueError(f"truncated must be zero, mask or score, not {self.truncated!r}")

    @classmethod
    def variant(cls, name: Literal["grpo", "dr_grpo", "dapo"], **settings: Any) -> GRPOSettings:
        """The loss of a paper: GRPO (2402.03300), Dr. GRPO (2503.20783) or DAPO (2503.14476, without its resampling)."""
        losses: dict[str, dict[str, Any]] = {
            "grpo": {"scale": "group", "normalise": "sequence"},
            "dr_grpo": {"scale": "none", "normalise": "constant"},
            "dapo": {
                "scale": "group",
                "normalise": "token",
                "clip_high": 0.28,
                "truncated": "mask",
            },
        }
        if name not in losses:
            raise ValueError(f"variant must be one of {', '.join(losses)}, not {name!r}")
        return cls(**losses[name] | settings)


def train_grpo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: TinyLoraAdapter | None,
    task: Task,
    settings: GRPOSettings = GRPOSettings(),
    *,
    folder: str | Path | None = None,
    on_step: Callable[[Run], None] | None = None,
) -> Run:
    """Trains an adapter's numbers by GRPO, or all weights of the model where ``adapter`` is ``None``.

    Args:
        model, tokenizer: any causal language model of transformers.
        adapter: attached to the model; ``None`` trains every weight, in place.
        task: prompts come from its training split, evaluations from its validation split.
        settings: see :class:`GRPOSettings`.
        folder: where the run is saved; called again with the same settings, an interrupted run goes on from its
            last checkpoint to the same numbers as one that was never interrupted.
        on_step: called with the run so far after every step.

    Returns:
        The :class:`~tinylora_lite.runs.Run`.

    Raises:
        ValueError: the task is empty, the reward returns something other than a finite number, the tokenizer
            lacks a token, or ``folder`` holds a run of other settings.
    """
    _check(tokenizer, task, settings)
    if adapter is None:
        model.requires_grad_(True)
    parameters = list(model.parameters()) if adapter is None else [adapter.vectors]
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    run = Run(
        method="grpo",
        settings=asdict(settings),
        adapter="all weights" if adapter is None else adapter.extra_repr(),
        parameters=sum(p.numel() for p in parameters),
        task=task.name,
    )
    checkpoint = None if folder is None else Path(folder) / "checkpoint.pt"
    if checkpoint is not None:
        run = _resume(checkpoint, run, parameters, optimizer)
    reference = copy.deepcopy(model) if adapter is None and settings.kl > 0 else None

    started = time.perf_counter() - run.seconds
    for step in range(len(run.steps), settings.steps):
        examples = draw_prompts(task.train, settings, step)
        rollouts = rollout(model, tokenizer, task, examples, settings, step)
        rewards = score(rollouts, task, examples, settings)
        advantages = grpo_advantages(rewards, settings.scale).flatten()
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (step + 1) / (settings.warmup + 1))
        gradient_norm, clipped = update_policy(
            model, adapter, reference, optimizer, rollouts, advantages, settings
        )
        tokens = rollouts.completion_mask.sum()
        run.seconds = time.perf_counter() - started
        run.steps.append(
            {
                "step": step + 1,
                "reward": rewards.mean().item(),
                "length": rollouts.lengths.float().mean().item(),
                "truncated": rollouts.truncated.float().mean().item(),
                "entropy": (rollouts.entropies.sum() / tokens).item(),
                "gradient_norm": gradient_norm,
                "clipped": clipped,
                "silent_groups": (rewards.std(dim=1) == 0).float().mean().item(),
                "norm": math.sqrt(sum(p.detach().float().pow(2).sum().item() for p in parameters)),
                "seconds": run.seconds,
            }
        )
        if settings.evaluate_every and (step + 1) % settings.evaluate_every == 0:
            found = evaluate(
                model,
                tokenizer,
                task,
                split="validation",
                problems=settings.evaluate_problems,
                temperature=settings.temperature,
                max_new_tokens=settings.max_new_tokens,
                seed=settings.seed,
            )
            run.evaluations.append({"step": step + 1} | found.summary())
            run.seconds = time.perf_counter() - started
        if checkpoint is not None and (
            (step + 1) % settings.save_every == 0 or step + 1 == settings.steps
        ):
            _save(checkpoint, run, parameters, optimizer)
        if on_step is not None:
            on_step(run)
    return run


def draw_prompts(examples: Sequence[Example], settings: GRPOSettings, step: int) -> list[Example]:
    """The prompts of a step: the training problems in an order of the seed's, reshuffled when all were used."""

    @cache
    def order(epoch: int) -> list[int]:
        return random.Random(f"{settings.seed}-{epoch}").sample(range(len(examples)), len(examples))

    first = step * settings.prompts_per_step
    places = (
        divmod(place, len(examples)) for place in range(first, first + settings.prompts_per_step)
    )
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
        seed=settings.seed * 1_000_003 + step,
    )


def score(
    rollouts: Rollouts, task: Task, examples: list[Example], settings: GRPOSettings
) -> Tensor:
    """The rewards of a rollout, ``[prompts, group_size]``."""
    golds = [example.gold for example in examples for _ in range(settings.group_size)]
    rewards = torch.tensor(
        [float(task.reward(t, gold)) for t, gold in zip(rollouts.texts, golds, strict=True)]
    )
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
    """``epochs_per_step`` updates from one batch; the gradient's norm before clipping and the share of clipped tokens.

    Rows without advantage pull nowhere unless there is a KL penalty, and are not computed.
    """
    advantages = advantages.to(rollouts.logprobs.device)
    mask = rollouts.completion_mask
    if settings.truncated == "mask":
        mask = mask * ~rollouts.truncated[:, None]
    count = {
        "token": mask.sum(),
        "sequence": len(mask),
        "constant": len(mask) * settings.max_new_tokens,
    }
    denominator = max(1.0, float(count[settings.normalise]))

    live = torch.ones_like(advantages, dtype=torch.bool) if settings.kl > 0 else advantages != 0
    order = torch.argsort(rollouts.lengths)
    micro_batches = order[live[order]].split(settings.micro_batch)
    batches = [(rollouts.rows(index), advantages[index]) for index in micro_batches if len(index)]
    olds: list[Tensor | None] = [None] * len(batches)
    references: list[Tensor | None] = [None] * len(batches)
    with torch.no_grad():
        if settings.epochs_per_step > 1:
            olds = [completion_logprobs(model, rows, settings.temperature) for rows, _ in batches]
        if settings.kl > 0:
            with nullcontext() if adapter is None else adapter.disabled():
                base = model if reference is None else reference
                references = [
                    completion_logprobs(base, rows, settings.temperature) for rows, _ in batches
                ]

    gradient_norm, clipped = 0.0, 0.0
    for _ in range(settings.epochs_per_step):
        optimizer.zero_grad()
        for (rows, advantage), old, ref in zip(batches, olds, references, strict=True):
            logprobs = completion_logprobs(model, rows, settings.temperature)
            old = logprobs.detach() if old is None else old
            row_mask = rows.completion_mask
            if settings.truncated == "mask":
                row_mask = row_mask * ~rows.truncated[:, None]
            loss = grpo_loss(
                logprobs,
                old,
                advantage,
                row_mask,
                clip_low=settings.clip_low,
                clip_high=settings.clip_high,
                normalise=settings.normalise,
                max_tokens=settings.max_new_tokens,
                denominator=denominator,
                sampler_logprobs=None if settings.tis_cap is None else rows.logprobs,
                tis_cap=settings.tis_cap or 1.0,
                ref_logprobs=ref,
                kl=settings.kl,
            )
            loss.backward()
            with torch.no_grad():
                ratio = torch.exp(logprobs - old)
                outside = (ratio < 1 - settings.clip_low) | (ratio > 1 + settings.clip_high)
                clipped += (outside * row_mask).sum().item()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradient_norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm).item()
        if batches:
            optimizer.step()
    return gradient_norm, clipped / max(1.0, float(mask.sum())) / settings.epochs_per_step


def _check(tokenizer: PreTrainedTokenizerBase, task: Task, settings: GRPOSettings) -> None:
    check_tokenizer(tokenizer)
    if not task.train:
        raise ValueError(f"task {task.name} has no training problems")
    if settings.evaluate_every and not task.validation:
        raise ValueError(f"task {task.name} has no validation problems; set evaluate_every=0")
    worth = task.reward("", task.train[0].gold)
    if not isinstance(worth, (int, float)) or not math.isfinite(worth):
        raise ValueError(
            f"the reward of task {task.name} returned {worth!r}; it must return a finite number"
        )


def _save(path: Path, run: Run, parameters: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "run": asdict(run),
        "optimizer": optimizer.state_dict(),
        "parameters": [p.detach() for p in parameters],
    }
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)
    run.save(path.with_name("run.json"))


def _resume(
    path: Path, run: Run, parameters: list[Tensor], optimizer: torch.optim.Optimizer
) -> Run:
    if not path.exists():
        return run
    state = torch.load(path, weights_only=True, map_location=parameters[0].device)
    saved = Run(**state["run"])
    for what in ("settings", "adapter", "task"):
        if getattr(saved, what) != getattr(run, what):
            raise ValueError(
                f"{path.parent} holds a run of other {what}; give another folder, or delete that one"
            )
    with torch.no_grad():
        for parameter, value in zip(parameters, state["parameters"], strict=True):
            parameter.copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    return saved
