"""The baseline: LoRA as PEFT implements it, trained by the steps of this library's own GRPO and SFT."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from tinylora_lite.adapter.tying import MODULE_TYPES
from tinylora_lite.adapter.weights import base_fingerprint
from tinylora_lite.sampling.logprobs import completion_logprobs
from tinylora_lite.sampling.rollouts import Rollouts
from tinylora_lite.tasks.task import Task
from tinylora_lite.training.batches import draw_prompts, encode_solutions, rollout, score
from tinylora_lite.training.losses import grpo_advantages
from tinylora_lite.training.policy_update import update_policy
from tinylora_lite.training.settings import GRPOSettings, SFTSettings
from tinylora_lite.utils.record import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ALPHA = 32
"""PEFT multiplies the update by ``ALPHA / rank``; the value of "LoRA Without Regret" (Schulman et al., 2025)."""


def train_lora(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    settings: GRPOSettings | SFTSettings,
    *,
    rank: int = 1,
) -> Run:
    """Puts PEFT's LoRA on the seven linear layers of every block, in place, and trains it; all else is frozen.

    A step is that of :func:`~tinylora_lite.train_grpo` or :func:`~tinylora_lite.train_sft`, from the same
    prompts and with the same random numbers.

    Args:
        model: any causal language model of transformers; it carries PEFT's layers afterwards.
        tokenizer: the model's.
        task: prompts come from its training split.
        settings: of GRPO, without its KL penalty, or of SFT; without evaluations and checkpoints. Their seed draws
            LoRA's A, too.
        rank: of LoRA.

    Raises:
        ModuleNotFoundError: PEFT is not installed.
        ValueError: ``settings`` ask for a KL penalty or for evaluations.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('this LoRA is PEFT\'s; pip install "tinylora_lite[peft]" brings it') from error
    if settings.evaluate_every or (isinstance(settings, GRPOSettings) and settings.kl):
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
    method = "grpo" if isinstance(settings, GRPOSettings) else "sft"
    run = Run(method, asdict(settings), f"PEFT LoRA, rank={rank}, alpha={ALPHA}", count, task.name, base)
    started = time.perf_counter()
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(step)
        examples = draw_prompts(task.train, settings, step)
        if isinstance(settings, GRPOSettings):
            rollouts = rollout(model, tokenizer, task, examples, settings, step)
            rewards = score(rollouts, task, examples, settings)
            advantages = grpo_advantages(rewards, settings.scale).flatten()
            update = update_policy(model, None, None, optimizer, rollouts, advantages, settings)
            row = {"reward": rewards.mean().item(), "gradient_norm": update.gradient_norm}
        else:
            row = _imitate(model, optimizer, encode_solutions(tokenizer, task, examples), settings)
        run.seconds = time.perf_counter() - started
        run.steps.append({"step": step + 1} | row | {"seconds": run.seconds})
    return run


def _imitate(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, answers: Rollouts, settings: SFTSettings
) -> dict[str, float]:
    """One update of SFT: its loss before, in nats for a token, and the gradient's norm."""
    optimizer.zero_grad()
    tokens, total = int(answers.lengths.sum()), 0.0
    for chunk in torch.argsort(answers.lengths, stable=True).split(settings.micro_batch):
        rows = answers.rows(chunk)
        loss = -(completion_logprobs(model, rows) * rows.completion_mask).sum() / tokens
        loss.backward()
        total += loss.item()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm).item()
    optimizer.step()
    return {"loss": total, "gradient_norm": norm}
