"""How to train by GRPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from tinylora_lite.losses import Normalise, Scale

Truncated = Literal["zero", "mask", "score"]
Schedule = Literal["constant", "linear"]


@dataclass(frozen=True)
class GRPOSettings:
    """How to train. :meth:`variant` gives the settings of GRPO, Dr. GRPO and DAPO.

    Attributes:
        steps: updates of the policy from fresh samples.
        prompts_per_step: prompts drawn for one step, without repetition until all were used.
        group_size: G, completions sampled for one prompt.
        max_new_tokens: the length limit of a completion.
        temperature: of sampling and of the log-probabilities.
        learning_rate: of Adam, after ``warmup`` steps.
        warmup: steps over which the learning rate rises linearly.
        schedule: ``"constant"``, or ``"linear"``: from ``learning_rate`` at the first step down to zero after the last.
        max_grad_norm: gradients longer than this are shortened to it.
        epochs_per_step: updates from the same samples; above 1 the clipping of the ratio matters.
        scale, normalise, clip_low, clip_high, tis_cap, kl: see :mod:`tinylora_lite.losses`; ``tis_cap=None`` leaves
            the correction for the sampler out.
        truncated: what a completion cut off at the limit is worth: ``"zero"`` reward; ``"mask"``, zero reward in its
            group's mean and no part in the loss; or ``"score"``, its text is scored like any other.
        micro_batch: completions in one forward and backward pass; changes memory and speed, the result by rounding.
        evaluate_every: steps between evaluations on the validation split; 0 never evaluates.
        evaluate_problems: problems of an evaluation.
        save_every: steps between checkpoints, where a folder is given.
        seed: moves the order of prompts and the sampling.

    Raises:
        ValueError: a setting is outside its range.
    """

    steps: int = 40
    prompts_per_step: int = 32
    group_size: int = 8
    max_new_tokens: int = 256
    temperature: float = 1.0
    learning_rate: float = 1e-2
    warmup: int = 0
    schedule: Schedule = "constant"
    max_grad_norm: float = 1.0
    epochs_per_step: int = 1
    scale: Scale = "group"
    normalise: Normalise = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    tis_cap: float | None = 2.0
    kl: float = 0.0
    truncated: Truncated = "zero"
    micro_batch: int = 64
    evaluate_every: int = 0
    evaluate_problems: int = 128
    save_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(
                f"group_size must be at least 2 (a group of one has no better half), not {self.group_size}"
            )
        counted = {"steps": 1, "prompts_per_step": 1, "group_size": 2, "max_new_tokens": 1, "epochs_per_step": 1}
        counted |= {"micro_batch": 1, "evaluate_problems": 1, "save_every": 1, "warmup": 0, "evaluate_every": 0}
        for name, least in counted.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
        for name in ("temperature", "learning_rate", "max_grad_norm", "tis_cap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, not {value!r}")
        if not (0 <= self.clip_low <= 1 and self.clip_high >= 0 and self.kl >= 0):
            raise ValueError(
                "clip_low must be from 0 to 1, clip_high and kl at least 0, "
                f"not {self.clip_low!r}, {self.clip_high!r} and {self.kl!r}"
            )
        named = {"scale": Scale, "normalise": Normalise, "truncated": Truncated, "schedule": Schedule}
        for name, choices in named.items():
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, not {getattr(self, name)!r}")

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        falling = 1 - step / self.steps if self.schedule == "linear" else 1.0
        return self.learning_rate * min(1.0, (step + 1) / (self.warmup + 1)) * falling

    @classmethod
    def variant(cls, name: Literal["grpo", "dr_grpo", "dapo"], **settings: Any) -> GRPOSettings:
        """The loss of a paper: GRPO (2402.03300), Dr. GRPO (2503.20783) or DAPO (2503.14476, without its resampling).

        Args:
            name: the paper's name for it.
            settings: further settings; they win over the variant's.

        >>> GRPOSettings.variant("dr_grpo", steps=100).normalise
        'constant'
        """
        losses: dict[str, dict[str, Any]] = {
            "grpo": {"scale": "group", "normalise": "sequence"},
            "dr_grpo": {"scale": "none", "normalise": "constant"},
            "dapo": {"scale": "group", "normalise": "token", "clip_high": 0.28, "truncated": "mask"},
        }
        if name not in losses:
            raise ValueError(f"variant must be one of {', '.join(losses)}, not {name!r}")
        return cls(**losses[name] | settings)
