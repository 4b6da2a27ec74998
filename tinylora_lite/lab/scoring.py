"""How a run of the lab is scored, and what its record keeps of the answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tinylora_lite import nano
from tinylora_lite.lab.tasks import task_of
from tinylora_lite.lab.trial import REAL, Trial, tokens_of
from tinylora_lite.nano.writers import style_of

if TYPE_CHECKING:
    from tinylora_lite.evaluation.score import Score
    from tinylora_lite.lab.store import Record

SWEEP_PROBLEMS = 500
"""Validation problems that a learning rate is chosen on."""
BATCH = 128
"""Answers of a real base that are decoded together."""
NEW_SKILLS = ("longer", "doubling")
"""Tasks that a base has not learned in pretraining."""


def scorings(trial: Trial) -> list[tuple[str, dict[str, Any]]]:
    """How a trained model is scored: sampled and greedy on the test split, sampled on a part of the validation split.

    What was trained on a new skill is scored on the plain task too, to see what it forgot. Long answers are
    greedy alone.
    """
    options: dict[str, Any] = {"split": trial.split, "max_new_tokens": tokens_of(trial.task), "seed": trial.seed}
    if trial.base in REAL:  # trials are compared problem by problem, with the same random numbers
        options |= {"seed": 0, "batch_size": BATCH}
    greedy = options | {"task": task_of(trial.task, trial.base), "temperature": 0.0}
    sampled = greedy | {"temperature": trial.temperature} | ({"samples": trial.samples} if trial.samples > 1 else {})
    if trial.split == "validation":
        found = [("sampled", sampled | {"problems": SWEEP_PROBLEMS})]
        # What trains nothing is chosen by greedy answers, which cost little beside a run.
        chosen = ("greedy", greedy | {"problems": SWEEP_PROBLEMS})
        return [*found, chosen] if trial.method in ("none", "one logit") else found
    if tokens_of(trial.task) > nano.MAX_NEW_TOKENS:  # hours of a core for each decoding
        return [("greedy", greedy)]
    old = [("old skill", options | {"task": task_of("nano", trial.base)})] if trial.task in NEW_SKILLS else []
    return [("sampled", sampled), ("greedy", greedy), *old]


def answers(score: Score) -> Record:
    """All answers, to read and to compare: texts, and for each reward a string with a digit for every answer."""
    found: Record = {"texts": [c.text for c in score.completions]}
    found["strict"] = "".join(f"{c.reward:.0f}" for c in score.completions)
    if score.lenient is not None:
        found["lenient"] = "".join(f"{c.lenient:.0f}" for c in score.completions)
    return found


def styles(score: Score) -> Record:
    """What several answers to a problem tell: pass@k, and the share and the accuracy of each writer's style."""
    rewards: dict[str, list[float]] = {}
    for completion in score.completions:
        rewards.setdefault(style_of(completion.text), []).append(completion.reward)
    return {
        "pass_at": {str(k): score.pass_at(k) for k in (1, 2, 4, 8) if k <= score.samples},
        "writers": {
            writer: {"share": len(own) / len(score.completions), "accuracy": sum(own) / len(own)}
            for writer, own in sorted(rewards.items())
        },
    }
