"""One run of the lab: which numbers train, on which base, by which method, with which settings, from which seed."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from tinylora_lite.nano.task import MAX_NEW_TOKENS
from tinylora_lite.training.settings import GRPOSettings, SFTSettings

if TYPE_CHECKING:
    from tinylora_lite.adapter.config import Sigma

Method = Literal["grpo", "sft", "es", "none", "noise", "search", "one logit"]
Numbers = Literal["random", "calibrated", "LoRA-XS", "LoRA", "steering vector", "logits", "all weights"]

DRAWN = ("rotated", "activations", "Fisher")
"""Directions that depend on a seed."""
DIRECTIONS = ("leading", "middle", "trailing", *DRAWN)
"""Which singular directions an adapter can have; :mod:`tinylora_lite.lab.directions` says what they are."""

REAL = {
    "smollm2-135m": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "qwen2.5-coder-0.5b": "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
}
"""The real pretrained models that can be a base, and the SHA-256 of the GGUF file that each is read from."""

LINES = {
    "told to write": "Write the calculation on one line, and the answer after ####.",
    "told to choose": "Decide whether to add, to subtract or to multiply. Then calculate.",
}
"""Instructions before every problem, worked examples included: other prompts for the untrained model."""
SHOTS = {"four shown": 4, "eight shown": 8}
"""How many worked examples still other prompts have, in place of two."""

BASE = "qwen2-0.4m"
"""The base that carries the sweeps: the smallest of the family."""


@dataclass(frozen=True)
class Trial:
    """The settings of a run; a field at its default is left out of keys and records.

    Attributes:
        base: the name of a shipped base, or of one of ``REAL``.
        method: ``"grpo"``, ``"sft"``, ``"es"`` (an evolution strategy), ``"none"`` (the untouched base), ``"noise"``
            (v is drawn at random, and ``learning_rate`` is its norm), ``"search"`` (the best of as many such v as there
            are steps), or ``"one logit"`` (``learning_rate`` is the size of its bias). The last two are
            :mod:`tinylora_lite.lab.baselines`.
        numbers: what trains: v on random directions (the paper) or calibrated ones, all entries of R (LoRA-XS), PEFT's
            LoRA, a steering vector, a bias of the logits, or all weights.
        rank, u, n_tie, sigma: of the adapter (:class:`~tinylora_lite.TinyLoraConfig`).
        tying: the adapter's, or ``"attention, MLP"``: one vector for each of the two.
        directions: which singular directions are kept, one of ``DIRECTIONS``.
        precision: of v after each update: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        task: a task of :mod:`tinylora_lite.lab.tasks`; what is trained on, and what the result is scored on.
        trained_on: another task to train on, where it is not the one that is scored.
        calibration: how the basis of calibrated numbers is made (:func:`tinylora_lite.lab.bases.calibrated_basis`).
        steps: updates.
        learning_rate: of Adam at the first step; it falls linearly to zero. With ``"es"`` it is CMA-ES's first sigma.
        seed: moves the order of the problems and the sampling.
        projection_seed: moves P and the calibration; ``None`` moves them with ``seed``.
        split: what the result is scored on: ``"validation"`` in a sweep, ``"test"`` in a report.
        prompts: problems of a step; 0 is 32, each with 8 completions, and of SFT 64 demonstrations.
        samples: answers to each problem that the result is scored on. With more than one, pass@k and the share of each
            writer's style are recorded too; only a trial that runs by itself can have them.
        temperature: of the sampled answers that the result is scored on; greedy ones are scored beside them.
    """

    base: str = BASE
    method: Method = "grpo"
    numbers: Numbers = "random"
    rank: int = 2
    u: int = 1
    n_tie: int | str = 4
    tying: str = "tiled"
    sigma: Sigma = "left"
    directions: str = "leading"
    precision: str = "fp32"
    task: str = "nano"
    trained_on: str = ""
    calibration: str = ""
    steps: int = 20
    learning_rate: float = 0.1
    seed: int = 0
    projection_seed: int | None = None
    split: str = "test"
    prompts: int = 0
    samples: int = 1
    temperature: float = 1.0

    @property
    def key(self) -> str:
        """What the trial is known by: its settings, those at their defaults left out."""
        return json.dumps(self.settings(), sort_keys=True)

    def settings(self) -> dict[str, Any]:
        """The settings that are not at their defaults, of which ``Trial(**settings)`` makes the same trial."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    @property
    def p_seed(self) -> int:
        """The seed of P and of the calibration."""
        return self.seed if self.projection_seed is None else self.projection_seed

    def training(self) -> Trial:
        """The trial without how its result is scored: the same for all trials that train alike."""
        return replace(self, task=self.trained_on or self.task, trained_on="", split="test", temperature=1.0, samples=1)

    def shape(self) -> Trial:
        """The trial without what a sweep varies: the same for all learning rates, seeds and splits."""
        return replace(self, learning_rate=0.0, seed=0, split="test")

    def batch(self) -> Trial | None:
        """What trials of one population have in common; ``None`` for a trial that runs by itself."""
        # The run of a population cannot go on after an interruption, and one of a real model takes half an hour.
        adapted = self.numbers in ("random", "calibrated", "LoRA-XS")
        if self.method not in ("grpo", "sft") or not adapted or self.base in REAL:
            return None
        return replace(
            self.shape(),
            split=self.split,
            numbers="LoRA-XS" if self.numbers == "LoRA-XS" else "random",
            n_tie=0,
            tying="",
            # Directions that are drawn are the same for a whole population, and so must be their seed.
            projection_seed=self.p_seed if self.directions in DRAWN else None,
            calibration="",
        )


def tokens_of(task: str) -> int:
    """The length limit of an answer."""
    return 512 if task.startswith("gsm8k") else MAX_NEW_TOKENS


def settings_of(trial: Trial) -> Any:
    """The settings of a trial's method: ``GRPOSettings``, ``SFTSettings`` or ``ESSettings``.

    A step of GRPO has 32 prompts with 8 completions each, and so has a generation of the evolution strategy; a step of
    SFT has 64 demonstrations. ``trial.prompts`` takes the place of either number.
    """
    prompts = trial.prompts or (64 if trial.method == "sft" else 32)
    tokens = tokens_of(trial.trained_on or trial.task)
    options: dict[str, Any] = {"max_new_tokens": tokens, "seed": trial.seed, "prompts_per_step": prompts}
    if trial.method == "es":
        from tinylora_lite.training.evolution import ESSettings  # here, because it imports torch

        return ESSettings(generations=trial.steps, sigma=trial.learning_rate, **options)
    options |= {"steps": trial.steps, "learning_rate": trial.learning_rate, "schedule": "linear"}
    options["warmup"] = 3 if trial.numbers == "all weights" else 0
    if trial.base in REAL:  # larger parts are padded to the longest answer, smaller ones read more prompts again
        options |= {"micro_batch": 48 if tokens == MAX_NEW_TOKENS else 8, "save_every": 1}
    return SFTSettings(**options) if trial.method == "sft" else GRPOSettings(**options)
