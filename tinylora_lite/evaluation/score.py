"""The score of a model on a task: accuracy, how sure of it we are, and every completion to read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from math import comb
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tinylora_lite.tasks.task import Example, Task

RECORD, FILE, PART = "evaluation.json", "completions.jsonl", "completions.jsonl.part"
"""The files of an evaluation; see :mod:`tinylora_lite.evaluation.evaluate`."""
Z = 1.959963984540054
"""The normal quantile of a two-sided 95 % interval."""


@dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
        prompt, gold: the problem, and its right answer.
        text: what was answered, without special tokens.
        reward, lenient, formatted: by the task's functions of these names; ``None`` where it has none.
        tokens: of the answer, the end token included.
        truncated: whether it was cut off at the length limit.
    """

    prompt: str
    gold: str
    text: str
    reward: float
    tokens: int
    truncated: bool
    lenient: float | None = None
    formatted: bool | None = None


@dataclass(frozen=True)
class Score:
    """The mean reward (pass@1, where rewards are 0 or 1) with its 95 % interval.

    Attributes:
        accuracy: the mean reward of all completions.
        low, high: the interval; see :func:`interval`.
        n: problems.
        samples: completions of each problem.
        completions: all of them, those of one problem together, problems in the order of the task.
    """

    accuracy: float
    low: float
    high: float
    n: int
    samples: int
    completions: tuple[Completion, ...] = field(repr=False)

    @classmethod
    def of(cls, completions: Iterable[Completion], samples: int = 1) -> Score:
        """The score of completions in the order that :attr:`completions` has, at least one."""
        completions = tuple(completions)
        rewards = np.array([c.reward for c in completions], dtype=float).reshape(-1, samples)
        return cls(float(rewards.mean()), *interval(rewards), len(rewards), samples, completions)

    @classmethod
    def load(cls, folder: str | Path) -> Score:
        """The score that a finished :func:`evaluate` left in ``folder``.

        Raises:
            FileNotFoundError: there is none, or it is not finished.
            ValueError: a file is damaged.
        """
        folder = Path(folder)
        if not (folder / FILE).exists():
            state = "not finished" if (folder / PART).exists() else "not there"
            raise FileNotFoundError(f"the evaluation in {folder} is {state}; run it with this folder")
        completions = read_completions(folder / FILE)
        try:
            settings = json.loads((folder / RECORD).read_text(encoding="utf-8"))["settings"]
            if len(completions) != settings["problems"] * settings["samples"]:
                raise ValueError(f"{len(completions)} completions can be read")
            return cls.of(completions, settings["samples"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder} holds a damaged evaluation ({error}); delete it to evaluate again") from error

    @property
    def rewards(self) -> np.ndarray:
        """``[problems, samples]`` float64."""
        return np.array([c.reward for c in self.completions], dtype=float).reshape(-1, self.samples)

    @property
    def lenient(self) -> Score | None:
        """The score by the lenient reward; ``None`` where the task has none."""
        rewarded = [replace(c, reward=c.lenient) for c in self.completions if c.lenient is not None]
        return Score.of(rewarded, self.samples) if rewarded else None

    @property
    def formatted(self) -> float | None:
        """The share of completions that keep the format; ``None`` where the task has none."""
        values = [c.formatted for c in self.completions if c.formatted is not None]
        return float(np.mean(values)) if values else None

    @property
    def truncated(self) -> float:
        """The share of completions that were cut off at the length limit."""
        return float(np.mean([c.truncated for c in self.completions]))

    @property
    def tokens(self) -> float:
        """The mean length of a completion in tokens."""
        return float(np.mean([c.tokens for c in self.completions]))

    def pass_at(self, k: int) -> float:
        """The chance that one of ``k`` samples earns a reward above 0, without bias (Chen et al., arXiv 2107.03374).

        Raises:
            ValueError: ``k`` is below 1, or above the samples that there are.
        """
        if not 1 <= k <= self.samples:
            raise ValueError(f"pass@{k} needs at least {max(k, 1)} samples per problem; there are {self.samples}")
        right = np.array([c.reward > 0 for c in self.completions]).reshape(self.n, self.samples).sum(axis=1)
        return float(np.mean([1 - comb(self.samples - int(c), k) / comb(self.samples, k) for c in right]))

    def bootstrap(self, seed: int = 0) -> tuple[float, float]:
        """The 95 % interval of the accuracy from resampled problems; the score's own where all have the same mean."""
        means = self.rewards.mean(axis=1)
        return (self.low, self.high) if np.ptp(means) == 0 else bootstrap_interval(means, seed)

    def summary(self) -> dict[str, float | int]:
        """What a record keeps: accuracy, low, high, n, samples."""
        return {key: getattr(self, key) for key in ("accuracy", "low", "high", "n", "samples")}

    def details(self) -> dict[str, float | int]:
        """The :meth:`summary`, ``truncated`` and ``tokens``, and what there is of ``formatted`` and ``lenient``.

        The interval of ``lenient`` is ``lenient_low`` to ``lenient_high``.
        """
        found = self.summary() | {"truncated": self.truncated, "tokens": self.tokens}
        if self.formatted is not None:
            found["formatted"] = self.formatted
        if (lenient := self.lenient) is not None:
            found |= {"lenient": lenient.accuracy, "lenient_low": lenient.low, "lenient_high": lenient.high}
        return found

    def __str__(self) -> str:
        return f"{self.accuracy:.1%} [{self.low:.1%}, {self.high:.1%}], n = {self.n}"


def interval(rewards: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean of rewards, ``[problems, samples]`` float.

    Of rewards from 0 to 1, Wilson's interval at the effective number of observations (Dean and Pagano, "Evaluating
    confidence interval methods for binomial proportions in clustered surveys", 2015): as many independent observations
    as would have the variance found between problems, at least the problems and at most the completions. It never
    leaves 0..1 and has a width even where all are right. Of others, Student's interval over the problems' means.

    >>> low, high = interval(np.array([[1.0], [1.0], [1.0], [0.0]]))
    >>> f"{low:.3f} {high:.3f}"
    '0.301 0.954'
    """
    n, samples = rewards.shape
    means = rewards.mean(axis=1)
    p, variance = float(means.mean()), float(means.var(ddof=1)) / n if n > 1 else 0.0
    if rewards.min() < 0 or rewards.max() > 1:
        from scipy import stats  # takes a second to import, which import tinylora_lite should not

        half = float(stats.t.ppf(0.975, n - 1)) * math.sqrt(variance) if n > 1 else math.inf
        return p - half, p + half
    effective = n if samples == 1 or variance == 0 else min(max(n, p * (1 - p) / variance), n * samples)
    centre = (p + Z**2 / (2 * effective)) / (1 + Z**2 / effective)
    half = Z / (1 + Z**2 / effective) * math.sqrt(p * (1 - p) / effective + Z**2 / (4 * effective**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean of independent values, ``[problems]`` float, of which at least two differ.

    The bias-corrected and accelerated bootstrap (Efron, "Better bootstrap confidence intervals", 1987), from 9,999
    resamples.
    """
    from scipy import stats

    batch = max(1, 4_000_000 // len(values))  # 32 MB at a time, whatever the number of problems
    found = stats.bootstrap((values,), np.mean, batch=batch, method="BCa", random_state=np.random.default_rng(seed))
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def paired_interval(better: float, worse: float, n: int) -> tuple[float, float]:
    """The 95 % interval of the difference between two accuracies on the same ``n`` problems, answered once each.

    Tango's score interval ("Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design", Statistics in Medicine 17, 1998): all differences that the score test does not reject. It
    keeps its coverage where few problems disagree, never leaves -1..1, and has a width even where none does.

    Args:
        better: problems that only the second system solves.
        worse: problems that only the first solves.
        n: problems in all.

    >>> low, high = paired_interval(9, 3, 32)  # section 6 of the paper
    >>> f"{low:.3f} {high:.3f}"
    '-0.027 0.390'
    """
    from scipy.optimize import brentq

    estimate = (better - worse) / n

    def unlike(difference: float, z: float) -> float:
        # The most likely chance of "worse" where the true difference is this one: the root of a quadratic.
        linear = -better - worse + (2 * n - better + worse) * difference
        constant = -worse * difference * (1 - difference)
        q = (math.sqrt(max(linear**2 - 8 * n * constant, 0.0)) - linear) / (4 * n)
        variance = n * max(2 * q + difference * (1 - difference), 0.0)
        return better - worse - n * difference - z * math.sqrt(variance)

    def bound(end: float, z: float) -> float:
        inner = estimate + 1e-12 * (end - estimate)  # at the estimate the variance may be 0
        if unlike(inner, z) * unlike(end, z) > 0:
            return end
        return float(brentq(unlike, inner, end, (z,), xtol=1e-12))

    return bound(-1.0, Z), bound(1.0, -Z)


def judge(task: Task, truncated: str, example: Example, text: str, tokens: int, cut: bool) -> Completion:
    """A completion with its rewards; ``truncated`` as in :func:`evaluate`."""
    worthless = cut and truncated == "zero"
    reward = 0.0 if worthless else task.score(text, example.gold)
    lenient = None
    if task.lenient is not None:
        lenient = 0.0 if worthless else replace(task, reward=task.lenient).score(text, example.gold)
    formatted = None if task.formatted is None else bool(task.formatted(text))
    return Completion(example.prompt, example.gold, text, reward, tokens, cut, lenient, formatted)


def read_completions(path: Path) -> list[Completion]:
    """The completions in a file, up to the first line that is damaged or was cut off."""
    found: list[Completion] = []
    for line in path.read_bytes().split(b"\n")[:-1]:  # after the last line break there is nothing, or a cut-off line
        try:
            row = json.loads(line)
            found.append(Completion(**{own.name: row[own.name] for own in fields(Completion)}))
        except (ValueError, KeyError, TypeError):
            break
    return found
