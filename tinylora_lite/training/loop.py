"""The training loop: the same for GRPO and imitation, and for an adapter, a population, PEFT's LoRA or all weights.

An objective makes the batch of a step; the loop makes the updates, the record and the checkpoints. A single adapter is
a population of one.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tinylora_lite.adapter.adapter import TinyLoraAdapter
from tinylora_lite.adapter.attached import adapter_of
from tinylora_lite.adapter.config import TinyLoraConfig
from tinylora_lite.adapter.weights import base_fingerprint
from tinylora_lite.evaluation.evaluate import evaluate, evaluate_population
from tinylora_lite.sampling.check import TOKENS, check_sampler
from tinylora_lite.sampling.logprobs import completion_logprobs
from tinylora_lite.sampling.policy import check_tokenizer, ready_to_train
from tinylora_lite.sampling.rollouts import Rollouts, Sampler
from tinylora_lite.sampling.sampler import ModelSampler
from tinylora_lite.training.batches import Batch, micro_batches
from tinylora_lite.training.losses import grpo_loss
from tinylora_lite.training.settings import GRPOSettings, S, SFTSettings, as_list
from tinylora_lite.utils import distributed
from tinylora_lite.utils.record import Run, base_gguf, resume, save_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tinylora_lite.adapter.batched import Population
    from tinylora_lite.evaluation.score import Score
    from tinylora_lite.tasks.task import Task

DEFAULTS = {f.name: f.default for of in (SFTSettings, GRPOSettings, TinyLoraConfig) for f in fields(of)}
"""What settings were in checkpoints of versions that did not have them yet."""
RECORDED_PARAMETERS = 64
"""Up to how many parameters a run's record holds v at every step."""


class Objective(ABC, Generic[S]):
    """What trains, and on what: GRPO and SFT say how a step's batch is made and how an evaluation is recorded.

    Attributes:
        settings: one for each adapter; ``shared`` is the first, for what all of them have in common.
        parameters: what trains, of each adapter; the parameters of one are clipped and stepped together.
        identities: what tells each adapter from others, as JSON holds it.
        loss: how the loss of a token is computed.
    """

    method: str
    loss: GRPOSettings

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        adapter: TinyLoraAdapter | Population | None,
        task: Task,
        settings: Sequence[S],
        sampler: Sampler | None = None,
    ) -> None:
        if adapter_of(model) is not adapter:
            foreign = "the adapter is not attached to this model; pass what attach() or attach_population() returned"
            carried = "the model carries an adapter; pass it, or call its detach() to train all weights"
            raise ValueError(carried if adapter is None else foreign)
        check_tokenizer(tokenizer)
        self.model, self.tokenizer, self.adapter, self.task, self.sampler = model, tokenizer, adapter, task, sampler
        self.population = not isinstance(adapter, TinyLoraAdapter | None)
        self.settings = as_list(settings, type(self).__name__)
        self.shared = self.settings[0]
        self.parameters = [list(model.parameters())] if adapter is None else [[v] for v in adapter.parameters()]
        self.identities: list[dict[str, Any]] = [{"kind": "all weights"}]
        if adapter is not None:
            self.identities = [adapter.identity(k) for k in range(len(self.parameters))]
        if not isinstance(adapter, TinyLoraAdapter | None):
            adapter.check_settings([asdict(own) for own in self.settings])
            if distributed.world_size() > 1 or sampler is not None or getattr(self.shared, "kl", 0.0) > 0:
                raise ValueError("a population trains in one process, without another sampler, without a KL penalty")

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """The rows of a step, counted from 0."""

    def check_sampler(self) -> None:
        """Raises ``RuntimeError`` where another engine samples, and something else than the adapter answers.

        Only warns where the adapter changes too little to tell, and where the model's weights are quantized, which an
        engine's are not.
        """
        if not isinstance(self.adapter, TinyLoraAdapter) or isinstance(self.sampler, ModelSampler | None):
            return
        options: dict[str, Any] = {"temperature": self.shared.temperature}
        options["max_new_tokens"] = min(TOKENS, self.shared.max_new_tokens)
        found = check_sampler(self.model, self.tokenizer, self.adapter, self.sampler, self.task, **options)
        quantized = found.verdict == "neither" and getattr(self.model, "is_quantized", False)
        if found.verdict == "unclear" or quantized:
            warnings.warn(f"the check of the sampler: {found}", stacklevel=2)
        elif found.verdict != "adapter":
            raise RuntimeError(str(found))

    @abstractmethod
    def validate(self) -> list[dict[str, float]]:
        """An evaluation of each adapter on the validation split, as its record keeps it."""

    def scores(self, **options: Any) -> list[Score]:
        """Each adapter's score on the validation split; of a population, with the seed that each has alone."""
        options |= {"split": "validation", "problems": self.shared.evaluate_problems}
        options |= {"temperature": self.shared.temperature, "max_new_tokens": self.shared.max_new_tokens}
        model, tokenizer, task, adapter = self.model, self.tokenizer, self.task, self.adapter
        if isinstance(adapter, TinyLoraAdapter | None):
            return [evaluate(model, tokenizer, task, sampler=self.sampler, seed=self.shared.seed, **options)]
        return evaluate_population(model, tokenizer, task, adapter, seed=[own.seed for own in self.settings], **options)


def fit(
    objective: Objective[S],
    *,
    folder: str | Path | None = None,
    on_step: Callable[[list[Run]], None] | None = None,
    progress: bool = True,
) -> list[Run]:
    """Trains until the last step of the settings, and returns a run for each adapter.

    Arguments and errors are those of :func:`~tinylora_lite.train_grpo`.
    """
    model, shared, base = objective.model, objective.shared, base_fingerprint(objective.model)
    optimizer = torch.optim.AdamW(
        {"params": own, "weight_decay": settings.weight_decay}
        for own, settings in zip(objective.parameters, objective.settings, strict=True)
    )
    runs = [
        Run(objective.method, asdict(settings), known_as, sum(p.numel() for p in own), objective.task.name, base)
        for own, settings, known_as in zip(objective.parameters, objective.settings, objective.identities, strict=True)
    ]
    for run in runs:
        run.base_gguf = base_gguf(model)
    # Of the weights before training, and so before a checkpoint is read.
    reference = copy.deepcopy(model) if objective.adapter is None and objective.loss.kl > 0 else None
    if folder is not None:
        if objective.population:
            raise ValueError("the run of a population is not saved; leave folder out")
        resume(folder, runs[0], objective.parameters[0], optimizer, DEFAULTS)
    done = len(runs[0].steps)
    if len(set(distributed.all_gather_object(done))) > 1:
        raise ValueError(f"not every process finds the checkpoint in {folder}; give a folder that all of them share")
    if done < shared.steps:
        objective.check_sampler()
    started, hidden = time.perf_counter() - runs[0].seconds, distributed.hide_progress(progress)
    with (
        ready_to_train(model, [p for own in objective.parameters for p in own]),
        tqdm(total=shared.steps, initial=done, desc=objective.method.upper(), disable=hidden) as bar,
    ):
        for step in range(done, shared.steps):
            batch = objective.batch(step)
            for group, settings in zip(optimizer.param_groups, objective.settings, strict=True):
                group["lr"] = settings.learning_rate_at(step)
            rows = update(objective, optimizer, batch, reference)
            for run, row, metrics, group in zip(runs, rows, batch.metrics, optimizer.param_groups, strict=True):
                own, row["learning_rate"] = group["params"], group["lr"]
                row["norm"] = math.sqrt(sum(p.detach().float().pow(2).sum().item() for p in own))
                if run.parameters <= RECORDED_PARAMETERS:
                    row |= {f"v{i}": value for i, value in enumerate(own[0].flatten().tolist())}
                run.seconds = (time.perf_counter() - started) / len(runs)
                run.steps.append({"step": step + 1} | metrics | row | {"seconds": run.seconds})
            if shared.evaluate_every and (step + 1) % shared.evaluate_every == 0:
                for run, scores in zip(runs, objective.validate(), strict=True):
                    run.evaluations.append({"step": step + 1} | scores)
                    run.seconds = (time.perf_counter() - started) / len(runs)
            if folder is not None and ((step + 1) % shared.save_every == 0 or step + 1 == shared.steps):
                if distributed.rank() == 0:
                    save_checkpoint(folder, runs[0], objective.parameters[0], optimizer)
                distributed.barrier()
            shown = "reward" if "reward" in runs[0].steps[-1] else "loss"
            bar.set_postfix_str(f"{shown} " + " ".join(f"{run.steps[-1][shown]:.2f}" for run in runs), refresh=False)
            bar.update()
            if on_step is not None:
                on_step(runs)
    return runs


def update(
    objective: Objective[S], optimizer: torch.optim.Optimizer, batch: Batch, reference: PreTrainedModel | None = None
) -> list[dict[str, float]]:
    """``epochs_per_step · mini_batches`` updates of every adapter from one batch, and what happened, for their records.

    Rows without advantage have no gradient unless there is a KL penalty, and are not computed. Where several processes
    train, each has rows of its own, as many as the others', and all of them make the same update.

    Returns:
        For each adapter ``loss`` (the mean of ``-log p``, weighted by advantages), ``gradient_norm`` (before clipping),
        ``clipped`` (the share of tokens whose ratio was clipped), and over the tokens that were computed, in the first
        epoch: ``logprob_diff_mean`` and ``logprob_diff_max`` (of sampler and trainer, in nats, absolute),
        ``tis_clip_frac`` (the share whose importance weight was cut off at ``tis_cap``).

    Raises:
        FloatingPointError: a gradient is not finite; that update is not made.
    """
    model, s, device, K = objective.model, objective.loss, batch.rollouts.logprobs.device, len(objective.parameters)
    # In float16 the gradient of one token among 100,000 is below the smallest number: on its way back the loss is
    # multiplied by the smallest divisor (more may exceed the largest number), and v's gradient divided in float32.
    half = model.dtype == torch.float16
    scale = min(distributed.all_gather_object(float(batch.denominators.min()))) if half else 1.0
    live = batch.counted & (batch.advantages != 0) if s.kl == 0 else batch.counted
    updates: list[list[tuple[Rollouts, Tensor, Tensor]]] = []  # of each mini-batch, its micro-batches
    for mini_batch in range(s.mini_batches):
        chunks = micro_batches(
            batch.rollouts.lengths, live & (batch.mini_batch == mini_batch), objective.shared.micro_batch
        )
        parts = [(batch.rollouts.rows(i), batch.advantages[i], batch.denominators[i]) for i in chunks]
        if distributed.is_sharded(model):  # every process makes as many passes as the one with the most rows
            nothing = batch.rollouts.rows(torch.zeros(1, dtype=torch.long, device=device))
            nothing = replace(nothing, completion_mask=torch.zeros_like(nothing.completion_mask))
            missing = max(distributed.all_gather_object(len(parts))) - len(parts)
            parts += [(nothing, batch.advantages[:1], batch.denominators[:1])] * missing
        updates.append(parts)

    def logprobs_of(policy: PreTrainedModel | None) -> list[list[Tensor | None]]:
        if policy is None:
            return [[None] * len(parts) for parts in updates]
        with torch.no_grad():
            return [[completion_logprobs(policy, rows, s.temperature) for rows, *_ in parts] for parts in updates]

    several = s.epochs_per_step * s.mini_batches > 1
    olds = logprobs_of(model if several else None)
    with objective.adapter.disabled() if isinstance(objective.adapter, TinyLoraAdapter) else nullcontext():
        references = logprobs_of((reference or model) if s.kl > 0 else None)

    norms = [0.0] * K
    seen = torch.zeros(K, 5)  # of each adapter: tokens clipped; in the first epoch: loss, tokens, differences, capped
    largest = torch.zeros(K)
    for epoch, mini_batch in itertools.product(range(s.epochs_per_step), range(s.mini_batches)):
        optimizer.zero_grad()
        known = zip(updates[mini_batch], olds[mini_batch], references[mini_batch], strict=True)
        for (rows, advantages, denominators), old, ref in known:
            logprobs = completion_logprobs(model, rows, s.temperature)
            old = logprobs.detach() if old is None else old
            loss = grpo_loss(
                logprobs,
                old,
                advantages,
                rows.completion_mask,
                clip_low=s.clip_low,
                clip_high=s.clip_high,
                denominator=denominators,
                sampler_logprobs=None if s.tis_cap is None else rows.logprobs,
                tis_cap=s.tis_cap or 1.0,
                ref_logprobs=ref,
                kl=s.kl,
            )
            (loss * scale).backward()
            with torch.no_grad():
                mask, A = rows.completion_mask.bool(), advantages[:, None]
                ratio, apart = torch.exp(logprobs - old), torch.where(mask, old - rows.logprobs, 0.0)
                outside = ((ratio < 1 - s.clip_low) & (A < 0)) | ((ratio > 1 + s.clip_high) & (A > 0))
                whose = torch.zeros(len(mask), dtype=torch.long) if rows.adapters is None else rows.adapters.cpu()
                nll = -torch.where(mask, logprobs, 0.0).sum(dim=1) * advantages / denominators
                capped = (apart > math.log(s.tis_cap or math.inf)).sum(dim=1)
                first = torch.stack([nll, mask.sum(dim=1), apart.abs().sum(dim=1), capped], dim=1) * (epoch == 0)
                counts = torch.cat([(outside & mask).sum(dim=1)[:, None], first], dim=1)
                seen.index_add_(0, whose, counts.float().cpu())
                if epoch == 0:
                    largest.scatter_reduce_(0, whose, apart.abs().amax(dim=1).cpu(), "amax")
        for k, parameters in enumerate(objective.parameters):
            distributed.all_reduce_gradients(parameters, scale)
            norms[k] = torch.nn.utils.clip_grad_norm_(parameters, objective.shared.max_grad_norm).item()
            if not math.isfinite(norms[k]):
                of = f" of adapter {k}" if K > 1 else ""
                cure = "lower the learning rate, or load a wider dtype"
                raise FloatingPointError(f"the loss{of} or its gradient is not finite; {cure}")
            for parameter in parameters if norms[k] == 0 else []:
                parameter.grad = None  # where every group agrees, Adam's momentum waits for the next step
        optimizer.step()
    seen = distributed.all_reduce(seen.to(device)).cpu()
    clipped, loss_sums, compared, differences, capped_tokens = seen.T.tolist()
    return [
        {
            "loss": loss_sums[k] / s.mini_batches,
            "gradient_norm": norms[k],
            "clipped": clipped[k] / max(1, int(batch.tokens[k])) / s.epochs_per_step,
            "logprob_diff_mean": differences[k] / max(1, compared[k]),
            "logprob_diff_max": max(distributed.all_gather_object(float(largest[k]))),
            "tis_clip_frac": capped_tokens[k] / max(1, compared[k]),
        }
        for k in range(K)
    ]
