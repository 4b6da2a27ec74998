"""Supervised finetuning: make worked answers likelier, token by token.

The paper's other way to train (section 6.1), and the one that needs more numbers. The model reads a prompt exactly as
sampling would show it; the loss is the mean of ``-log p`` over the tokens of the worked answers and their end tokens,
all tokens of a step alike, as GRPO's ``normalise="token"`` has it. No dropout.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from tinylora_lite.adapter.adapter import TinyLoraAdapter
from tinylora_lite.adapter.batched import Population
from tinylora_lite.adapter.weights import base_fingerprint
from tinylora_lite.evaluation.evaluate import evaluate
from tinylora_lite.sampling.logprobs import completion_logprobs
from tinylora_lite.sampling.rollouts import Rollouts, Sampler, check_tokenizer
from tinylora_lite.tasks.task import Example, Task
from tinylora_lite.training.batches import check_solutions, draw_prompts, encode_solutions
from tinylora_lite.training.checkpoint import resume, save_checkpoint
from tinylora_lite.training.ready import add_gradients, check_adapter, loss_scale, ready_to_train
from tinylora_lite.training.settings import SFTSettings
from tinylora_lite.utils import distributed
from tinylora_lite.utils.progress import progress_bar
from tinylora_lite.utils.record import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@overload
def train_sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Population,
    task: Task,
    settings: Sequence[SFTSettings],
    *,
    on_step: Callable[[list[Run]], None] | None = None,
    progress: bool = True,
) -> list[Run]: ...


@overload
def train_sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: TinyLoraAdapter | None,
    task: Task,
    settings: SFTSettings | None = None,
    *,
    sampler: Sampler | None = None,
    folder: str | Path | None = None,
    on_step: Callable[[Run], None] | None = None,
    progress: bool = True,
) -> Run: ...


def train_sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: TinyLoraAdapter | Population | None,
    task: Task,
    settings: SFTSettings | Sequence[SFTSettings] | None = None,
    *,
    sampler: Sampler | None = None,
    folder: str | Path | None = None,
    on_step: Callable[..., None] | None = None,
    progress: bool = True,
) -> Run | list[Run]:
    """Trains an adapter's numbers on worked answers, or all weights of the model where ``adapter`` is ``None``.

    Where ``torch.distributed`` is initialised, every process calls this with the same arguments and reads its share of
    a step's answers; the numbers are those of one process, but for rounding.

    Args:
        model: any causal language model of transformers. Where its gradient checkpointing is on, it is used.
        tokenizer: the model's.
        adapter: attached to the model; ``None`` trains every weight, in place; a
            :class:`~tinylora_lite.Population` trains all its members at once, with settings for each, and
            without ``sampler`` and ``folder`` (:mod:`tinylora_lite.training.population_training`).
        task: answers come from the ``solution`` of its training examples, evaluations from its validation split.
        settings: see :class:`~tinylora_lite.SFTSettings`; ``None`` takes its defaults.
        sampler: who answers in evaluations; ``None`` takes the model itself.
        folder: where the run is saved; called again with the same base and settings, an interrupted run goes on from
            its last checkpoint to the same numbers as one that was never interrupted.
        on_step: called with the run so far after every step.
        progress: shows a bar where standard error is a terminal.

    Returns:
        The :class:`~tinylora_lite.Run`: of each step ``loss`` (in nats for a token, before the update),
        ``length`` (mean tokens of an answer), ``learning_rate``, ``gradient_norm`` and ``norm``; of each evaluation
        ``loss`` and, with ``evaluate_accuracy``, what :meth:`~tinylora_lite.Score.details` holds. For a
        population, a run for each member.

    Raises:
        ValueError: the task is empty, an example has no solution or one longer than ``max_new_tokens``, the tokenizer
            lacks a token, the adapter is not the model's, or ``folder`` holds a damaged run or one of other settings.
        FloatingPointError: the loss or the gradient is not finite; the numbers stay those of the last update.
    """
    if isinstance(adapter, Population):
        from tinylora_lite.training.population_training import train_population_sft  # which builds on this module

        if sampler is not None or folder is not None:
            raise ValueError("a population trains without sampler and folder; leave them out")
        members = list(settings) if isinstance(settings, Sequence) else [settings or SFTSettings()]
        return train_population_sft(model, tokenizer, adapter, task, members, on_step=on_step, progress=progress)
    if isinstance(settings, Sequence):
        raise ValueError("an adapter alone takes one SFTSettings; a list of them is for a population")
    check_tokenizer(tokenizer)
    check_adapter(model, adapter)
    settings = (settings or SFTSettings()).in_steps(len(task.train))
    validation = task.validation[: settings.evaluate_problems] if settings.evaluate_every else []
    check_solutions(tokenizer, task, task.train, "training", settings.max_new_tokens)
    if settings.evaluate_every:
        check_solutions(tokenizer, task, validation, "validation", settings.max_new_tokens)
    parameters: list[Tensor] = list(model.parameters()) if adapter is None else [adapter.vectors]
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    run = Run(
        method="sft",
        settings=asdict(settings),
        adapter="all weights" if adapter is None else adapter.extra_repr(),
        parameters=sum(p.numel() for p in parameters),
        task=task.name,
        base=base_fingerprint(model),
    )
    mine = distributed.shard(settings.prompts_per_step, "prompts_per_step")
    if folder is not None:
        resume(folder, run, parameters, optimizer)
    if len(set(distributed.all_gather_object(len(run.steps)))) > 1:
        raise ValueError(f"not every process finds the checkpoint in {folder}; give a folder that all of them share")

    device = next(model.parameters()).device
    started = time.perf_counter() - run.seconds
    with (
        ready_to_train(model, adapter),
        progress_bar("SFT", settings.steps, len(run.steps), progress and not distributed.rank()) as advance,
    ):
        for step in range(len(run.steps), settings.steps):
            rows = encode_solutions(tokenizer, task, draw_prompts(task.train, settings, step)[mine], device)
            tokens = int(distributed.all_reduce(rows.lengths.sum()))
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate_at(step)
            optimizer.zero_grad()
            scale = loss_scale(model, tokens)
            own = sum(_backward(part, tokens, scale) for part in _parts(model, rows, settings.micro_batch))
            loss = float(distributed.all_reduce(torch.tensor(own, dtype=torch.float32, device=device)))
            add_gradients(parameters, scale)
            gradient_norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm).item()
            if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
                raise FloatingPointError(
                    "the loss or its gradient is not finite; lower the learning rate, or load a wider dtype"
                )
            optimizer.step()
            run.seconds = time.perf_counter() - started
            run.steps.append(
                {
                    "step": step + 1,
                    "loss": loss,
                    "length": tokens / settings.prompts_per_step,
                    "learning_rate": settings.learning_rate_at(step),
                    "gradient_norm": gradient_norm,
                    "norm": math.sqrt(sum(p.detach().float().pow(2).sum().item() for p in parameters)),
                    "seconds": run.seconds,
                }
            )
            if settings.evaluate_every and (step + 1) % settings.evaluate_every == 0:
                row = {
                    "step": step + 1,
                    "loss": solution_loss(model, tokenizer, task, validation, settings.micro_batch),
                }
                run.evaluations.append(row | _accuracy(model, tokenizer, task, settings, sampler))
                run.seconds = time.perf_counter() - started
            if folder is not None and ((step + 1) % settings.save_every == 0 or step + 1 == settings.steps):
                if distributed.rank() == 0:
                    save_checkpoint(folder, run, parameters, optimizer)
                distributed.barrier()
            advance(f"loss {loss:.3f}")
            if on_step is not None:
                on_step(run)
    return run


@torch.no_grad()
def solution_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    micro_batch: int = 64,
) -> float:
    """The mean of ``-log p`` over the tokens of the examples' worked answers, in nats. Raises as training does."""
    rows = encode_solutions(tokenizer, task, examples, next(model.parameters()).device)
    return sum(part.item() for part in _parts(model, rows, micro_batch)) / int(rows.lengths.sum())


def _parts(model: PreTrainedModel, rows: Rollouts, micro_batch: int) -> Iterator[Tensor]:
    """The sum of ``-log p`` over each micro-batch's tokens; rows of like length together: less padding to compute."""
    for index in torch.argsort(rows.lengths, stable=True).split(micro_batch):
        part = rows.rows(index)
        yield -(completion_logprobs(model, part) * part.completion_mask).sum()


def _backward(part: Tensor, tokens: int, scale: float) -> float:
    loss = part / tokens
    (loss * scale).backward()
    return loss.item()


def _accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    settings: SFTSettings,
    sampler: Sampler | None,
) -> dict[str, float | int]:
    if not settings.evaluate_accuracy:
        return {}
    return evaluate(
        model,
        tokenizer,
        task,
        split="validation",
        problems=settings.evaluate_problems,
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        seed=settings.seed,
        sampler=sampler,
    ).details()
