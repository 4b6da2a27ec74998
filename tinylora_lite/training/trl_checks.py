"""What this library relies on inside TRL, looked up before it is relied on.

TRL has no door for an adapter of another library, so :mod:`tinylora_lite.training.trl` uses names that TRL may change
in any release. A release that lacks one is refused with a list of what is missing, instead of training something else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Set
from dataclasses import fields
from types import CodeType
from typing import Any

KNOWN = ("1.14", "1.16")
"""The oldest and the newest minor version of TRL that this library's tests have passed with."""

OVERRIDDEN = {
    "compute_loss": ("model", "inputs"),
    "create_model_card": (),
    "create_optimizer": (),
    "create_scheduler": ("num_training_steps",),
    "log": ("logs", "start_time"),
    "save_model": ("output_dir",),
    "train": ("resume_from_checkpoint",),
    "_load_from_checkpoint": ("resume_from_checkpoint",),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_save_optimizer_and_scheduler": ("output_dir",),
}
"""Methods of the trainer that are overridden, and the arguments that they must take."""

READ = {
    "__init__": {"beta", "eos_token_ids", "ref_model", "rollout_func", "use_vllm"},
    "_generate": {"rollout_func", "prompt_ids", "completion_ids", "logprobs"},
    "_generate_and_score_completions": {
        "beta",
        "ref_model",
        "use_vllm",
        "vllm_importance_sampling_correction",
        "vllm_importance_sampling_mode",
        "vllm_importance_sampling_clip_min",
        "vllm_importance_sampling_clip_max",
        "token_truncate",
        "old_per_token_logps",
        "importance_sampling_ratio",
        "sampling/sampling_logp_difference/mean",
        "sampling/sampling_logp_difference/max",
    },
    "_calculate_rewards": {"completion_ids", "log_metric"},
    "_compute_loss": {"beta", "use_vllm", "vllm_importance_sampling_correction", "importance_sampling_ratio"},
}
"""Names and strings that these methods must mention: attributes that are set from here, and keys that are read here."""


def check_trl() -> None:
    """Looks for everything that the trainer relies on; it takes milliseconds.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: the installed TRL lacks something; the message names it, and the versions that have it.
    """
    import trl

    trainer, config = _classes()
    missing = [*missing_names(trainer), *missing_fields(config)]
    if missing:
        raise RuntimeError(
            f"TRL {trl.__version__} has changed what tinylora_lite relies on: {'; '.join(missing)}. "
            f"Versions {KNOWN[0]} to {KNOWN[1]} are known to work: pip install 'trl=={KNOWN[1]}.*'"
        )


def missing_names(trainer: type) -> Iterator[str]:
    """What a trainer lacks of :data:`OVERRIDDEN` and :data:`READ`, in words."""
    for name, arguments in OVERRIDDEN.items():
        method = _method(trainer, name)
        taken = () if method is None else inspect.signature(method).parameters
        if method is None:
            yield f"GRPOTrainer.{name} is gone"
        elif absent := [argument for argument in arguments if argument not in taken]:
            yield f"GRPOTrainer.{name} takes no {', '.join(absent)}"
    for name, words in READ.items():
        method = _method(trainer, name)
        if method is None:
            yield f"GRPOTrainer.{name} is gone"
        elif absent := sorted(words - set(_mentioned(method.__code__))):
            yield f"GRPOTrainer.{name} does not use {', '.join(absent)}"


def missing_fields(config: type) -> Iterator[str]:
    """What a config lacks of the fields that settings are put into, in words."""
    from tinylora_lite.training.trl_config import FIELDS

    if absent := sorted(FIELDS - _fields(config)):
        yield f"GRPOConfig has no {', '.join(absent)}"


def _classes() -> tuple[type, type]:
    from trl import GRPOConfig, GRPOTrainer

    return GRPOTrainer, GRPOConfig


def _fields(config: type) -> Set[str]:
    return {field.name for field in fields(config)}


def _method(trainer: type, name: str) -> Callable[..., Any] | None:
    found = getattr(trainer, name, None)
    return None if found is None else inspect.unwrap(found)


def _mentioned(code: CodeType) -> Iterator[str]:
    """Names of attributes and variables, and strings, in a function and the functions inside it."""
    yield from (*code.co_names, *code.co_varnames, *code.co_cellvars)
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, (tuple, frozenset)):
            yield from (part for part in constant if isinstance(part, str))
        elif isinstance(constant, CodeType):
            yield from _mentioned(constant)
