"""The adapter of a trial, and its calibrated directions, which are made once from a base and kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tinylora_lite import nano
from tinylora_lite.adapter.adapter import attach
from tinylora_lite.adapter.basis import Basis
from tinylora_lite.adapter.config import TinyLoraConfig, lora_xs
from tinylora_lite.adapter.tying import find_target_modules
from tinylora_lite.adapter.weights import base_fingerprint
from tinylora_lite.files.basis import load_basis, save_basis
from tinylora_lite.lab.real import load_base
from tinylora_lite.lab.tasks import made_from, task_of
from tinylora_lite.lab.trial import Trial
from tinylora_lite.tasks.task import Task
from tinylora_lite.training.batches import draw_prompts
from tinylora_lite.training.calibrate import calibrate, leading_directions, policy_gradient
from tinylora_lite.training.settings import GRPOSettings
from tinylora_lite.training.sft import encode_solutions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def config_of(trial: Trial) -> TinyLoraConfig:
    """The adapter of a trial."""
    if trial.numbers == "LoRA-XS":
        return lora_xs(trial.rank, sigma=trial.sigma)
    options: dict[str, Any] = {"rank": trial.rank, "u": trial.u, "sigma": trial.sigma, "seed": trial.p_seed}
    if trial.tying == "attention, MLP":
        model, _ = load_base(trial.base)
        options["groups"] = [int(".mlp." in target.name) for target in find_target_modules(model)]
    else:
        options |= {"n_tie": trial.n_tie, "tying": trial.tying}
    if trial.numbers == "calibrated":
        options["projection"] = calibrated_basis(trial)
    return TinyLoraConfig(**options)


def calibrated_basis(trial: Trial) -> Basis:
    """The basis of a calibrated trial, made on the first call and kept in the user's cache.

    ``trial.calibration`` holds what is not at its default, as ``"problems=32, task=adding"``: ``task`` (calibrated on),
    ``base`` (of the same shape), ``gradients`` (of imitating a kind of demonstrations, in place of those of the
    reward), and arguments of :func:`~tinylora_lite.calibrate` that are integers.
    """
    named = dict(part.split("=", 1) for part in trial.calibration.split(", ") if part)
    base = named.pop("base", trial.base)
    task, writer = named.pop("task", "nano"), named.pop("gradients", "")
    options: dict[str, Any] = {name: int(value) for name, value in named.items()}
    name = "-".join([f"r{trial.rank}", trial.sigma, *trial.calibration.replace("=", "").split(", "), str(trial.p_seed)])
    path = made_from(base, trial.base) / f"{name}.safetensors"
    if not path.exists():
        model, tokenizer = load_base(base)
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
    problems: int = 384,
    directions: int = 13,
) -> Basis:
    """The leading singular vectors of the gradients of imitation, one for each worked answer of the task.

    It is the first pass of :func:`~tinylora_lite.calibrate` with SFT's loss in place of GRPO's.
    """
    examples = draw_prompts(task.train, GRPOSettings(prompts_per_step=problems, seed=trial.p_seed), 0)
    config = TinyLoraConfig(rank=trial.rank, u=trial.rank**2, sigma=trial.sigma, projection="identity")
    adapter = attach(model, config)
    try:
        answers = [encode_solutions(tokenizer, task, [example]) for example in examples]
        gradients = torch.stack([policy_gradient(model, adapter, answer, torch.ones(1)) for answer in answers])
    finally:
        adapter.detach()
    about: dict[str, Any] = {"method": "singular vectors of gradients of imitation", "base": base_fingerprint(model)}
    about |= {"task": task.name, "problems": problems, "seed": trial.p_seed}
    return leading_directions(gradients, directions, adapter, about)
