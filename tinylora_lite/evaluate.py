"""How often a model is right, how sure of that we are, and every completion to read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import comb
from typing import TYPE_CHECKING, Literal

import numpy as np

from tinylora_lite.sampler import check_tokenizer, encode_prompts, sample
from tinylora_lite.seeds import seed_of
from tinylora_lite.tasks import Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Z = 1.959963984540054
"""The normal quantile of a two-sided 95 % interval."""


@dataclass(frozen=True)
class Completion:
    """One answer: to which prompt, the right answer, the text, its reward, its tokens, whether it was cut off."""

    prompt: str
    gold: str
    text: str
    reward: float
    tokens: int
    truncated: bool


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

    def pass_at(self, k: int) -> float:
        """The chance that one of ``k`` samples earns a reward above 0, without bias (Chen et al., arXiv 2107.03374).

        Raises:
            ValueError: ``k`` is below 1, or above the samples that there are.
        """
        if not 1 <= k <= self.samples:
            raise ValueError(f"pass@{k} needs at least {max(k, 1)} samples per problem; there are {self.samples}")
        right = np.array([c.reward > 0 for c in self.completions]).reshape(self.n, self.samples).sum(axis=1)
        return float(np.mean([1 - comb(self.samples - int(c), k) / comb(self.samples, k) for c in right]))

    def summary(self) -> dict[str, float | int]:
        """What a record keeps: accuracy, low, high, n, samples."""
        return {key: getattr(self, key) for key in ("accuracy", "low", "high", "n", "samples")}

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


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    split: str = "test",
    problems: int | None = None,
    samples: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 256,
    seed: int = 0,
    truncated: Literal["zero", "score"] = "zero",
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Scores a model on a split of a task.

    Args:
        model: any causal language model of transformers, adapted or not.
        tokenizer: the model's.
        task: the problems and the reward.
        split: ``"test"``, ``"validation"`` or ``"train"``.
        problems: how many of the split, from its start; ``None`` takes all.
        samples: completions for each problem; with ``temperature=0`` one is enough.
        temperature: of sampling; 0 is greedy.
        max_new_tokens: the length limit.
        batch_size: completions decoded together; another size draws other samples.
        seed: of the sampling.
        truncated: what a completion cut off at the limit is worth: ``"zero"`` reward, or ``"score"``, its text is
            scored like any other.
        progress: called with completions done and completions in all.

    Raises:
        ValueError: the split is empty or unknown, a number is below 1, the tokenizer lacks a pad token, an end token or
            a chat template, or the reward is no finite number.
    """
    check_tokenizer(tokenizer)
    if split not in ("test", "validation", "train"):
        raise ValueError(f"split must be test, validation or train, not {split!r}")
    if min(samples, batch_size, 1 if problems is None else problems) < 1:
        raise ValueError(
            f"problems, samples and batch_size must be at least 1, not {problems}, {samples}, {batch_size}"
        )
    if truncated not in ("zero", "score"):
        raise ValueError(f"truncated must be zero or score, not {truncated!r}")
    examples: Sequence[Example] = getattr(task, split)[:problems]
    if not examples:
        raise ValueError(f"task {task.name} has no {split} problems to evaluate on")
    task.score("", examples[0].gold)  # a reward that fails should do so before an hour of sampling
    queue = [example for example in examples for _ in range(samples)]
    device = next(model.parameters()).device
    completions: list[Completion] = []
    for start in range(0, len(queue), batch_size):
        chunk = queue[start : start + batch_size]
        rollouts = sample(
            model,
            tokenizer,
            *encode_prompts(tokenizer, task, chunk, device),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed_of("evaluate", seed, start),
        )
        rows = zip(chunk, rollouts.texts, rollouts.lengths.tolist(), rollouts.truncated.tolist(), strict=True)
        for example, text, tokens, cut in rows:
            reward = 0.0 if cut and truncated == "zero" else task.score(text, example.gold)
            completions.append(Completion(example.prompt, example.gold, text, reward, tokens, cut))
        if progress:
            progress(len(completions), len(queue))
    rewards = np.array([c.reward for c in completions]).reshape(len(examples), samples)
    return Score(float(rewards.mean()), *interval(rewards), len(examples), samples, tuple(completions))
