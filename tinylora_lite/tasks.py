"""What a model is asked, and what an answer is worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Reward = Callable[[str, str], float]
"""``reward(completion, gold) -> float``: the completion's text without special tokens, and the right answer."""


@dataclass(frozen=True)
class Example:
    """One problem: the text the user writes, and the right answer as a string."""

    prompt: str
    gold: str


@dataclass(frozen=True)
class Task:
    """Problems in three splits that share none, and the reward that scores a completion.

    ``train`` is for learning, ``validation`` for choosing (learning rates, bases), ``test`` for the number
    that is reported. ``system`` is the system message of every prompt; ``None`` sends none.
    """

    name: str
    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    reward: Reward = field(repr=False)
    system: str | None = None

    def messages(self, example: Example) -> list[dict[str, str]]:
        """The conversation that a chat template turns into a prompt."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": example.prompt}]
