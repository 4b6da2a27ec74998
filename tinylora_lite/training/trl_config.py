"""What TRL is given: settings as a ``GRPOConfig``, prompts as a dataset, an optimizer; and which TRL is tested."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tinylora_lite.tasks.task import Task
from tinylora_lite.training.batches import draw_prompts
from tinylora_lite.training.loop import RECORDED_PARAMETERS
from tinylora_lite.training.settings import GRPOSettings
from tinylora_lite.utils import distributed

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import GRPOConfig

OLDEST, NEWEST = "1.14", "1.16"
"""The oldest and the newest minor version of TRL that this library's tests pass with."""

LOSSES = {"token": "dapo", "sequence": "grpo", "constant": "dr_grpo"}
"""TRL's names for the three ways to normalise the loss."""


COLUMNS = {
    "reward": "reward",
    "length": "completions/mean_length",
    "truncated": "completions/clipped_ratio",
    "entropy": "entropy",
    "clipped": "clip_ratio/region_mean",
    "logprob_diff_mean": "sampling/sampling_logp_difference/mean",
    "logprob_diff_max": "sampling/sampling_logp_difference/max",
    "frac_reward_zero_std": "frac_reward_zero_std",
}
COLUMNS |= {name: name for name in ("gradient_norm", "norm", "strict", "lenient", "formatted", "seconds")}
COLUMNS |= {f"v{i}": f"v{i}" for i in range(RECORDED_PARAMETERS)}
"""Columns of a run's record, and their names in TRL's log."""


def check_version() -> None:
    """Refuses a TRL that is too old, and warns of one that is newer than those tested: the trainer overrides methods.

    Raises:
        RuntimeError: TRL is older than :data:`OLDEST`.
    """
    import trl

    oldest, installed, newest = (
        [int(part) for part in version.split(".")[:2]] for version in (OLDEST, trl.__version__, NEWEST)
    )
    if installed < oldest:
        raise RuntimeError(
            f"TRL {trl.__version__} is older than {OLDEST}, which this trainer needs: pip install 'trl=={NEWEST}.*'"
        )
    if installed > newest:
        warnings.warn(
            f"TRL {trl.__version__} is newer than {NEWEST}, the newest that this trainer is tested with; if training "
            f"fails or differs from train_grpo: pip install 'trl=={NEWEST}.*'",
            stacklevel=4,
        )


def trl_config(settings: GRPOSettings, folder: str | Path | None, recompute: bool = False, **config: Any) -> GRPOConfig:
    """TRL's configuration that computes what :func:`~tinylora_lite.train_grpo` computes with these settings.

    One of our steps is ``epochs_per_step`` of TRL's. A batch of completions is split into micro-batches of equal size,
    so ``micro_batch`` is lowered to the next divisor of a process's share. Our optimizer clips gradients, so TRL's own
    clipping is off.

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

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.prompts_per_step % processes:
        raise ValueError(
            f"prompts_per_step={settings.prompts_per_step} cannot be shared by {processes} processes; "
            f"make it a multiple of {processes}"
        )
    rows = settings.prompts_per_step // processes * settings.group_size
    micro_batch = max(size for size in range(1, min(rows, settings.micro_batch) + 1) if rows % size == 0)
    decided: dict[str, Any] = {
        "max_steps": settings.steps * settings.epochs_per_step,
        "num_iterations": settings.epochs_per_step,
        "num_generations": settings.group_size,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": rows // micro_batch,
        "steps_per_generation": rows // micro_batch,
        "max_completion_length": settings.max_new_tokens,
        "temperature": settings.temperature,
        "learning_rate": settings.learning_rate,
        "loss_type": LOSSES[settings.normalise],
        "scale_rewards": settings.scale,
        "epsilon": settings.clip_low,
        "epsilon_high": settings.clip_high,
        "beta": settings.kl,
        "mask_truncated_completions": settings.truncated == "mask",
        "seed": settings.seed,
    }
    # The probabilities of sampling are those of the loss.
    decided |= {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "disable_dropout": True, "use_vllm": False}
    # The loss has no other terms. By default TRL weighs the KL penalty by the ratio, whose gradient does not vanish
    # where the ratio is 1.
    decided |= {"importance_sampling_level": "token", "delta": None, "use_bias_correction_kl": False}
    decided |= {"top_entropy_quantile": 1.0, "entropy_coef": 0.0}
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
    # transformers renames it. The reentrant kind passes no gradients where no input asks for one.
    new_name = "activation_checkpointing" in {field.name for field in fields(GRPOConfig)}
    name = "activation_checkpointing" if new_name else "gradient_checkpointing"
    chosen |= {name: recompute, f"{name}_kwargs": {"use_reentrant": False}}
    return GRPOConfig(**chosen | config | decided)


def trl_dataset(task: Task, settings: GRPOSettings) -> Dataset:
    """The prompts of all steps in the order in which our loop draws them, as conversations, each with its answer."""
    from datasets import Dataset

    drawn = draw_prompts(task.train, replace(settings, prompts_per_step=settings.steps * settings.prompts_per_step), 0)
    return Dataset.from_list([{"prompt": task.messages(example), "gold": example.gold} for example in drawn])


class AdamOnV(torch.optim.Adam):
    """Adam on one tensor that every process holds.

    The processes' gradients are averaged and shortened to ``max_norm``. A gradient of zero, because in every group all
    rewards are equal, moves nothing. Trainer clears the gradients of the model's parameters only, so this clears v's.
    """

    max_norm = math.inf
    gradient_norm = 0.0  # of the last step, before it was shortened

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        (v,) = self.param_groups[0]["params"]
        v.grad = distributed.all_reduce(torch.zeros_like(v) if v.grad is None else v.grad) / distributed.world_size()
        self.gradient_norm = torch.nn.utils.clip_grad_norm_([v], self.max_norm).item()
        if not math.isfinite(self.gradient_norm):
            raise FloatingPointError("the gradient is not finite; lower the learning rate, or load a wider dtype")
        if self.gradient_norm > 0:
            super().step(closure)
        self.zero_grad()
