"""A task: problems, how they are asked, and the reward of an answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

Reward = Callable[[str, str], float]
"""``reward(completion, gold) -> float``: the completion's text without special tokens, and the right answer."""


@dataclass(frozen=True)
class Example:
    """One problem.

    Attributes:
        prompt: what the user writes, the request for a format included.
        gold: the right answer.
        solution: a completion that imitation learns from (:func:`~tinylora_lite.train_sft`).
    """

    prompt: str
    gold: str
    solution: str | None = None


@dataclass(frozen=True)
class Task:
    """Problems in three disjoint splits, and the reward that scores a completion.

    Attributes:
        name: in records and errors.
        train, validation, test: problems to learn from, to choose settings with, and to report a result on.
        reward: scores a completion; :meth:`score` calls it. Where there is a format to keep, it is the strict one.
        system: the system message of every prompt; ``None`` sends none.
        lenient: the reward that takes the answer from wherever it is; ``None`` where ``reward`` does that.
        formatted: whether a completion keeps the format that ``reward`` asks for; ``None`` where it asks for none.
        shots: worked examples that stand before every problem, as turns of the conversation.
    """

    name: str
    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    reward: Reward = field(repr=False)
    system: str | None = None
    lenient: Reward | None = field(default=None, repr=False)
    formatted: Callable[[str], bool] | None = field(default=None, repr=False)
    shots: Sequence[Example] = ()

    def messages(self, example: Example) -> list[dict[str, str]]:
        """The conversation that a chat template turns into a prompt.

        >>> task = Task("sums", [], [], [], reward=lambda text, gold: float(text == gold), system="Be brief.")
        >>> task.messages(Example("1 + 1?", "2"))
        [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': '1 + 1?'}]
        """
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        turns = [("user", shot.prompt, "assistant", shot.solution or "") for shot in self.shots]
        shown = [{"role": r, "content": c} for user in turns for r, c in (user[:2], user[2:])]
        return [*system, *shown, {"role": "user", "content": example.prompt}]

    def with_shots(self, count: int) -> Task:
        """The task whose prompts show its first ``count`` worked training problems, which are trained on no more.

        Raises ``ValueError`` where fewer of them have a worked answer.
        """
        shots = tuple(example for example in self.train if example.solution is not None)[:count]
        if len(shots) < count:
            raise ValueError(f"task {self.name} has {len(shots)} worked training problems, too few for shots={count}")
        return replace(self, shots=shots, train=tuple(example for example in self.train if example not in shots))

    def check(self, evaluated: bool) -> None:
        """Raises ``ValueError`` where training, with evaluations or without, lacks problems or a finite reward."""
        if not self.train:
            raise ValueError(f"task {self.name} has no training problems")
        if evaluated and not self.validation:
            raise ValueError(f"task {self.name} has no validation problems; set evaluate_every=0")
        self.score("", self.train[0].gold)

    def score(self, completion: str, gold: str) -> float:
        """The reward of a completion; raises ``ValueError`` where the function returned no finite number."""
        worth: object = self.reward(completion, gold)  # whatever its annotation says
        try:
            value = math.nan if isinstance(worth, str) else float(worth)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            what = f"the reward of task {self.name} returned {worth!r} for {completion[:60]!r}"
            raise ValueError(f"{what}; it must return a finite number")
        return value
