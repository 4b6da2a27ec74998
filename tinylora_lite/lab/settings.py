"""What a trial trains with: the settings of its method, and its adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinylora_lite import nano
from tinylora_lite.adapter.config import TinyLoraConfig, lora_xs
from tinylora_lite.adapter.tying import find_target_modules
from tinylora_lite.lab.bases import calibrated_basis
from tinylora_lite.lab.trial import Trial
from tinylora_lite.training.evolution import ESSettings
from tinylora_lite.training.settings import GRPOSettings, SFTSettings


def grpo_settings(trial: Trial) -> GRPOSettings:
    """32 prompts with 8 completions each for a step."""
    return GRPOSettings(**_settings(trial))


def sft_settings(trial: Trial) -> SFTSettings:
    """64 demonstrations for a step."""
    return SFTSettings(**_settings(trial), prompts_per_step=64)


def es_settings(trial: Trial) -> ESSettings:
    """8 candidates on 32 prompts for a generation: as many completions as in a step of GRPO."""
    return ESSettings(
        generations=trial.steps, max_new_tokens=nano.MAX_NEW_TOKENS, sigma=trial.learning_rate, seed=trial.seed
    )


def _settings(trial: Trial) -> dict[str, Any]:
    return {
        "steps": trial.steps,
        "max_new_tokens": nano.MAX_NEW_TOKENS,
        "learning_rate": trial.learning_rate,
        "schedule": "linear",
        "warmup": 3 if trial.numbers == "all weights" else 0,
        "seed": trial.seed,
    }


def config_of(trial: Trial, folder: Path | None = None) -> TinyLoraConfig:
    """The adapter of a trial; ``folder`` is where calibrated bases are kept (:func:`calibrated_basis`)."""
    if trial.numbers == "LoRA-XS":
        return lora_xs(trial.rank, sigma=trial.sigma)
    options: dict[str, Any] = {"rank": trial.rank, "u": trial.u, "sigma": trial.sigma, "seed": trial.p_seed}
    if trial.tying == "attention, MLP":
        model, _ = nano.load(trial.base)
        options["groups"] = [int(".mlp." in target.name) for target in find_target_modules(model)]
    else:
        options |= {"n_tie": trial.n_tie, "tying": trial.tying}
    if trial.numbers == "calibrated":
        options["projection"] = calibrated_basis(trial, folder)
    return TinyLoraConfig(**options)
