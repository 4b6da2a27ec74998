"""What TRL is given: settings as a ``GRPOConfig``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from trl import GRPOConfig

from tinylora_lite.training.loop import RECORDED_PARAMETERS
from tinylora_lite.training.settings import GRPOSettings

FIELDS = {
    "num_iterations": "epochs_per_step",
    "num_generations": "group_size",
    "max_completion_length": "max_new_tokens",
    "temperature": "temperature",
    "learning_rate": "learning_rate",
    "scale_rewards": "scale",
    "epsilon": "clip_low",
    "epsilon_high": "clip_high",
    "seed": "seed",
}
"""Fields of TRL's configuration, and the settings that they are."""
LOSSES = {"token": "dapo", "sequence": "grpo", "constant": "dr_grpo"}
"""TRL's names for the three ways to normalise the loss."""
COLUMNS = {
    "length": "completions/mean_length",
    "truncated": "completions/clipped_ratio",
    "clipped": "clip_ratio/region_mean",
    "logprob_diff_mean": "sampling/sampling_logp_difference/mean",
    "logprob_diff_max": "sampling/sampling_logp_difference/max",
}
COLUMNS |= {name: name for name in ("reward", "entropy", "frac_reward_zero_std", "gradient_norm", "norm", "seconds")}
COLUMNS |= {name: name for name in ("strict", "lenient", "formatted", *(f"v{i}" for i in range(RECORDED_PARAMETERS)))}
"""Columns of a run's record, and their names in TRL's log."""


def trl_config(settings: GRPOSettings, folder: str | Path | None, **config: Any) -> GRPOConfig:
    """TRL's configuration that computes what :func:`~tinylora_lite.train_grpo` computes with these settings.

    One of our steps is ``epochs_per_step`` of TRL's. A batch of completions is split into micro-batches of equal size,
    so ``micro_batch`` is lowered to the next divisor of a process's share. ``config`` is further fields; raises
    ``ValueError`` where one follows from ``settings``.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # accelerate starts them when it reads the configuration
    rows = max(1, settings.prompts_per_step // processes) * settings.group_size
    micro_batch = max(size for size in range(1, min(rows, settings.micro_batch) + 1) if rows % size == 0)
    decided: dict[str, Any] = {theirs: getattr(settings, ours) for theirs, ours in FIELDS.items()} | {
        "max_steps": settings.steps * settings.epochs_per_step,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": rows // micro_batch,
        "steps_per_generation": rows // micro_batch,
        "loss_type": LOSSES[settings.normalise],
        "mask_truncated_completions": settings.truncated == "mask",
        "beta": settings.kl,
    }
    # The sampler is corrected for; without a cap too, since that logs the difference.
    decided |= {"vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": "token_truncate"}
    decided |= {"vllm_importance_sampling_clip_min": None, "vllm_importance_sampling_clip_max": settings.tis_cap or 1.0}
    # The probabilities of sampling are those of the loss.
    decided |= {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "disable_dropout": True, "use_vllm": False}
    # The loss has no other terms. By default TRL weighs the KL penalty by the ratio, whose gradient does not vanish
    # where the ratio is 1.
    decided |= {"importance_sampling_level": "token", "delta": None, "use_bias_correction_kl": False}
    decided |= {"top_entropy_quantile": 1.0, "entropy_coef": 0.0}
    # Our optimizer clips gradients.
    decided |= {"weight_decay": 0.0, "max_grad_norm": 0.0, "bf16": False, "fp16": False}
    decided |= {"shuffle_dataset": False, "dataloader_pin_memory": False}
    if given := sorted(config.keys() & decided.keys()):
        raise ValueError(f"{', '.join(given)} cannot be given: the settings of training decide it")
    chosen: dict[str, Any] = {
        "output_dir": "." if folder is None else str(folder),
        "save_strategy": "no" if folder is None else "steps",
        "save_steps": settings.save_every * settings.epochs_per_step,
        "save_total_limit": 2,
        "logging_steps": settings.epochs_per_step,
        "report_to": "none",
    }
    # A model whose gradient checkpointing is on keeps it. transformers renames the field.
    name = "activation_checkpointing" if hasattr(GRPOConfig, "activation_checkpointing") else "gradient_checkpointing"
    chosen |= {name: False, f"{name}_kwargs": {"use_reentrant": False}}
    return GRPOConfig(**chosen | config | decided)
