"""The trials behind the book's first chapters: which are run, with which learning rates, and what their records say.

:mod:`tinylora_lite.lab.study` runs them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from tinylora_lite import nano
from tinylora_lite.adapter.config import Sigma

Record = dict[str, Any]

_PACKAGED = Path(__file__).parents[1] / "results"
RESULTS = (_PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "book" / "results") / "nano"
"""Where the records lie: beside the book in a checkout, inside the package where it was installed from a wheel."""


@dataclass(frozen=True)
class Trial:
    """One training run: which numbers train, how fast, from which seed.

    Attributes:
        method: where the numbers point: ``"random"``, ``"calibrated"``, ``"LoRA-XS"`` (all entries of R),
            ``"LoRA"`` (PEFT's), or ``"all weights"``.
        learning_rate: of Adam at the first step; it falls linearly to zero.
        seed: moves the data order, the sampling, and P or the calibration.
        rank, u, n_tie: of the adapter; 0 where the method leaves no choice.
        looks: of the calibration.
        steps: of GRPO.
        split: what the trained model is scored on: ``"validation"`` in a sweep, ``"test"`` in the report.
        base: the name of a shipped base.
        sigma: where Σ stands.
    """

    method: str
    learning_rate: float
    seed: int = 0
    rank: int = 0
    u: int = 0
    n_tie: int | str = 0
    looks: int = 2
    steps: int = 30
    split: str = "test"
    base: str = nano.BASE
    sigma: Sigma = "left"

    @property
    def name(self) -> str:
        method = self.method.replace(" ", "-")
        if self.rank:
            method += f"-r{self.rank}"
        if self.u:
            method += f"-u{self.u}-tie{self.n_tie}"
        if self.method == "LoRA-XS" or self.sigma != "left":
            method += f"-{self.sigma}"
        if self.method == "calibrated" and self.looks != 2:
            method += f"-looks{self.looks}"
        return f"{self.base}/{self.split}/{method}-lr{self.learning_rate:g}-seed{self.seed}"


ALL = Trial("all weights", 3e-4)
PAPER = Trial("random", 0.1, rank=2, u=1, n_tie=4)
RANK_ONE = replace(PAPER, rank=1)
UNTIED = Trial("random", 0.1, rank=2, u=2, n_tie=1)
CALIBRATED = Trial("calibrated", 0.2, rank=8, u=13, n_tie="all")
SAME_SHAPE = replace(CALIBRATED, method="random", learning_rate=0.01)
"""The control of the calibrated trial: all its settings, and random directions."""
HEADLINES = (CALIBRATED, SAME_SHAPE, PAPER, UNTIED, ALL, RANK_ONE)
CURVE = (
    replace(CALIBRATED, looks=1),
    *(replace(PAPER, n_tie=n_tie) for n_tie in ("all", 12, 1)),
    *(replace(CALIBRATED, u=u) for u in (1, 4)),
    *(replace(CALIBRATED, rank=rank) for rank in (1, 2)),
)
XS_ONE = Trial("LoRA-XS", 0.2, rank=1, sigma="right")
"""One number for each module, for which it does not matter where Σ stands."""
XS_TWO = replace(XS_ONE, learning_rate=0.1, rank=2)
XS_LARGE = replace(XS_ONE, learning_rate=0.0025, rank=32)
LORA = Trial("LoRA", 1e-3, rank=1)
LORA_XS = (
    *(replace(XS_TWO, sigma=sigma) for sigma in ("left", "split", "right")),
    *(replace(XS_LARGE, sigma=sigma) for sigma in ("left", "right")),
    XS_ONE,
    LORA,
)
SEEDS = range(5)
KEPT = 1000
"""The most trained numbers that a record holds; more would make it a file of megabytes."""


def rates_of(trial: Trial) -> tuple[float, ...]:
    """The learning rates that are swept.

    One random number of the control drives 49 modules with 64 entries each: its P is about twenty times as long as a
    calibrated direction, and its rates are smaller by that much.
    """
    if trial.method in ("all weights", "LoRA"):
        return (3e-4, 1e-3, 3e-3)
    if trial.method == "LoRA-XS" and trial.rank > 1:
        return (0.05, 0.1, 0.2) if trial.rank == 2 else (0.000625, 0.00125, 0.0025, 0.005)
    return (0.005, 0.01, 0.02) if trial.method == "random" and trial.u == 13 else (0.1, 0.2, 0.4)


def sweep(shapes: Sequence[Trial] = HEADLINES) -> list[Trial]:
    """The learning rates of every shape, scored on the validation split: seed 0, and for ``RANK_ONE`` two more.

    Of that the first report had taken the rate that was best for seed 0, and it destroyed the model on other seeds.
    """
    return [
        replace(trial, learning_rate=rate, seed=seed, split="validation")
        for trial in shapes
        for seed in (range(3) if trial == RANK_ONE else range(1))
        for rate in rates_of(trial)
    ]


def best_rate(trial: Trial, folder: Path = RESULTS) -> Trial:
    """The trial with the rate whose mean accuracy on the validation split was best, if its shape was swept."""
    swept: dict[float, list[float]] = {}
    for rate in rates_of(trial):
        for seed in SEEDS:
            path = path_of(replace(trial, learning_rate=rate, split="validation", seed=seed), folder)
            if path.exists():
                swept.setdefault(rate, []).append(json.loads(path.read_text(encoding="utf-8"))["sampled"]["accuracy"])
    return replace(trial, learning_rate=max(swept, key=lambda rate: np.mean(swept[rate]))) if swept else trial


def path_of(trial: Trial, folder: Path = RESULTS) -> Path:
    """Where the record of a trial lies."""
    return folder / f"{trial.name}.json"


def records(folder: Path = RESULTS, base: str = nano.BASE, split: str = "test") -> list[Record]:
    """Every record of a split."""
    paths = sorted((folder / base / split).glob("*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def seeds_of(trial: Trial, folder: Path = RESULTS) -> list[Record]:
    """The test records of a trial with the learning rate of its sweep, one for each seed that was run."""
    trial = best_rate(trial, folder)
    paths = (path_of(replace(trial, seed=seed), folder) for seed in SEEDS)
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def over_seeds(found: list[Record], kind: str = "sampled") -> dict[str, float]:
    """The mean accuracy over seeds and its 95 % interval (Student's): ``accuracy``, ``low``, ``high``, ``seeds``.

    Args:
        found: records that differ in their seed only, at least two.
        kind: ``"sampled"`` or ``"greedy"``.

    Raises:
        ValueError: fewer than two records.
    """
    if len(found) < 2:
        raise ValueError(f"an interval over seeds needs at least two records, not {len(found)}")
    accuracies = [record[kind]["accuracy"] for record in found]
    mean, error = float(np.mean(accuracies)), float(stats.sem(accuracies))
    low, high = stats.t.interval(0.95, len(found) - 1, loc=mean, scale=max(error, 1e-9))
    return {"accuracy": mean, "low": max(float(low), 0.0), "high": min(float(high), 1.0), "seeds": len(found)}
