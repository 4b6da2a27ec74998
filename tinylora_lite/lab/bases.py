"""What is made once from a base and then used by many runs: calibrated directions, and its own rewarded answers."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tinylora_lite import nano
from tinylora_lite.adapter.adapter import attach
from tinylora_lite.adapter.config import TinyLoraConfig
from tinylora_lite.adapter.projection import Basis
from tinylora_lite.adapter.weights import base_fingerprint
from tinylora_lite.evaluation.evaluate import evaluate
from tinylora_lite.files.basis import load_basis, save_basis
from tinylora_lite.lab.trial import Trial
from tinylora_lite.sampling.logprobs import completion_logprobs
from tinylora_lite.tasks.task import Example, Task
from tinylora_lite.training.batches import draw_prompts
from tinylora_lite.training.calibrate import calibrate
from tinylora_lite.training.settings import GRPOSettings
from tinylora_lite.training.sft import encode_solutions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CACHE = "TINYLORA_CACHE"
"""The environment variable that names another folder than ``~/.cache/tinylora_lite``."""

SAMPLES = 4
"""Answers of a base to each training problem, of which the first rewarded one becomes a demonstration."""


def cache_folder() -> Path:
    """Where what was made from bases is kept."""
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "tinylora_lite") / "lab"


def calibrated_basis(trial: Trial, folder: Path | None = None) -> Basis:
    """The basis of a calibrated trial, from the seed ``trial.p_seed``; it is made on the first call and kept.

    ``trial.calibration`` holds what is not at its default, as ``"problems=32, task=adding"``: ``problems``, ``looks``,
    ``task`` (calibrated on), ``base`` (of the same shape) and ``gradients``: of imitating a kind of demonstrations,
    where they are not those of the reward.

    Raises:
        ValueError: a setting of the calibration is not known.
    """
    options = calibration_of(trial.calibration)
    base = options.pop("base", trial.base)
    task, writer = options.pop("task", "nano"), options.pop("gradients", "")
    name = "-".join([f"r{trial.rank}", trial.sigma, *trial.calibration.replace("=", "").split(", "), str(trial.p_seed)])
    path = _kept(trial.base, base, folder) / f"{name}.safetensors"
    if not path.exists():
        from tinylora_lite.lab.tasks import task_of  # which needs this module for a base's own answers

        model, tokenizer = nano.load(base)
        if writer:
            shown = task_of(f"demonstrations: {writer}", base)
            basis = imitated_basis(model, tokenizer, shown, trial, **options)
        else:
            basis = calibrate(
                model,
                tokenizer,
                task_of(task, base),
                rank=trial.rank,
                sigma=trial.sigma,
                seed=trial.p_seed,
                max_new_tokens=nano.MAX_NEW_TOKENS,
                **options,
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        save_basis(basis, path)
    return load_basis(path)


@cache
def _fingerprint(base: str) -> str:
    return base_fingerprint(nano.load(base)[0])[:12]


def _kept(base: str, looked_at: str, folder: Path | None) -> Path:
    """The folder of what was made from one base for another: a base that was trained again has another folder."""
    return (folder or cache_folder()) / f"{base}-{_fingerprint(looked_at)}"


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

    What :func:`~tinylora_lite.calibrate` does in its first look, with SFT's loss in place of GRPO's: which of
    the two tells numbers where to point?
    """
    config = TinyLoraConfig(rank=trial.rank, u=trial.rank**2, sigma=trial.sigma, projection="identity")
    examples = draw_prompts(task.train, GRPOSettings(prompts_per_step=problems, seed=trial.p_seed), 0)
    adapter = attach(model, config)
    try:
        gradients = []
        for example in examples:
            rows = encode_solutions(tokenizer, task, [example])
            loss = -(completion_logprobs(model, rows) * rows.completion_mask).sum()
            gradients.append(torch.autograd.grad(loss, adapter.vectors)[0].flatten())
        _, _, axes = torch.linalg.svd(torch.stack(gradients), full_matrices=False)
    finally:
        adapter.detach()
    about = {
        "method": "singular vectors of gradients of imitation",
        "base": base_fingerprint(model),
        "task": task.name,
        "problems": problems,
        "seed": trial.p_seed,
    }
    shape = (directions, len(adapter.names), trial.rank, trial.rank)
    return Basis(axes[:directions].reshape(shape).contiguous(), adapter.names, trial.sigma, about)


def calibration_of(text: str) -> dict[str, Any]:
    """The settings that ``Trial.calibration`` names.

    >>> calibration_of("problems=32, task=adding")
    {'problems': 32, 'task': 'adding'}
    """
    kinds = {"problems": int, "looks": int, "directions": int, "task": str, "base": str, "gradients": str}
    options = dict(part.split("=", 1) for part in text.split(", ")) if text else {}
    for name in options:
        if name not in kinds:
            raise ValueError(f"a calibration has no setting {name!r}; there are: {', '.join(kinds)}")
    return {name: kinds[name](value) for name, value in options.items()}


def own_demonstrations(base: str, folder: Path | None = None) -> Task:
    """The nano task whose worked answers are the base's own: for each problem the first of its answers that is right.

    Problems that none of ``SAMPLES`` answers solves are left out. Imitating them is on-policy at the start, and so
    tells whether SFT falls behind because it is SFT, or because it imitates somebody else.
    """
    path = _kept(base, base, folder) / "own-demonstrations.json"
    plain = nano.task()
    if not path.exists():
        model, tokenizer = nano.load(base)
        score = evaluate(
            model, tokenizer, plain, split="train", samples=SAMPLES, max_new_tokens=nano.MAX_NEW_TOKENS, seed=1
        )
        answers: dict[str, str] = {}
        for completion in score.completions:
            if completion.reward > 0:
                answers.setdefault(completion.prompt, completion.text)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(answers), encoding="utf-8")
        os.replace(temporary, path)
    answers = json.loads(path.read_text(encoding="utf-8"))

    def answered(examples: tuple[Example, ...]) -> tuple[Example, ...]:
        return tuple(replace(e, solution=answers[e.prompt]) for e in examples if e.prompt in answers)

    return replace(plain, name=f"nano by {base}", train=answered(tuple(plain.train)))
