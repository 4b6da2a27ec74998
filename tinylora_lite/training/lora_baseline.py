"""The baseline: LoRA as PEFT implements it, trained by this library's own loop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tinylora_lite.adapter.tying import MODULE_TYPES
from tinylora_lite.adapter.weights import base_fingerprint
from tinylora_lite.training.grpo import GRPO
from tinylora_lite.training.loop import Objective, fit
from tinylora_lite.training.settings import GRPOSettings, SFTSettings
from tinylora_lite.training.sft import SFT

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tinylora_lite.tasks.task import Task
    from tinylora_lite.utils.record import Run

ALPHA = 32
"""PEFT multiplies the update by ``ALPHA / rank``; the value of "LoRA Without Regret" (Schulman et al., 2025)."""


def train_lora(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    settings: GRPOSettings | SFTSettings,
    rank: int = 1,
    *,
    folder: str | Path | None = None,
) -> Run:
    """Puts PEFT's LoRA on the seven linear layers of every block, in place, and trains it; all else is frozen.

    A step is that of :func:`~tinylora_lite.train_grpo` or :func:`~tinylora_lite.train_sft`, from the same prompts and
    with the same random numbers; arguments and errors are theirs. The settings' seed draws LoRA's A, too.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('this LoRA is PEFT\'s; pip install "tinylora_lite[peft]" brings it') from error
    base = base_fingerprint(model)
    config = LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=list(MODULE_TYPES))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        inject_adapter_in_model(config, model)
    kind: type[Objective[Any]] = GRPO if isinstance(settings, GRPOSettings) else SFT
    objective = kind(model, tokenizer, None, task, [settings])
    objective.parameters = [[p for p in model.parameters() if p.requires_grad]]
    objective.identities = [{"kind": f"PEFT LoRA, rank={rank}, alpha={ALPHA}"}]
    (run,) = fit(objective, folder=folder, progress=False)
    run.base = base
    return run
