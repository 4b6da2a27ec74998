"""How often a model is right, how sure of that we are, and every completion to read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import comb
from typing import TYPE_CHECKING

import numpy as np

from tinylora_lite.sampler import check_tokenizer, encode_prompts, sample
from tinylora_lite.tasks import Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    """pass@1 with its 95 % interval.

    ``n`` problems, ``samples`` completions each. With one sample per problem the interval is Wilson's; with
    more it is Student's over the problems' means, which are independent as the samples of one problem are not.
    """

    accuracy: float
    low: float
    high: float
    n: int
    samples: int
    completions: tuple[Completion, ...] = field(repr=False)

    def pass_at(self, k: int) -> float:
        """The chance that one of ``k`` samples is right, without bias (Chen et al., arXiv 2107.03374)."""
        if not 1 <= k <= self.samples:
            raise ValueError(
                f"pass@{k} needs at least {k} samples per problem; there are {self.samples}"
            )
        right = (
            np.array([c.reward > 0 for c in self.completions])
            .reshape(self.n, self.samples)
            .sum(axis=1)
        )
        return float(
            np.mean([1 - comb(self.samples - int(c), k) / comb(self.samples, k) for c in right])
        )

    def summary(self) -> dict[str, float | int]:
        """What a record keeps: accuracy, low, high, n, samples."""
        return {key: getattr(self, key) for key in ("accuracy", "low", "high", "n", "samples")}

    def __str__(self) -> str:
        return f"{self.accuracy:.1%} [{self.low:.1%}, {self.high:.1%}], n = {self.n}"


def interval(rewards: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean reward of ``[problems, samples]`` (see :class:`Score`)."""
    from scipy import stats  # takes a second to import, which import tinylora_lite should not

    if rewards.shape[1] == 1 and np.isin(rewards, (0.0, 1.0)).all():
        found = stats.binomtest(int(rewards.sum()), rewards.size).proportion_ci(
            0.95, method="wilson"
        )
        return float(found.low), float(found.high)
    means = rewards.mean(axis=1)
    if len(means) < 2 or np.ptp(means) == 0:
        return float(rewards.min()), float(rewards.max())
    low, high = stats.t.interval(0.95, len(means) - 1, loc=means.mean(), scale=stats.sem(means))
    return max(float(low), 0.0), min(float(high), 1.0)


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
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Scores a model on a split of a task.

    Args:
        model, tokenizer: any causal language model of transformers, adapted or not.
        task: the problems and the reward.
        split: ``"test"``, ``"validation"`` or ``"train"``.
        problems: how many of the split, from its start; ``None`` takes all.
        samples: completions for each problem; with ``temperature=0`` one is enough.
        temperature: of sampling; 0 is greedy.
        max_new_tokens: the length limit. A completion that reaches it scores 0.
        batch_size: completions decoded together.
        seed: of the sampling.
        progress: called with completions done and completions in all.

    Raises:
        ValueError: the split is empty, or the tokenizer lacks a pad token, an end token or a chat template.
    """
    check_tokenizer(tokenizer)
    examples: Sequence[Example] = getattr(task, split)[:problems]
    if not examples:
        raise ValueError(f"task {task.name} has no {split} problems to evaluate on")
    queue = [example for example in examples for _ in range(samples)]
    device = next(model.parameters()).device
    completions: list[Completion] = []
    for start in range(0, len(queue), batch_size):
        chunk = queue[start : start + batch_size]
        ids, mask = encode_prompts(tokenizer, task, chunk, device)
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        rollouts = sample(model, tokenizer, ids, mask, **options, seed=seed * 1_000_003 + start)
        for row, (example, text) in enumerate(zip(chunk, rollouts.texts, strict=True)):
            cut = bool(rollouts.truncated[row])
            reward = 0.0 if cut else float(task.reward(text, example.gold))
            completions.append(
                Completion(
                    example.prompt, example.gold, text, reward, int(rollouts.lengths[row]), cut
                )
            )
        if progress:
            progress(len(completions), len(queue))
    rewards = np.array([c.reward for c in completions]).reshape(len(examples), samples)
    low, high = interval(rewards)
    return Score(float(rewards.mean()), low, high, len(examples), samples, tuple(completions))
