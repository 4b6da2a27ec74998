"""How to train: what GRPO and imitation share, and what is each one's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, get_args

Scale = Literal["group", "batch", "none"]
Normalise = Literal["token", "sequence", "constant"]
Truncated = Literal["zero", "mask", "score"]
Schedule = Literal["constant", "linear"]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What every way of training needs.

    Attributes:
        steps: updates.
        prompts_per_step: problems drawn for one step, without repetition until all were used.
        max_new_tokens: the length limit of a completion, or of a worked answer with its end token.
        temperature: of sampling; GRPO takes its log-probabilities at it, imitation always at 1.
        learning_rate: of Adam, after ``warmup`` steps.
        warmup: steps over which the learning rate rises linearly.
        schedule: ``"constant"``, or ``"linear"``: from ``learning_rate`` at the first step down to zero after the last.
        weight_decay: of AdamW, decoupled from the gradient; 0 makes it Adam.
        max_grad_norm: gradients longer than this are shortened to it.
        micro_batch: rows in one forward and backward pass; changes memory and speed, the result by rounding.
        evaluate_every: steps between evaluations on the validation split; 0 never evaluates.
        evaluate_problems: problems of an evaluation.
        save_every: steps between checkpoints, where a folder is given.
        seed: moves the order of the problems and the sampling.

    Raises:
        ValueError: a setting is outside its range.
    """

    steps: int = 40
    prompts_per_step: int = 32
    max_new_tokens: int = 256
    temperature: float = 1.0
    learning_rate: float = 1e-2
    warmup: int = 0
    schedule: Schedule = "constant"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    micro_batch: int = 64
    evaluate_every: int = 0
    evaluate_problems: int = 128
    save_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one = ("steps", "prompts_per_step", "max_new_tokens", "micro_batch", "evaluate_problems", "save_every")
        check_integers(vars(self), dict.fromkeys(at_least_one, 1) | {"warmup": 0, "evaluate_every": 0, "seed": 0})
        check_numbers(vars(self), "learning_rate", "max_grad_norm")
        check_numbers(vars(self), "weight_decay", bounds="of at least 0", within=lambda x: x >= 0)
        _check_choices(vars(self), schedule=Schedule)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        falling = 1 - step / self.steps if self.schedule == "linear" else 1.0
        return self.learning_rate * min(1.0, (step + 1) / (self.warmup + 1)) * falling


@dataclass(frozen=True, kw_only=True)
class GRPOSettings(TrainingSettings):
    """How to train by GRPO. :meth:`variant` gives the settings of GRPO, Dr. GRPO and DAPO.

    Attributes:
        group_size: G, completions sampled for one prompt.
        epochs_per_step: how often all samples of a step are trained on; above 1 the clipping of the ratio matters.
        mini_batches: updates of an epoch, each from its share of the prompts; above 1 the clipping matters too (verl's
            ``train_batch_size / ppo_mini_batch_size``).
        scale, normalise, clip_low, clip_high, tis_cap, kl: see :mod:`tinylora_lite.training.losses`; ``tis_cap=None``
            leaves the correction for the sampler out.
        truncated: what a completion cut off at the limit is worth: ``"zero"`` reward; ``"mask"``, zero reward in its
            group's mean and no part in the loss; or ``"score"``, its text is scored like any other.

    The other settings are :class:`TrainingSettings`'.

    Raises:
        ValueError: a setting is outside its range.
    """

    group_size: int = 8
    epochs_per_step: int = 1
    mini_batches: int = 1
    scale: Scale = "group"
    normalise: Normalise = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    tis_cap: float | None = 2.0
    kl: float = 0.0
    truncated: Truncated = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(vars(self), {"group_size": 2, "epochs_per_step": 1, "mini_batches": 1})
        if self.prompts_per_step % self.mini_batches:
            counts = f"prompts_per_step={self.prompts_per_step} and mini_batches={self.mini_batches}"
            raise ValueError(f"{counts}: the prompts cannot be shared equally; make the first a multiple of the second")
        check_numbers(vars(self), "temperature", *(["tis_cap"] if self.tis_cap is not None else []))
        check_numbers(vars(self), "clip_low", bounds="from 0 to 1", within=lambda x: 0 <= x <= 1)
        check_numbers(vars(self), "clip_high", "kl", bounds="of at least 0", within=lambda x: x >= 0)
        _check_choices(vars(self), scale=Scale, normalise=Normalise, truncated=Truncated)

    @classmethod
    def variant(cls, name: Literal["grpo", "dr_grpo", "dapo"], **settings: Any) -> GRPOSettings:
        """The loss of a paper: GRPO (2402.03300), Dr. GRPO (2503.20783) or DAPO (2503.14476, without its resampling).

        It comes without GRPO's KL penalty (``kl=0.04`` there), and with the correction for the sampler, which none of
        them has, unless ``tis_cap=None``.

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


@dataclass(frozen=True, kw_only=True)
class SFTSettings(TrainingSettings):
    """How to train on worked answers.

    Attributes:
        epochs: passes over the training problems, in whole steps; where given, it decides instead of ``steps``.
        evaluate_accuracy: whether an evaluation samples answers too, at ``temperature`` (0 is greedy), and does not
            take the loss alone.

    The other settings are :class:`TrainingSettings`'.

    Raises:
        ValueError: a setting is outside its range.
    """

    epochs: float | None = None
    evaluate_accuracy: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs is not None:
            check_numbers(vars(self), "epochs")
        check_numbers(vars(self), "temperature", bounds="of at least 0", within=lambda x: x >= 0)

    def in_steps(self, problems: int) -> SFTSettings:
        """The same with ``epochs`` turned into ``steps``, for so many training problems.

        >>> SFTSettings(epochs=3, prompts_per_step=64).in_steps(7473).steps
        350
        """
        if self.epochs is None:
            return self
        return replace(self, epochs=None, steps=max(1, math.floor(self.epochs * problems / self.prompts_per_step)))


def check_integers(settings: dict[str, Any], least: dict[str, int]) -> None:
    """Raises ``ValueError`` unless each named setting is an integer of at least its bound."""
    for name, bound in least.items():
        value = settings[name]
        if type(value) is not int or value < bound:  # True is an int too
            why = " (a group of one has no better half)" if name == "group_size" else ""
            raise ValueError(f"{name} must be an integer of at least {bound}{why}, not {value!r}")


def check_numbers(
    settings: dict[str, Any], *names: str, bounds: str = "above 0", within: Callable[[float], bool] = lambda x: x > 0
) -> None:
    """Raises ``ValueError`` unless each named setting is a finite number within the bounds, which are told in words."""
    for name in names:
        value = settings[name]
        finite = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not finite or not within(value):
            raise ValueError(f"{name} must be a finite number {bounds}, not {value!r}")


def _check_choices(settings: dict[str, Any], **choices: Any) -> None:
    for name, allowed in choices.items():
        if settings[name] not in get_args(allowed):
            raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, not {settings[name]!r}")


S = TypeVar("S", bound=TrainingSettings)


def as_list(settings: Sequence[S], objective: str) -> list[S]:
    """Settings as a list; raises ``ValueError``, with the way to call ``objective``, where they are something else."""
    if not (isinstance(settings, Sequence) and settings and all(isinstance(own, TrainingSettings) for own in settings)):
        cure = f"fit({objective}(model, tokenizer, population, task, [settings, ...]))"
        raise ValueError(f"an adapter takes one object of settings, and a population a list of them: {cure}")
    return list(settings)
