"""Settings and problems as TRL wants them: a ``GRPOConfig``, a dataset, a reward function."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylora_lite.tasks.task import Task
from tinylora_lite.training.batches import draw_prompts
from tinylora_lite.training.settings import GRPOSettings

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import GRPOConfig

LOSSES = {"token": "dapo", "sequence": "grpo", "constant": "dr_grpo"}
"""TRL's names for the three ways to normalise the loss."""

FIELDS = frozenset(
    {
        "beta",
        "bf16",
        "dataloader_pin_memory",
        "delta",
        "disable_dropout",
        "entropy_coef",
        "epsilon",
        "epsilon_high",
        "fp16",
        "gradient_accumulation_steps",
        "importance_sampling_level",
        "learning_rate",
        "logging_steps",
        "loss_type",
        "mask_truncated_completions",
        "max_completion_length",
        "max_grad_norm",
        "max_steps",
        "num_generations",
        "num_iterations",
        "per_device_train_batch_size",
        "repetition_penalty",
        "save_steps",
        "scale_rewards",
        "seed",
        "shuffle_dataset",
        "steps_per_generation",
        "temperature",
        "top_entropy_quantile",
        "top_k",
        "top_p",
        "use_bias_correction_kl",
        "use_vllm",
        "weight_decay",
    }
)
"""The fields that follow from our settings, or must hold what they hold for the loss to be ours."""

MAY_BE_GIVEN = frozenset({"logging_steps", "save_steps"})
"""Those of them that change nothing about the numbers."""


def trl_config(settings: GRPOSettings, folder: str | Path | None, recompute: bool = False, **config: Any) -> GRPOConfig:
    """TRL's configuration that computes what :func:`~tinylora_lite.train_grpo` computes with these settings.

    One of our steps is ``epochs_per_step`` of TRL's. A batch of completions is split into micro-batches of equal size,
    so ``micro_batch`` is lowered to the next divisor of a process's share. The optimizer of
    :mod:`tinylora_lite.training.trl` clips gradients, so TRL's own clipping is off.

    Args:
        settings: of training.
        folder: where checkpoints go; ``None`` writes none.
        recompute: whether activations are computed again in the backward pass (gradient checkpointing), to save memory.
        config: further fields of ``GRPOConfig``.

    Raises:
        ValueError: a field is given that follows from ``settings``, or the prompts of a step cannot be shared equally
            by the processes that ``accelerate launch`` started.
    """
    from trl import GRPOConfig

    if decided := sorted(config.keys() & (FIELDS - MAY_BE_GIVEN)):
        raise ValueError(f"{', '.join(decided)} cannot be given: the settings of training decide it")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.prompts_per_step % processes:
        raise ValueError(
            f"prompts_per_step={settings.prompts_per_step} cannot be shared by {processes} processes; "
            f"make it a multiple of {processes}"
        )
    rows = settings.prompts_per_step // processes * settings.group_size
    micro_batch = max(size for size in range(1, min(rows, settings.micro_batch) + 1) if rows % size == 0)
    decided_here: dict[str, Any] = {
        "max_steps": settings.steps * settings.epochs_per_step,
        "num_iterations": settings.epochs_per_step,
        "num_generations": settings.group_size,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": rows // micro_batch,
        "steps_per_generation": rows // micro_batch,
        "max_completion_length": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "learning_rate": settings.learning_rate,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "loss_type": LOSSES[settings.normalise],
        "scale_rewards": settings.scale,
        "importance_sampling_level": "token",
        "epsilon": settings.clip_low,
        "epsilon_high": settings.clip_high,
        "delta": None,
        "beta": settings.kl,
        # Its default weighs the penalty by the ratio, whose gradient stays even where the ratio is 1.
        "use_bias_correction_kl": False,
        "top_entropy_quantile": 1.0,
        "entropy_coef": 0.0,
        "mask_truncated_completions": settings.truncated == "mask",
        "shuffle_dataset": False,
        "seed": settings.seed,
        "use_vllm": False,
        "disable_dropout": True,
        "bf16": False,
        "fp16": False,
        "dataloader_pin_memory": False,
    }
    chosen: dict[str, Any] = {
        "output_dir": "." if folder is None else str(folder),
        "save_strategy": "no" if folder is None else "steps",
        "save_steps": settings.save_every * settings.epochs_per_step,
        "save_total_limit": 2,
        "logging_steps": settings.epochs_per_step,
        "report_to": "none",
    }
    # transformers renames it; only the kind that is not reentrant passes gradients where no input asks for one.
    new_name = "activation_checkpointing" in {field.name for field in fields(GRPOConfig)}
    name = "activation_checkpointing" if new_name else "gradient_checkpointing"
    chosen |= {name: recompute, f"{name}_kwargs": {"use_reentrant": False}}
    return GRPOConfig(**chosen | config | decided_here)


def trl_dataset(task: Task, settings: GRPOSettings) -> Dataset:
    """The prompts of all steps in the order in which our loop draws them, as conversations, each with its answer."""
    from datasets import Dataset

    drawn = draw_prompts(task.train, replace(settings, prompts_per_step=settings.steps * settings.prompts_per_step), 0)
    return Dataset.from_list([{"prompt": task.messages(example), "gold": example.gold} for example in drawn])
