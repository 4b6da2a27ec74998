"""How to train by imitation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import get_args

from tinylora_lite.grpo_settings import Schedule, _is_finite


@dataclass(frozen=True)
class SFTSettings:
    """How to train on worked answers; what :class:`~tinylora_lite.grpo_settings.GRPOSettings` has too means the same.

    Attributes:
        steps: updates.
        epochs: passes over the training problems, in whole steps; where given, it decides instead of ``steps``.
        prompts_per_step: worked answers in one update, without repetition until all were used.
        max_new_tokens: the length limit of a worked answer, its end token included, and of completions in evaluations.
        learning_rate: of Adam, after ``warmup`` steps.
        warmup: steps over which the learning rate rises linearly.
        schedule: ``"constant"``, or ``"linear"``: from ``learning_rate`` at the first step down to zero after the last.
        max_grad_norm: gradients longer than this are shortened to it.
        micro_batch: answers in one forward and backward pass; changes memory and speed, the result by rounding.
        evaluate_every: steps between evaluations on the validation split; 0 never evaluates.
        evaluate_problems: problems of an evaluation.
        evaluate_accuracy: whether an evaluation samples answers too, and does not take the loss alone.
        temperature: of that sampling; 0 is greedy. The loss is at temperature 1.
        save_every: steps between checkpoints, where a folder is given.
        seed: moves the order of the problems, and the sampling.

    Raises:
        ValueError: a setting is outside its range.
    """

    steps: int = 40
    epochs: float | None = None
    prompts_per_step: int = 32
    max_new_tokens: int = 256
    learning_rate: float = 1e-2
    warmup: int = 0
    schedule: Schedule = "constant"
    max_grad_norm: float = 1.0
    micro_batch: int = 64
    evaluate_every: int = 0
    evaluate_problems: int = 128
    evaluate_accuracy: bool = False
    temperature: float = 1.0
    save_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        counted = {"steps": 1, "prompts_per_step": 1, "max_new_tokens": 1, "micro_batch": 1, "evaluate_problems": 1}
        for name, least in (counted | {"save_every": 1, "warmup": 0, "evaluate_every": 0, "seed": 0}).items():
            value = getattr(self, name)
            if type(value) is not int or value < least:  # True is an int too
                raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
        for name in ("learning_rate", "max_grad_norm", "epochs"):
            value = getattr(self, name)
            if not (_is_finite(value) and value > 0) and (name, value) != ("epochs", None):
                raise ValueError(f"{name} must be a finite number above 0, not {value!r}")
        if not (_is_finite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be a finite number of at least 0, not {self.temperature!r}")
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"schedule must be one of {', '.join(get_args(Schedule))}, not {self.schedule!r}")

    def in_steps(self, problems: int) -> SFTSettings:
        """The same with ``epochs`` turned into ``steps``, for so many training problems.

        >>> SFTSettings(epochs=3, prompts_per_step=64).in_steps(7473).steps
        350
        """
        if self.epochs is None:
            return self
        return replace(self, epochs=None, steps=max(1, math.floor(self.epochs * problems / self.prompts_per_step)))

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        falling = 1 - step / self.steps if self.schedule == "linear" else 1.0
        return self.learning_rate * min(1.0, (step + 1) / (self.warmup + 1)) * falling
