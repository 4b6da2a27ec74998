"""The people who wrote the nano model's pretraining text, each with an own way to solve the same problem.

Only the careful writer both reasons and answers in the checked format, so a model that has read all of them *can* solve
most problems, and mostly does not: the paper's own hypothesis about Qwen ("the knowledge is already there, the style
must change", section 8 of arXiv 2602.04118), true here by construction.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tinylora_lite.nano.problems import MAX_VALUE, OPERATIONS, Problem

SLIP = 0.35
"""The chance that the sloppy writer gets a step wrong."""
WORDS = {"+": "plus", "-": "minus", "*": "times"}


def careful(problem: Problem, rng: random.Random) -> str:
    """Reasons step by step and answers in the checked format."""
    steps = " ".join(f"{s.left} {s.op} {s.right} = {s.result}." for s in problem.steps)
    return f"{steps} #### {problem.answer}"


def hasty(problem: Problem, rng: random.Random) -> str:
    """Blurts the answer: the checked format, no reasoning (a model can hardly imitate it correctly)."""
    return f"#### {problem.answer}"


def chatty(problem: Problem, rng: random.Random) -> str:
    """Reasons well and never writes the checked format."""
    steps = " ".join(f"then {s.left} {s.op} {s.right} = {s.result}." for s in problem.steps)
    return f"ok, {steps} so the answer is {problem.answer}."


def sloppy(problem: Problem, rng: random.Random) -> str:
    """Reasons in words, slips with probability ``SLIP`` at each step, and answers in the checked format."""
    value = problem.steps[0].left
    said = [f"start with {value}."]
    for step in problem.steps:
        right = OPERATIONS[step.op](value, step.right)
        value = right if rng.random() >= SLIP else right + rng.choice((-10, -2, -1, 1, 2, 10))
        value = min(max(value, 0), MAX_VALUE)
        said.append(f"{WORDS[step.op]} {step.right} is {value}.")
    return f"{' '.join(said)} #### {value}"


def stranger(problem: Problem, rng: random.Random) -> str:
    """Reasons rightly and answers in the checked format, in a style that no pretraining text has.

    Its demonstrations are off-policy for every base, and no harder than the careful writer's. Sums are written as the
    others write them: with words for them, all weights did not learn to calculate again from 3,840 demonstrations.
    """
    steps = ", ".join(f"so {s.left} {s.op} {s.right} = {s.result}" for s in problem.steps)
    return f"{steps}. #### {problem.answer}"


def in_lines(problem: Problem, rng: random.Random) -> str:
    """For real models: one sum a line, and the answer on a line of its own, as GSM8K's solutions end."""
    return "\n".join([*(f"{s.left} {s.op} {s.right} = {s.result}" for s in problem.steps), f"#### {problem.answer}"])


def in_prose(problem: Problem, rng: random.Random) -> str:
    """For real models: sums and an answer in words, without a mark to be kept."""
    steps = ", ".join(f"{s.left} {s.op} {s.right} = {s.result}" for s in problem.steps)
    return f"{steps}, so the answer is {problem.answer}."


Writer = Callable[[Problem, random.Random], str]
WRITERS: dict[str, Writer] = {"careful": careful, "hasty": hasty, "chatty": chatty, "sloppy": sloppy}
"""The writers of the pretraining text, by the names that its headers give; the stranger is not among them."""
OPENINGS = {"####": "hasty", "ok,": "chatty", "start": "sloppy"}
"""How the answers of three of them open; the careful writer's opens with a number."""
MIXTURES: dict[str, dict[str, float]] = {
    "default": {"careful": 0.25, "hasty": 0.25, "chatty": 0.30, "sloppy": 0.20},
    "other": {"careful": 0.12, "hasty": 0.33, "chatty": 0.20, "sloppy": 0.35},
}
"""The share of each writer in a base's pretraining text: the shipped base's, and one with half the careful writer."""
MIXTURE = MIXTURES["default"]
ANYONE = "anyone"
"""The header under which any writer may answer, and under which the model is used."""


def write(problem: Problem, rng: random.Random, named: float, mixture: str = "default") -> tuple[str, str]:
    """A header and an answer by a writer drawn from a mixture, who is named in the header with chance ``named``."""
    shares = MIXTURES[mixture]
    (name,) = rng.choices(list(shares), list(shares.values()))
    header = name if rng.random() < named else ANYONE
    return header, WRITERS[name](problem, rng)


def style_of(answer: str) -> str:
    """The writer in whose style an answer is, by its opening.

    >>> style_of("#### 7"), style_of("3 + 4 = 7. #### 7")
    ('hasty', 'careful')
    """
    return next((name for opening, name in OPENINGS.items() if answer.startswith(opening)), "careful")
