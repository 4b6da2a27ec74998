"""Runs trials: those that can share a batch as one population, others one by one."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinylora_lite import nano
from tinylora_lite.adapter.adapter import attach
from tinylora_lite.adapter.batched import Population, attach_population
from tinylora_lite.adapter.config import TinyLoraConfig, lora_xs
from tinylora_lite.adapter.tying import find_sites
from tinylora_lite.adapter.weights import base_fingerprint
from tinylora_lite.evaluation.evaluate import evaluate
from tinylora_lite.evaluation.score import Score
from tinylora_lite.lab.bases import calibrated_basis
from tinylora_lite.lab.directions import factors_along
from tinylora_lite.lab.store import Record
from tinylora_lite.lab.tasks import task_of
from tinylora_lite.lab.trial import Trial
from tinylora_lite.planning.counting import count_parameters
from tinylora_lite.training.evolution import ESSettings, train_es
from tinylora_lite.training.grpo import GRPO, train_grpo
from tinylora_lite.training.loop import fit
from tinylora_lite.training.lora_baseline import train_lora
from tinylora_lite.training.settings import GRPOSettings, SFTSettings
from tinylora_lite.training.sft import SFT, train_sft
from tinylora_lite.utils.record import Run, environment

SWEEP_PROBLEMS = 500
"""Validation problems that a learning rate is chosen on."""
KEPT = 64
"""The most trained numbers that a record holds."""
EVALUATE_EVERY = 10
"""Steps of SFT between its evaluations, of which its curve is made; GRPO's is the reward of its samples."""
NEW_SKILLS = ("longer", "doubling")
"""Tasks that a base has not learned in pretraining."""
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def run_trials(trials: Sequence[Trial], bases: Path | None = None) -> list[Record]:
    """Runs trials that may share a batch (:meth:`Trial.batch`), or one trial.

    Args:
        trials: at least one; more only where they are of one batch.
        bases: where calibrated bases are kept; ``None`` keeps them in the user's cache.

    Returns:
        A record for each, without its settings.

    Raises:
        ValueError: several trials that cannot share a batch, or settings that make no sense together.
    """
    started = time.perf_counter()
    first = trials[0]
    if len(trials) > 1 and (first.batch() is None or len({trial.batch() for trial in trials}) > 1):
        raise ValueError("these trials differ in more than a population's members may; run them one by one")
    model, _tokenizer = nano.load(first.base)
    fingerprint = base_fingerprint(model)
    results = [_alone(first, bases)] if first.batch() is None else _together(trials, bases)
    seconds = (time.perf_counter() - started) / len(trials)
    about = {"seconds": seconds, "population": len(trials), "base": fingerprint, "environment": _environment()}
    return [result | about for result in results]


def grpo_settings(trial: Trial) -> GRPOSettings:
    """32 prompts with 8 completions each for a step."""
    return GRPOSettings(
        steps=trial.steps,
        max_new_tokens=nano.MAX_NEW_TOKENS,
        learning_rate=trial.learning_rate,
        schedule="linear",
        warmup=3 if trial.numbers == "all weights" else 0,
        seed=trial.seed,
    )


def sft_settings(trial: Trial) -> SFTSettings:
    """64 demonstrations for a step, and an evaluation now and then where a population trains."""
    return SFTSettings(
        steps=trial.steps,
        prompts_per_step=64,
        max_new_tokens=nano.MAX_NEW_TOKENS,
        learning_rate=trial.learning_rate,
        schedule="linear",
        warmup=3 if trial.numbers == "all weights" else 0,
        evaluate_every=EVALUATE_EVERY if trial.batch() and trial.split == "test" else 0,
        evaluate_problems=200,
        seed=trial.seed,
    )


def es_settings(trial: Trial) -> ESSettings:
    """8 candidates on 32 prompts for a generation: as many completions as in a step of GRPO."""
    return ESSettings(
        generations=trial.steps, max_new_tokens=nano.MAX_NEW_TOKENS, sigma=trial.learning_rate, seed=trial.seed
    )


def config_of(trial: Trial, bases: Path | None = None) -> TinyLoraConfig:
    """The adapter of a trial; the basis of a calibrated one is made on the first call and found afterwards."""
    if trial.numbers == "LoRA-XS":
        return lora_xs(trial.rank, sigma=trial.sigma)
    options: dict[str, Any] = {"rank": trial.rank, "u": trial.u, "sigma": trial.sigma, "seed": trial.p_seed}
    if trial.tying == "attention, MLP":
        model, _ = nano.load(trial.base)
        options["groups"] = [int(".mlp." in site.name) for site in find_sites(model)]
    else:
        options |= {"n_tie": trial.n_tie, "tying": trial.tying}
    if trial.numbers == "calibrated":
        options["projection"] = calibrated_basis(trial, bases)
    return TinyLoraConfig(**options)


def _together(trials: Sequence[Trial], bases: Path | None) -> list[Record]:
    first = trials[0]
    model, tokenizer = nano.load(first.base)
    configs = [config_of(trial, bases) for trial in trials]
    factors = factors_along(model, tokenizer, first) if first.directions != "leading" else None
    population = attach_population(model, configs, factors=factors)
    task, after = task_of(first.trained_on or first.task, first.base), _rounding(population, first.precision)
    try:
        if first.method == "grpo":
            own = [grpo_settings(trial) for trial in trials]
            runs = fit(GRPO(model, tokenizer, population, task, own), on_step=after, progress=False)
        else:
            shown = [sft_settings(trial) for trial in trials]
            runs = fit(SFT(model, tokenizer, population, task, shown), on_step=after, progress=False)
        # Answers of one seed for all: what a member scores must not depend on who else is in the batch.
        scored = _scored(replace(first, seed=0))
        scores = {n: evaluate(model, tokenizer, population=population, **how) for n, how in scored}
    except FloatingPointError:
        # One member's numbers ran away, and the others must not go down with it.
        return [_diverged(first, bases)] if len(trials) == 1 else [_together([t], bases)[0] for t in trials]
    return [
        _record(run, v.detach(), {name: found[k] for name, found in scores.items()})
        for k, (run, v) in enumerate(zip(runs, population.vectors, strict=True))
    ]


def _alone(trial: Trial, bases: Path | None) -> Record:
    try:
        return _trained_alone(trial, bases)
    except FloatingPointError:
        return _diverged(trial, bases)


def _trained_alone(trial: Trial, bases: Path | None) -> Record:
    model, tokenizer = nano.load(trial.base)
    task = task_of(trial.trained_on or trial.task, trial.base)
    run, v = Run(trial.method, {"seed": trial.seed}, trial.numbers, 0, task.name), torch.zeros(0)
    if trial.method == "noise":
        adapter = attach(model, config_of(trial, bases))
        noise = torch.randn(adapter.vectors.shape, generator=torch.Generator().manual_seed(trial.seed))
        with torch.no_grad():
            adapter.vectors.copy_(noise * (trial.learning_rate / noise.norm()))
        v = adapter.vectors.detach()
        run.parameters = adapter.num_parameters
    elif trial.method == "es":
        config = config_of(trial, bases)
        run, v = train_es(model, tokenizer, config, task, es_settings(trial), progress=False)
        adapter = attach(model, config)
        with torch.no_grad():
            adapter.vectors.copy_(v)
    elif trial.numbers == "LoRA":
        settings = grpo_settings(trial) if trial.method == "grpo" else sft_settings(trial)
        run = train_lora(model, tokenizer, task, settings, rank=trial.rank)
    elif trial.method == "grpo":
        run = train_grpo(model, tokenizer, None, task, grpo_settings(trial), progress=False)
    elif trial.method == "sft":
        run = train_sft(model, tokenizer, None, task, sft_settings(trial), progress=False)
    return _record(run, v, {name: evaluate(model, tokenizer, **how) for name, how in _scored(trial)})


def _scored(trial: Trial) -> list[tuple[str, dict[str, Any]]]:
    """How a trained model is scored: sampled and greedy on the whole test split, sampled on part of the validation.

    What was trained for another skill is scored on the plain task too: did it forget the old one?
    """
    options: dict[str, Any] = {"split": trial.split, "max_new_tokens": nano.MAX_NEW_TOKENS, "seed": trial.seed}
    scored = options | {"task": task_of(trial.task, trial.base)}
    if trial.split == "validation":
        return [("sampled", scored | {"problems": SWEEP_PROBLEMS})]
    old = [("old skill", options | {"task": task_of("nano", trial.base)})] if trial.task in NEW_SKILLS else []
    return [("sampled", scored), ("greedy", scored | {"temperature": 0.0}), *old]


def _rounding(population: Population, precision: str) -> Callable[[list[Run]], None] | None:
    """Rounds v after every step to a narrower dtype, as if it were kept in that dtype; nothing for ``"fp32"``."""
    if precision == "fp32":
        return None

    def rounded(_: list[Run]) -> None:
        with torch.no_grad():
            for v in population.vectors:
                v.copy_(v.to(PRECISIONS[precision]))

    return rounded


def _diverged(trial: Trial, bases: Path | None) -> Record:
    """The record of a run that ended in NaN: no answer of such a model is right."""
    model, _ = nano.load(trial.base)
    if trial.numbers == "all weights":
        numbers = count_parameters(model, "full")
    elif trial.numbers == "LoRA":
        numbers = count_parameters(model, "lora", rank=trial.rank)
    else:
        numbers = attach(model, config_of(trial, bases)).num_parameters
    nothing = {"accuracy": 0.0, "low": 0.0, "high": 0.0, "n": 0, "samples": 1, "lenient": 0.0}
    steps = [0.0] * trial.steps if trial.method in ("grpo", "es") else []
    return {
        "parameters": numbers,
        "scores": {name: nothing for name, _ in _scored(trial)},
        "curve": steps,
        "lengths": steps,
        "loss": [],
        "evaluations": [],
        "tokens": 0.0,
        "training_seconds": 0.0,
        "norm": 0.0,
        "vectors": [],
        "diverged": True,
    }


def _record(run: Run, v: Tensor, scores: dict[str, Score]) -> Record:
    sampled = run.steps if run.method in ("grpo", "es") else []
    return {
        "parameters": run.parameters,
        "scores": {name: score.details() for name, score in scores.items()},
        "curve": [round(row["reward"], 4) for row in sampled],
        "lengths": [round(row.get("length", 0.0), 2) for row in sampled],
        "loss": [round(row["loss"], 4) for row in run.steps] if run.method == "sft" else [],
        "evaluations": [[row["step"], row["accuracy"]] for row in run.evaluations],
        "tokens": sum(row.get("length", 0.0) for row in run.steps),
        "training_seconds": run.seconds,
        "norm": run.steps[-1].get("norm", 0.0) if run.steps else float(v.norm()),
        "vectors": v.flatten().tolist() if v.numel() <= KEPT else [],
    }


@cache
def _environment() -> dict[str, str]:
    """Versions and machine, and the commit where the library runs from a checkout."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return environment() | ({"commit": git.stdout.strip()} if git.returncode == 0 else {})
