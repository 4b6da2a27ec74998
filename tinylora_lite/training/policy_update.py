"""The second half of a step of GRPO: from samples and their advantages to new numbers."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tinylora_lite.adapter.adapter import TinyLoraAdapter
from tinylora_lite.sampling.logprobs import completion_logprobs
from tinylora_lite.sampling.rollouts import Rollouts
from tinylora_lite.training.losses import grpo_loss
from tinylora_lite.training.ready import add_gradients, loss_scale
from tinylora_lite.training.settings import GRPOSettings
from tinylora_lite.utils import distributed
from tinylora_lite.utils.distributed import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Update:
    """What happened in an update; the last four are of its first epoch, when the policy is the one that sampled.

    Attributes:
        gradient_norm: before clipping, of the last epoch.
        clipped: the share of tokens whose ratio was clipped.
        gap: the mean absolute difference between the sampler's and the trainer's log-probability of a token, in nats,
            over the tokens that pull somewhere.
        largest_gap: the largest.
        capped: the share of these tokens whose importance weight was cut off at ``tis_cap``.
    """

    gradient_norm: float = 0.0
    clipped: float = 0.0
    gap: float = 0.0
    largest_gap: float = 0.0
    capped: float = 0.0


def update_policy(
    model: PreTrainedModel,
    adapter: TinyLoraAdapter | None,
    reference: PreTrainedModel | None,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    advantages: Tensor,
    settings: GRPOSettings,
) -> Update:
    """``epochs_per_step`` updates from one batch.

    Rows without advantage pull nowhere unless there is a KL penalty, and are not computed. Where several processes
    train, each calls this with rows of its own, as many as the others', and all of them make the same update.

    Args:
        model: the policy.
        adapter: its adapter; without it the model is the reference policy. ``None`` where all weights train.
        reference: the reference policy where all weights train and ``settings.kl > 0``.
        optimizer: of the numbers that train.
        rollouts: what the policy sampled.
        advantages: ``[batch]``, one for each row of ``rollouts``.
        settings: see :class:`~tinylora_lite.GRPOSettings`.

    Raises:
        FloatingPointError: a gradient is not finite; that update is not made.
    """
    device = rollouts.logprobs.device
    advantages = advantages.to(device)
    counted = torch.ones_like(rollouts.truncated) if settings.truncated != "mask" else ~rollouts.truncated
    tokens = max(1, int(distributed.all_reduce(rollouts.lengths[counted].sum())))
    completions = len(rollouts) * distributed.world_size()
    constant = completions * settings.max_new_tokens
    denominator = {"token": tokens, "sequence": completions, "constant": constant}[settings.normalise]
    scale = loss_scale(model, denominator)
    live = counted & (advantages != 0) if settings.kl == 0 else counted
    order = torch.argsort(rollouts.lengths, stable=True)  # rows of like length together: less padding to compute
    index = [chunk for chunk in order[live[order]].split(settings.micro_batch) if len(chunk)]
    batches = [(rollouts.rows(chunk), advantages[chunk]) for chunk in index]
    if is_sharded(model):  # every process makes as many passes as the one with the most rows
        nothing = rollouts.rows(order[:1])
        nothing = replace(nothing, completion_mask=torch.zeros_like(nothing.completion_mask))
        batches += [(nothing, advantages[:1])] * (int(distributed.max_of_all(len(batches), device)) - len(batches))

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
    gradient_norm = largest_gap = 0.0
    seen = torch.zeros(4, dtype=torch.float64)  # clipped tokens; of the first epoch: tokens, sum of gaps, capped tokens
    for epoch in range(settings.epochs_per_step):
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
            (loss * scale).backward()
            mask = rows.completion_mask.bool()
            ratio, A = torch.exp(logprobs.detach() - old), advantage[:, None]
            outside = ((ratio < 1 - settings.clip_low) & (A < 0)) | ((ratio > 1 + settings.clip_high) & (A > 0))
            seen[0] += (outside & mask).sum().item()
            if epoch == 0:
                gap = torch.where(mask, old - rows.logprobs, 0.0)
                seen[1:] += torch.tensor(
                    [mask.sum(), gap.abs().sum(), (gap > math.log(settings.tis_cap or math.inf)).sum()]
                )
                largest_gap = max(largest_gap, gap.abs().max().item())
        add_gradients(parameters, scale)
        gradient_norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm).item()
        if not math.isfinite(gradient_norm):
            raise FloatingPointError("the gradient is not finite; lower the learning rate, or load a wider dtype")
        if gradient_norm > 0:
            optimizer.step()
    clipped, compared, gaps, capped = distributed.all_reduce(seen.to(device, torch.float32)).tolist()
    return Update(
        gradient_norm=gradient_norm,
        clipped=clipped / tokens / settings.epochs_per_step,
        gap=gaps / max(1, compared),
        largest_gap=distributed.max_of_all(largest_gap, device),
        capped=capped / max(1, compared),
    )
