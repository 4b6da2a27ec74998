"""GRPO: sample a group of answers to each prompt, and make the better ones likelier.

One step: ``rollout`` samples, ``score`` rewards, ``grpo_advantages`` compares, and the loop updates. There is no value
network (that is the idea of GRPO), no reward model (answers are checked), and no top-k, top-p or dropout (the sampler's
probabilities would not be the trainer's).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from tinylora_lite.sampling.check import TOKENS, check_sampler
from tinylora_lite.sampling.rollouts import Rollouts, Sampler
from tinylora_lite.sampling.sampler import ModelSampler
from tinylora_lite.training.batches import Batch, draw_prompts, rollout, score
from tinylora_lite.training.loop import Objective, fit
from tinylora_lite.training.losses import grpo_advantages
from tinylora_lite.training.settings import GRPOSettings
from tinylora_lite.utils import distributed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tinylora_lite.adapter.adapter import TinyLoraAdapter
    from tinylora_lite.tasks.task import Task
    from tinylora_lite.utils.record import Run


class GRPO(Objective[GRPOSettings]):
    """A group of completions for each prompt, scored against one another."""

    method = "grpo"

    def __init__(self, *args: Any, on_rollouts: Callable[[Rollouts, Tensor], None] | None = None) -> None:
        super().__init__(*args)
        self.loss, self.on_rollouts = self.shared, on_rollouts
        self.task.check(evaluated=self.shared.evaluate_every > 0)

    def check_sampler(self) -> None:
        """Raises ``RuntimeError`` where another engine samples, and something else than the adapter answers."""
        if self.sampler is None or isinstance(self.sampler, ModelSampler):
            return
        options: dict[str, Any] = {"temperature": self.shared.temperature}
        options["max_new_tokens"] = min(TOKENS, self.shared.max_new_tokens)
        adapter = cast("TinyLoraAdapter", self.adapter)
        found = check_sampler(self.model, self.tokenizer, adapter, self.sampler, self.task, **options)
        if found.verdict != "adapter":
            raise RuntimeError(str(found))

    def batch(self, step: int) -> Batch:
        """``prompts_per_step · group_size`` completions for each adapter; in each process, its share of them."""
        s, K = self.shared, len(self.settings)
        mine = distributed.shard(s.prompts_per_step, "prompts_per_step", s.mini_batches)
        examples = [e for own in self.settings for e in draw_prompts(self.task.train, own, step)[mine]]
        started = time.perf_counter()
        if self.sampler is not None:
            self.sampler.sync(cast("TinyLoraAdapter | None", self.adapter))
        settings = self.settings if self.population else s
        rollouts = rollout(self.model, self.tokenizer, self.task, examples, settings, step, self.sampler)
        seconds = time.perf_counter() - started
        own_rewards = score(rollouts, self.task, examples, s)
        if self.on_rollouts is not None:
            self.on_rollouts(rollouts, own_rewards)
        everyone = torch.cat(distributed.all_gather_object(own_rewards)).to(rollouts.logprobs.device)
        rewards = everyone.view(K, -1, s.group_size)
        advantages = torch.stack([grpo_advantages(own, s.scale) for own in rewards])[:, mine].flatten()
        batch = self.weighed(rollouts, advantages)
        for row, own in zip(batch.metrics, rewards, strict=True):
            row["reward"] = own.mean().item()
            row["frac_reward_zero_std"] = (own == own[:, :1]).all(dim=1).float().mean().item()
            row["sampling_seconds"] = seconds
        return batch

    def weighed(self, rollouts: Rollouts, advantages: Tensor) -> Batch:
        """Completions with what their tokens count in the loss; ``advantages [batch]``."""
        s, K, M = self.shared, len(self.settings), self.shared.mini_batches
        lengths, cut, rows = rollouts.lengths, rollouts.truncated, len(rollouts) // K
        counted = ~cut if s.truncated == "mask" else torch.ones_like(cut)
        # The prompts of a mini-batch are M apart, so that they are the same however many processes share the prompts.
        mini_batch = (torch.arange(rows, device=lengths.device) // s.group_size % M).repeat(K)
        sums = torch.stack([lengths * counted, lengths, cut, rollouts.entropies.sum(dim=1)]).view(4, K, rows).sum(dim=2)
        sums, completions = distributed.all_reduce(sums), rows * distributed.world_size()
        tokens = sums[0].clamp(min=1)
        shares = [(lengths * counted * (mini_batch == m)).view(K, rows).sum(dim=1) for m in range(M)]
        of_update = distributed.all_reduce(torch.stack(shares, dim=1)).clamp(min=1)  # tokens, [adapters, mini-batches]
        denominators = {
            "token": of_update.repeat_interleave(rows, dim=0).gather(1, mini_batch[:, None])[:, 0],
            "sequence": completions / M * lengths.clamp(min=1).float(),
            "constant": torch.full_like(advantages, completions / M * s.max_new_tokens),
        }[s.normalise]
        metrics = [
            {"length": length / completions, "truncated": truncated / completions, "entropy": entropy / length}
            for _, length, truncated, entropy in sums.T.tolist()
        ]
        return Batch(rollouts, advantages, denominators, counted, mini_batch, tokens, metrics)

    def validate(self) -> list[dict[str, float]]:
        """Accuracy, low, high, n, samples."""
        truncated = "score" if self.shared.truncated == "score" else "zero"
        return [found.summary() for found in self.scores(truncated=truncated)]


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
) -> Run:
    """Trains an adapter by GRPO, or all weights of the model where ``adapter`` is ``None``.

    Where ``torch.distributed`` is initialised, every process calls this with the same arguments: each answers its share
    of a step's prompts, and all make the same update, that of one process but for rounding.

    Args:
        model: any causal language model of transformers. Where its gradient checkpointing is on, it is used.
        tokenizer: the model's.
        adapter: attached to the model; ``None`` trains every weight, in place. For a population see
            :func:`~tinylora_lite.attach_population`.
        task: prompts come from its training split, evaluations from its validation split.
        settings: see :class:`~tinylora_lite.GRPOSettings`; ``None`` takes its defaults.
        sampler: what answers the prompts, in training and in evaluations; ``None`` takes the model itself. Another
            engine is checked before the first step (:func:`~tinylora_lite.check_sampler`). For its log-probabilities,
            which differ a little, ``settings.tis_cap`` corrects.
        folder: where the run is saved; called again with the same base and settings, an interrupted run goes on from
            its last checkpoint to the same parameters as one that was never interrupted.
        on_step: called with the run so far after every step.
        on_rollouts: called in every step with what this process sampled and its rewards, ``[prompts, group_size]``.
        progress: shows a bar where standard error is a terminal.

    Returns:
        The :class:`~tinylora_lite.Run`.

    Raises:
        ValueError: the task is empty, the reward returns something other than a finite number, the tokenizer lacks a
            token, the adapter is not the model's, all weights train and another engine samples, or ``folder`` holds a
            damaged run or one of other settings.
        FloatingPointError: the model puts out NaN, or the gradient is not finite; the parameters stay those of the last
            update.
        RuntimeError: another engine samples, and something else than the adapter answers.
    """
    if adapter is None and not isinstance(sampler, ModelSampler | None):
        raise ValueError("another engine follows an adapter, and not weights that all train; leave sampler out")
    objective = GRPO(model, tokenizer, adapter, task, [settings or GRPOSettings()], sampler, on_rollouts=on_rollouts)
    objective.check_sampler()
    return fit(objective, folder=folder, on_step=on_step and (lambda runs: on_step(runs[0])), progress=progress)[0]
