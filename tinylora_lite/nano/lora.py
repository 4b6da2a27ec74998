"""The baseline: LoRA as PEFT implements it, trained by the steps of this library's own GRPO."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from tinylora_lite.fingerprint import base_fingerprint
from tinylora_lite.grpo import draw_prompts, rollout, score
from tinylora_lite.grpo_settings import GRPOSettings
from tinylora_lite.losses import grpo_advantages
from tinylora_lite.policy_update import update_policy
from tinylora_lite.runs import Run
from tinylora_lite.tasks import Task
from tinylora_lite.tying import MODULE_TYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ALPHA = 32
"""PEFT multiplies the update by ``ALPHA / rank``; the value of "LoRA Without Regret" (Schulman et al., 2025)."""


def train_lora(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, settings: GRPOSettings, *, rank: int = 1
) -> Run:
    """Puts PEFT's LoRA on the seven linear layers of every block, in place, and trains it; all else is frozen.

    A step is that of :func:`~tinylora_lite.grpo.train_grpo`, from the same prompts and with the same random numbers.

    Args:
        model: any causal language model of transformers; it carries PEFT's layers afterwards.
        tokenizer: the model's.
        task: prompts come from its training split.
        settings: of GRPO, without its KL penalty, evaluations and checkpoints. Its seed draws LoRA's A, too.
        rank: of LoRA.

    Raises:
        ModuleNotFoundError: PEFT is not installed.
        ValueError: ``settings`` ask for a KL penalty or for evaluations.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('this LoRA is PEFT\'s; pip install "tinylora_lite[peft]" brings it') from error
    if settings.kl or settings.evaluate_every:
        raise ValueError("the LoRA baseline has no KL penalty and no evaluations; set kl=0 and evaluate_every=0")
    base = base_fingerprint(model)
    config = LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=list(MODULE_TYPES))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        inject_adapter_in_model(config, model)
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    count = sum(p.numel() for p in parameters)
    run = Run("grpo", asdict(settings), f"PEFT LoRA, rank={rank}, alpha={ALPHA}", count, task.name, base)
    started = time.perf_counter()
    for step in range(settings.steps):
        examples = draw_prompts(task.train, settings, step)
        rollouts = rollout(model, tokenizer, task, examples, settings, step)
        rewards = score(rollouts, task, examples, settings)
        advantages = grpo_advantages(rewards, settings.scale).flatten()
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(step)
        update = update_policy(model, None, None, optimizer, rollouts, advantages, settings)
        run.seconds = time.perf_counter() - started
        row = {"step": step + 1, "reward": rewards.mean().item(), "gradient_norm": update.gradient_norm}
        run.steps.append(row | {"seconds": run.seconds})
    return run
