"""Baselines beside thirteen numbers: the bias of one logit or of all, a steering vector, a search for v.

A steering vector and biases of logits are the bias of a linear layer that has none, so sampler and trainer need nothing
new. Sinii et al. (arXiv 2509.06608) train such vectors by rewards, and find that the last layer's acts on the first
token.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tinylora_lite.adapter.weights import base_fingerprint
from tinylora_lite.evaluation.evaluate import evaluate
from tinylora_lite.sampling.policy import ready_to_train
from tinylora_lite.training.batches import draw_prompts, rollout, score
from tinylora_lite.training.calibrate import policy_losses
from tinylora_lite.training.grpo import GRPO
from tinylora_lite.training.loop import fit
from tinylora_lite.training.losses import grpo_advantages
from tinylora_lite.utils.record import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tinylora_lite.adapter.adapter import TinyLoraAdapter
    from tinylora_lite.tasks.task import Task
    from tinylora_lite.training.settings import GRPOSettings


def added_vector(model: PreTrainedModel, numbers: str) -> nn.Parameter:
    """A new bias of zeros in the model.

    With ``"steering vector"`` it is added to what block L // 2 of L (counted from 0) gives the residual stream,
    ``[width]``; with ``"logits"`` to the logits, ``[vocabulary]``.
    """
    of: Any = model
    blocks = of.model.layers
    layer: nn.Linear = blocks[len(blocks) // 2].mlp.down_proj if numbers == "steering vector" else of.lm_head
    layer.bias = nn.Parameter(torch.zeros(layer.out_features))
    return layer.bias


def train_added(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    settings: GRPOSettings,
    numbers: str,
    folder: Path | None = None,
) -> Run:
    """Trains :func:`added_vector` by GRPO, in place; all else is frozen. Errors are those of ``train_grpo``."""
    base = base_fingerprint(model)
    vector = added_vector(model, numbers)
    objective = GRPO(model, tokenizer, None, task, [settings])
    objective.parameters, objective.identities = [[vector]], [{"kind": numbers}]
    (run,) = fit(objective, folder=folder, progress=False)
    run.base = base
    return run


def favour_one_logit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, settings: GRPOSettings
) -> tuple[Run, Tensor]:
    """Adds ``settings.learning_rate`` to the logit of one token at every position, in place, or takes it away.

    It is the token whose bias has the largest policy gradient over the answers of ``settings.steps`` steps at bias 0.

    Returns:
        The run, and the token's id and its bias, ``[2]`` float32.
    """
    bias = added_vector(model, "logits")
    run = Run("one logit", asdict(settings), {"kind": "one logit"}, 1, task.name)
    total = torch.zeros_like(bias)
    with ready_to_train(model, [bias]):
        for step in range(settings.steps):
            examples = draw_prompts(task.train, settings, step)
            rollouts = rollout(model, tokenizer, task, examples, settings, step)
            rewards = score(rollouts, task, examples, settings)
            run.steps.append({"reward": rewards.mean().item(), "length": rollouts.lengths.float().mean().item()})
            advantages = grpo_advantages(rewards, settings.scale).flatten()
            for _, loss in policy_losses(model, rollouts, advantages, settings.micro_batch):
                total += torch.autograd.grad(loss, bias)[0]
    token = int(total.abs().argmax())
    with torch.no_grad():
        bias[token] = -settings.learning_rate * total[token].sign()
    return run, torch.tensor([token, bias[token].item()])


def search_v(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: TinyLoraAdapter,
    task: Task,
    settings: GRPOSettings,
) -> tuple[Run, Tensor]:
    """The best of ``settings.steps`` v by the mean reward of as many answers as GRPO samples in as many steps.

    The first is 0, the others are of random direction and of norm ``settings.learning_rate``. Each answers the same
    training problems once, with the same random numbers; the first of equals is taken.

    Returns:
        The run, with the norm of the best so far at every step, and v as the adapter has it.
    """
    answers = settings.prompts_per_step * settings.group_size
    asked = replace(task, train=draw_prompts(task.train, replace(settings, prompts_per_step=answers), 0))
    run = Run("search", asdict(settings), adapter.identity(0), adapter.num_parameters, task.name)
    generator = torch.Generator().manual_seed(settings.seed)
    best, highest = torch.zeros_like(adapter.vectors), -1.0
    for step in range(settings.steps):
        v = torch.randn(best.shape, generator=generator) if step else best.clone()
        v *= settings.learning_rate / v.norm().clamp(min=1e-9)
        with torch.no_grad():
            adapter.vectors.copy_(v)
        options: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "batch_size": answers}
        found = evaluate(model, tokenizer, asked, split="train", seed=settings.seed, **options).details()
        if found["accuracy"] > highest:
            best, highest = v, found["accuracy"]
        row = {"reward": found["accuracy"], "length": found["tokens"], "norm": float(best.norm())}
        run.steps.append({"step": step + 1} | row)
    return run, best.detach()
