"""The score of a model on a task: accuracy, how sure of it we are, and every completion to read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import comb
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinylora_lite.evaluation.intervals import Z, bootstrap_interval
from tinylora_lite.evaluation.log import read_rows
from tinylora_lite.tasks.task import Example, Task


@dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
        prompt, gold: the problem, and its right answer.
        text: what was answered, without special tokens.
        reward: the task's, the strict one where it has two.
        tokens: of the answer, the end token included.
        truncated: whether it was cut off at the length limit.
        lenient: the reward wherever in the text the answer stands; ``None`` where the task has no such reward.
        formatted: whether the text keeps the task's format; ``None`` where the task has none.
    """

    prompt: str
    gold: str
    text: str
    reward: float
    tokens: int
    truncated: bool
    lenient: float | None = None
    formatted: bool | None = None


class Accuracy(NamedTuple):
    """A mean reward and its 95 % interval."""

    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """The mean reward (pass@1, where rewards are 0 or 1) with its 95 % interval.

    Attributes:
        accuracy: the mean reward of all completions.
        low, high: the interval; see :func:`interval`.
        n: problems.
        samples: completions of each problem.
        completions: all of them, those of one problem in consecutive places, problems in the order of the task.
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
            ValueError: the file is damaged.
        """
        rows = read_rows(folder)
        try:
            samples = 1 + max(row["sample"] for row in rows)
            return cls.of([_completion(row) for row in rows], samples)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder} holds a damaged evaluation ({error!r}); delete it to evaluate again") from error

    @property
    def rewards(self) -> np.ndarray:
        """``[problems, samples]`` float64."""
        return np.array([c.reward for c in self.completions], dtype=float).reshape(-1, self.samples)

    @property
    def lenient_rewards(self) -> np.ndarray | None:
        """``[problems, samples]`` float64; ``None`` where the task has no lenient reward."""
        values = [c.lenient for c in self.completions if c.lenient is not None]
        complete = bool(values) and len(values) == len(self.completions)
        return np.array(values, dtype=float).reshape(-1, self.samples) if complete else None

    @property
    def lenient(self) -> Accuracy | None:
        """The mean lenient reward with its interval; ``None`` where the task has no lenient reward."""
        rewards = self.lenient_rewards
        return None if rewards is None else Accuracy(float(rewards.mean()), *interval(rewards))

    @property
    def formatted(self) -> float | None:
        """The share of completions that keep the format; ``None`` where the task has none."""
        return _mean([c.formatted for c in self.completions])

    @property
    def truncated(self) -> float | None:
        """The share of completions that were cut off at the length limit; ``None`` without completions."""
        return _mean([c.truncated for c in self.completions])

    @property
    def tokens(self) -> float | None:
        """The mean length of a completion in tokens; ``None`` without completions."""
        return _mean([c.tokens for c in self.completions])

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
        """The 95 % interval of the accuracy from resampled problems (:mod:`tinylora_lite.evaluation.intervals`).

        Where every problem has the same mean there is nothing to resample, and it is :func:`interval`'s.
        """
        means = self.rewards.mean(axis=1)
        return interval(self.rewards) if np.ptp(means) == 0 else bootstrap_interval(means, seed)

    def summary(self) -> dict[str, float | int]:
        """What a record keeps: accuracy, low, high, n, samples."""
        return {key: getattr(self, key) for key in ("accuracy", "low", "high", "n", "samples")}

    def details(self) -> dict[str, float | int]:
        """The :meth:`summary` and, where they are not ``None``, truncated, tokens, formatted and lenient.

        The interval of ``lenient`` is ``lenient_low`` to ``lenient_high``.
        """
        rates = {key: getattr(self, key) for key in ("truncated", "tokens", "formatted")}
        lenient = self.lenient
        if lenient is not None:
            rates |= {"lenient": lenient.accuracy, "lenient_low": lenient.low, "lenient_high": lenient.high}
        return self.summary() | {key: value for key, value in rates.items() if value is not None}

    def __str__(self) -> str:
        return f"{self.accuracy:.1%} [{self.low:.1%}, {self.high:.1%}], n = {self.n}"


def interval(rewards: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean of rewards from 0 to 1, ``[problems, samples]`` float.

    Wilson's interval at the effective number of observations (Dean and Pagano, "Evaluating confidence interval
    methods for binomial proportions in clustered surveys", 2015): the number of independent observations that would
    have the variance found between problems. It is the number of problems with one sample each, and between that and
    the number of completions with more, since the samples of one problem resemble one another. It never leaves 0..1
    and has a width even where all are right.

    Rewards outside 0..1 get Student's interval over the problems' means, which one problem alone does not have:
    infinite then.

    >>> low, high = interval(np.array([[1.0], [1.0], [1.0], [0.0]]))
    >>> f"{low:.3f} {high:.3f}"
    '0.301 0.954'
    """
    n, samples = rewards.shape
    means = rewards.mean(axis=1)
    p, variance = float(means.mean()), float(means.var(ddof=1)) / n if n > 1 else 0.0
    if rewards.min() < 0 or rewards.max() > 1:
        if n == 1:
            return -math.inf, math.inf
        from scipy import stats  # takes a second to import, which import tinylora_lite should not

        half = float(stats.t.ppf(0.975, n - 1)) * math.sqrt(variance)
        return p - half, p + half
    effective = n if samples == 1 or variance == 0 else min(max(n, p * (1 - p) / variance), n * samples)
    centre = (p + Z**2 / (2 * effective)) / (1 + Z**2 / effective)
    half = Z / (1 + Z**2 / effective) * math.sqrt(p * (1 - p) / effective + Z**2 / (4 * effective**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def judge(task: Task, truncated: str, example: Example, text: str, tokens: int, cut: bool) -> Completion:
    """A completion with its rewards; ``truncated`` as in :func:`evaluate`."""
    worthless = cut and truncated == "zero"
    reward = 0.0 if worthless else task.score(text, example.gold)
    lenient = None
    if task.lenient is not None:
        lenient = 0.0 if worthless else replace(task, reward=task.lenient).score(text, example.gold)
    formatted = None if task.formatted is None else bool(task.formatted(text))
    return Completion(example.prompt, example.gold, text, reward, tokens, cut, lenient, formatted)


def _completion(row: Mapping[str, Any]) -> Completion:
    return Completion(**{name: row[name] for name in (f.name for f in fields(Completion))})


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None
