"""Calibration: from the policy gradients of a few problems to a basis of directions.

This is the project's own method. The paper draws P at random; here P spans the directions in which a task's reward
moves. Every entry of every module's R trains for a moment (LoRA-XS), each calibration problem gives one policy
gradient, and the leading right singular vectors of the stacked gradients become the directions. Half of the gradients
are taken at v = 0, half after a step along their mean: the large, easy move dominates the first pass, and the second
pass sees what is left to gain after it.

Related: LoRA-GA (arXiv 2407.05000) and LoRA-SB (2411.19557) take LoRA's initial factors from a gradient, GaLore
(2403.03507) projects the optimizer's gradients, EVA (2410.07170) uses activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinylora_lite.adapter.adapter import TinyLoraAdapter, attach
from tinylora_lite.adapter.basis import Basis
from tinylora_lite.adapter.config import Sigma, TinyLoraConfig
from tinylora_lite.adapter.weights import base_fingerprint
from tinylora_lite.sampling.logprobs import completion_logprobs
from tinylora_lite.sampling.policy import check_tokenizer, ready_to_train
from tinylora_lite.sampling.rollouts import Rollouts, Sampler
from tinylora_lite.sampling.sampler import ModelSampler
from tinylora_lite.tasks.task import Example, Task
from tinylora_lite.training.batches import draw_prompts, rollout, score
from tinylora_lite.training.losses import grpo_advantages, grpo_loss
from tinylora_lite.training.settings import GRPOSettings, check_integers
from tinylora_lite.utils.record import base_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS_AT_ONCE = 32
"""Problems sampled together."""
MICRO_BATCH = 8
"""Completions in one backward pass, where nothing else is asked for."""
STEP_SIZES = tuple(0.05 * 2**doubled for doubled in range(12))
"""What the line search along the mean gradient tries, as the norm of all R together."""


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rank: int = 8,
    directions: int = 13,
    seed: int = 0,
    *,
    sigma: Sigma = "left",
    problems: int = 384,
    passes: int = 2,
    sampler: Sampler | None = None,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Basis:
    """Directions for v, from the policy gradients of a calibration set.

    Args:
        model: the base, without an adapter; it is left as it was.
        tokenizer: its tokenizer.
        task: calibration problems come from its training split.
        rank: r of the adapters that will use the basis; at most every adapted weight's smaller side.
        directions: how many to keep.
        seed: of the choice of problems and of the sampling.
        sigma: the place of Σ in the adapters that will use the basis.
        problems: how many to take gradients on; a few dozen more are for the line search between the passes.
        passes: 1 takes every gradient at v = 0; 2 takes half of them after a step along the mean of the first half.
        sampler: what answers the problems; ``None`` takes the model itself.
        progress: called with problems done and problems in all.
        settings: no others than ``group_size``, ``max_new_tokens``, ``truncated`` and ``micro_batch`` (here 8) of
            :class:`~tinylora_lite.GRPOSettings`.

    Returns:
        A :class:`~tinylora_lite.Basis` of orthonormal directions, the one of largest variance first.

    Raises:
        ValueError: ``passes`` is neither 1 nor 2; there are fewer problems, problems with answers of different reward,
            or entries of R than directions to find; or whatever ``attach`` and ``train_grpo`` refuse.
    """
    if other := sorted(settings.keys() - {"group_size", "max_new_tokens", "truncated", "micro_batch"}):
        raise TypeError(f"calibrate() got an unexpected keyword argument: {', '.join(other)}")
    if passes not in (1, 2):
        raise ValueError(f"passes must be 1 or 2, not {passes!r}")
    check_integers({"problems": problems, "directions": directions}, {"problems": 1, "directions": 1})
    if directions > problems:
        raise ValueError(f"{problems} problems have no {directions} directions; calibrate on more, or ask for fewer")
    own = GRPOSettings(**{"micro_batch": MICRO_BATCH} | settings, prompts_per_step=PROMPTS_AT_ONCE, seed=seed)
    check_tokenizer(tokenizer)
    task.check(evaluated=False)
    adapter = attach(model, TinyLoraConfig(rank=rank, u=rank**2, sigma=sigma, projection="identity"))
    try:
        if (entries := adapter.num_parameters) < directions:
            raise ValueError(f"R has {entries} entries, too few for {directions} directions; raise rank={rank}")
        with ready_to_train(model, [adapter.vectors]):
            answers = sampler or ModelSampler(model, tokenizer)
            samples = _Samples(model, tokenizer, adapter, task, own, answers, progress, problems)
            found, step_size = [samples.gradients(problems // passes)], 0.0
            if passes == 2 and len(found[0]):
                step_size = samples.step_along(-found[0].mean(dim=0))
                found.append(samples.gradients(problems - problems // passes))
    finally:
        adapter.detach()
    # Each pass counts the same, whatever the length of its gradients.
    gradients = torch.cat([part / part.norm(dim=1).mean() for part in found if len(part)] or found)
    if len(gradients) < directions:
        raise ValueError(
            f"only {len(gradients)} of {problems} problems had answers of different reward, too few for {directions} "
            "directions; calibrate on more problems or larger groups, or ask for fewer"
        )
    provenance = {
        "method": "singular vectors of per-problem policy gradients",
        "base": base_fingerprint(model),
        "task": task.name,
        "problems": problems,
        "informative": len(gradients),
        "group_size": own.group_size,
        "passes": passes,
        "step_size": step_size,
        "seed": seed,
    }
    if gguf := base_gguf(model):
        provenance["base_gguf"] = gguf
    return leading_directions(gradients, directions, adapter, provenance)


def policy_losses(
    model: PreTrainedModel, rollouts: Rollouts, advantages: Tensor, micro_batch: int
) -> Iterator[tuple[Rollouts, Tensor]]:
    """The policy-gradient loss of each micro batch with its rows, where the policy is the one that sampled.

    Its gradient is that of ``-advantage · log p``, summed over tokens; ``advantages [batch]`` of 1 imitate.
    """
    for chunk in torch.arange(len(rollouts)).split(micro_batch):
        rows = rollouts.rows(chunk)
        logprobs, own = completion_logprobs(model, rows), advantages.to(rows.logprobs.device)[chunk]
        yield rows, grpo_loss(logprobs, logprobs.detach(), own, rows.completion_mask, denominator=1.0)


def policy_gradient(
    model: PreTrainedModel,
    adapter: TinyLoraAdapter,
    rollouts: Rollouts,
    advantages: Tensor,
    micro_batch: int = MICRO_BATCH,
) -> Tensor:
    """The gradient of :func:`policy_losses` in all trained parameters, ``[parameters]`` float32 on the CPU."""
    total = torch.zeros_like(adapter.vectors)
    for _, loss in policy_losses(model, rollouts, advantages, micro_batch):
        total += torch.autograd.grad(loss, adapter.vectors)[0]
    return total.flatten().cpu()


def leading_directions(
    gradients: Tensor, directions: int, adapter: TinyLoraAdapter, provenance: dict[str, Any]
) -> Basis:
    """The leading right singular vectors of gradients as a basis, with the spectrum in its provenance.

    ``gradients [gradients, modules · r²]`` float32, at least as many as directions, are in the parameters of
    ``adapter``, which trains every entry of R of every module.
    """
    _, spectrum, axes = torch.linalg.svd(gradients, full_matrices=False)
    rank, sigma = adapter.config.rank, adapter.config.sigma
    provenance = provenance | {"spectrum": [round(value, 4) for value in spectrum[: 2 * directions].tolist()]}
    return Basis(axes[:directions].unflatten(1, (-1, rank, rank)).contiguous(), adapter.names, sigma, provenance)


@dataclass
class _Samples:
    """Calibration problems, drawn in turn, and what can be measured on them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    adapter: TinyLoraAdapter
    task: Task
    settings: GRPOSettings
    sampler: Sampler
    progress: Callable[[int, int], None] | None
    total: int
    drawn: int = 0
    done: int = 0

    def gradients(self, problems: int) -> Tensor:
        """``[informative problems, modules · r²]`` float32: the loss's gradient for each problem of mixed rewards."""
        found = [torch.empty(0, self.adapter.vectors.numel())]
        size = self.settings.group_size
        for start in range(0, problems, PROMPTS_AT_ONCE):
            examples = self.draw()[: problems - start]
            rollouts, rewards = self.answer(examples)
            for index, advantages in enumerate(grpo_advantages(rewards, "none")):
                if advantages.any():
                    group = rollouts.rows(torch.arange(index * size, (index + 1) * size))
                    gradient = policy_gradient(self.model, self.adapter, group, advantages, self.settings.micro_batch)
                    found.append(gradient[None])
            self.done += len(examples)
            if self.progress:
                self.progress(self.done, self.total)
        return torch.cat(found)

    def step_along(self, direction: Tensor) -> float:
        """Moves R along a direction for as long as the reward rises, and returns how far, as a norm."""
        examples, vectors = self.draw(), self.adapter.vectors.data
        unit = (direction / direction.norm()).view_as(vectors)
        best, best_size = self.answer(examples)[1].mean().item(), 0.0
        for size in STEP_SIZES:
            vectors.copy_(unit * size)
            reward = self.answer(examples)[1].mean().item()
            if reward > best:
                best, best_size = reward, size
            elif best_size and reward < best - 0.05:
                break
        vectors.copy_(unit * best_size)
        return best_size

    def draw(self) -> list[Example]:
        """The next problems."""
        self.drawn += 1
        return draw_prompts(self.task.train, self.settings, self.drawn - 1)

    def answer(self, examples: list[Example]) -> tuple[Rollouts, Tensor]:
        """Completions of the model as it is now, and their rewards, ``[problems, group_size]``."""
        self.sampler.sync(self.adapter)
        rollouts = rollout(self.model, self.tokenizer, self.task, examples, self.settings, self.drawn, self.sampler)
        return rollouts, score(rollouts, self.task, examples, self.settings)
