"""Calibrated directions of a trial, made once from a base and kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tinylora_lite import nano
from tinylora_lite.adapter.adapter import attach
from tinylora_lite.adapter.basis import Basis
from tinylora_lite.adapter.config import TinyLoraConfig
from tinylora_lite.adapter.weights import base_fingerprint
from tinylora_lite.files.basis import load_basis, save_basis
from tinylora_lite.lab.tasks import made_from, task_of
from tinylora_lite.lab.trial import Trial
from tinylora_lite.tasks.task import Task
from tinylora_lite.training.batches import draw_prompts
from tinylora_lite.training.calibrate import calibrate, leading_directions, policy_gradient
from tinylora_lite.training.settings import GRPOSettings
from tinylora_lite.training.sft import encode_solutions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def calibrated_basis(trial: Trial, folder: Path | None = None) -> Basis:
    """The basis of a calibrated trial, from the seed ``trial.p_seed``; it is made on the first call and kept.

    ``trial.calibration`` holds what is not at its default, as ``"problems=32, task=adding"``: ``problems``, ``passes``,
    ``task`` (calibrated on), ``base`` (of the same shape) and ``gradients``: of imitating a kind of demonstrations, in
    place of those of the reward.

    Args:
        trial: a calibrated one.
        folder: where bases are kept; ``None`` is the user's cache.

    Raises:
        ValueError: a setting of the calibration is not known.
    """
    options = calibration_of(trial.calibration)
    base = options.pop("base", trial.base)
    task, writer = options.pop("task", "nano"), options.pop("gradients", "")
    name = "-".join([f"r{trial.rank}", trial.sigma, *trial.calibration.replace("=", "").split(", "), str(trial.p_seed)])
    path = made_from(base, trial.base, folder) / f"{name}.safetensors"
    if not path.exists():
        model, tokenizer = nano.load(base)
        if writer:
            basis = imitated_basis(model, tokenizer, task_of(f"demonstrations: {writer}", base), trial, **options)
        else:
            options |= {"rank": trial.rank, "sigma": trial.sigma, "seed": trial.p_seed}
            basis = calibrate(model, tokenizer, task_of(task, base), max_new_tokens=nano.MAX_NEW_TOKENS, **options)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_basis(basis, path)
    return load_basis(path)


def imitated_basis(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    trial: Trial,
    *,
    problems: int = 384,
    directions: int = 13,
) -> Basis:
    """The leading singular vectors of the gradients of imitation, one for each worked answer of the task.

    It is the first pass of :func:`~tinylora_lite.calibrate` with SFT's loss in place of GRPO's. The comparison tells
    whether the reward finds better directions than demonstrations do.
    """
    examples = draw_prompts(task.train, GRPOSettings(prompts_per_step=problems, seed=trial.p_seed), 0)
    config = TinyLoraConfig(rank=trial.rank, u=trial.rank**2, sigma=trial.sigma, projection="identity")
    adapter = attach(model, config)
    try:
        answers = [encode_solutions(tokenizer, task, [example]) for example in examples]
        gradients = torch.stack([policy_gradient(model, adapter, answer, torch.ones(1)) for answer in answers])
    finally:
        adapter.detach()
    about = {
        "method": "singular vectors of gradients of imitation",
        "base": base_fingerprint(model),
        "task": task.name,
        "problems": problems,
        "seed": trial.p_seed,
    }
    return leading_directions(gradients, directions, adapter, about)


def calibration_of(text: str) -> dict[str, Any]:
    """The settings that ``Trial.calibration`` names.

    >>> calibration_of("problems=32, task=adding")
    {'problems': 32, 'task': 'adding'}
    """
    kinds = {"problems": int, "passes": int, "directions": int, "task": str, "base": str, "gradients": str}
    options = dict(part.split("=", 1) for part in text.split(", ")) if text else {}
    for name in options:
        if name not in kinds:
            raise ValueError(f"a calibration has no setting {name!r}; there are: {', '.join(kinds)}")
    return {name: kinds[name](value) for name, value in options.items()}
