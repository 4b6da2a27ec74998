"""The registered runs on a real model: shapes, controls and the primary comparison, in the order they are made."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

from tinylora_lite.lab.claim import Claim, Point, Verdict
from tinylora_lite.lab.estimate import Estimate
from tinylora_lite.lab.figures import side_by_side
from tinylora_lite.lab.store import REAL_RESULTS, Record, Store
from tinylora_lite.lab.trial import LINES, SHOTS, Trial

HELPS, LITTLE = "They help", 0.05
"""The word where both intervals are above zero, and below which gain the text says that they do not help much."""
PROMPTS, STEPS = 16, 20
"""Problems of a step, each with 8 completions, and updates of a run."""
SWEPT = 100
"""The first seed of the sweeps, which no reported run has."""
NORMS = {"random": (0.125, 0.25, 0.5), "LoRA-XS": (1.0, 2.0, 4.0)}
"""Of random v, to be compared with what training ends at. At 1, thirteen random numbers leave no answer right."""
GSM8K = ("gsm8k", "gsm8k, boxed")
"""Under the paper's prompt, and under the one whose format this model keeps."""
STEERING, LOGITS = (0.02, 0.04, 0.08), (0.05, 0.1, 0.2)
"""Learning rates of a steering vector and of biases of logits."""


def diverged(record: Record, untrained: Record) -> bool:
    """Whether a sweep run ended in NaN, or below half of what the untrained model has on the same problems."""
    ours, floor = (found["scores"]["sampled"]["accuracy"] for found in (record, untrained))
    return bool(record.get("diverged")) or ours < floor / 2


class Cautious(Point):
    """A point that takes no learning rate at which, or at the next larger of which, a run of the sweep diverged.

    What the untrained model has is a record of another point: of the sweep of prompts.
    """

    def rate(self, store: Store) -> Any:
        """The best of the rates that are left; the smallest of all where none is."""
        if self.like is not None or not self.rates:
            return super().rate(store)
        rates, best = self.swept(store)
        out = self.excluded(store)
        if best is None or out is None:
            return None
        return max([r for r in rates if r not in out] or rates[:1], key=lambda r: self.sweep_accuracy(r, store) or 0.0)

    def excluded(self, store: Store) -> dict[Any, str] | None:
        """The rates of the sweep that are out, with the reason; ``None`` before the untrained model is scored."""
        untrained, rates = self.floor(store), self.swept(store)[0]
        if untrained is None:
            return None
        ended = [r for r in rates if any(diverged(record, untrained) for record in store.of(self.sweep([r])))]
        below = [rate for rate, above in pairwise(rates) if above in ended]
        return dict.fromkeys(below, "a run diverged at the next rate") | dict.fromkeys(ended, "a run diverged")

    def floor(self, store: Store) -> Record | None:
        """The untrained model on the sweep's problems; ``None`` before it is scored."""
        untrained = Trial(base=self.trial.base, method="none", task=self.trial.task, learning_rate=0.0)
        return store.get(replace(untrained, seed=SWEPT, split="validation"))


def registered(name: str, order: int, base: str, task: str, seeds: int, tie: int, gsm8k: bool = False) -> Claim:
    """The claim of one model, where ``tie`` modules share each of thirteen numbers, with GSM8K or without."""

    def shape(label: str, rates: tuple[float, ...], seeds: int = seeds, **settings: Any) -> Point:
        trial = Trial(base=base, task=task, prompts=PROMPTS, steps=STEPS, **settings)
        return Cautious(label, trial, rates, seeds, sweep_seeds=2, reach=1, sweep_from=SWEPT)

    def beside(point: Point) -> list[Point]:
        """The controls of a shape: other rewards over three rates and its own, and random v over three norms."""
        centre, found = point.rates[1], []
        for what, by in {"rewarded for the format": "format only", "rewarded at random": "unrelated"}.items():
            label, trained_on = f"{point.label}, {what}", f"{task}, {by}"
            found += [
                point.varied(f"{label}, {r:g}", trained_on=trained_on, learning_rate=r, rates=(), seeds=1)
                for r in (centre / 4, centre / 2, centre)
            ]
            found.append(point.varied(f"{label}, its rate", trained_on=trained_on, like=point, seeds=1))
        return found + [
            point.varied(f"{point.label}, noise of norm {n:g}", method="noise", learning_rate=n, rates=(), seeds=2)
            for n in NORMS[point.trial.numbers]
        ]

    calibration = f"problems=128, task={task}"
    untrained = Point("untrained", Trial(base=base, task=task, method="none", learning_rate=0.0), seeds=1)
    thirteen = shape("13 random", (0.0125, 0.025, 0.05), n_tie=tie)
    each = shape("one a module, LoRA-XS", (0.01, 0.02, 0.04), numbers="LoRA-XS", rank=1, sigma="right")
    lora = shape("LoRA, r = 1", (5e-4, 1e-3, 2e-3), numbers="LoRA", rank=1)
    calibrated = shape(
        "13 calibrated", (0.05, 0.1, 0.2), numbers="calibrated", rank=1, u=13, n_tie="all", calibration=calibration
    )
    fork = shape("13 random, the fork's largest step", (), 2, n_tie=tie, learning_rate=0.0045)
    untied = shape("one a module, random", (0.01, 0.02, 0.04), n_tie=1)
    chosen: dict[str, Any] = {"sweep_from": SWEPT, "by": "greedy"}
    asked = (task, *(f"{task}, {kind}" for kind in (*LINES, *SHOTS)))
    best = untrained.varied("untrained, best of five prompts", rates=asked, varies="task", reach=0, **chosen)
    favoured = Trial(base=base, task=task, method="one logit", numbers="logits", prompts=PROMPTS, steps=8)
    logit = Point("one logit", favoured, (0.5, 1.0, 2.0, 4.0), seeds, sweep_seeds=2, reach=1, **chosen)
    searched = thirteen.varied("13 random, best of 20 draws of v", method="search", rates=NORMS["random"])
    points = (
        *(untrained, best, thirteen, each, lora, calibrated),
        *(untrained.varied(f"untrained, temperature {t:g}", temperature=t) for t in (0.3, 0.5, 0.7)),
        logit,
        *beside(thirteen),
        *beside(each),
        *(fork, untied),
        *(untrained.varied(f"untrained, {kind}", task=f"{task}, {kind}") for kind in ("prose", "plain")),
        *(p.varied(f"{p.label}, prose", task=f"{task}, prose", like=p, seeds=3) for p in (thirteen, each)),
        # As many worked answers as GRPO samples, and rates of its own.
        *(p.varied(f"{p.label}, by imitation", method="sft", prompts=8 * PROMPTS, seeds=3) for p in (thirteen, each)),
        searched,
        shape("steering vector", STEERING, numbers="steering vector"),
        shape("a bias of every logit", LOGITS, 2, numbers="logits"),
        *(on_gsm8k(untrained, thirteen, each) if gsm8k else ()),
    )
    drawn = [point for point in points if point.trial.task not in GSM8K]

    def judge(store: Store) -> Verdict:
        word, ours = primary(thirteen, untrained, store)
        most = paired(lora, untrained, store)
        ours += f"; LoRA r = 1 by {most.as_points()}"
        if most.low > 0:
            ours += f"; share {paired(thirteen, untrained, store).mean / most.mean:.0%}"
        # The paper claims nothing of 13 numbers at this size, so a null result speaks against none of its sentences.
        return Verdict(ours + ".", "reproduced" if word == HELPS else "not testable at this size")

    return Claim(
        name=name,
        order=order,
        title=f"Thirteen numbers trained by rewards make {base} more accurate.",
        paper="Qwen2.5-7B on GSM8K: from 76 to 91 %; models of 0.5B gain little or nothing below 1,000 numbers.",
        where="section 6.2 and Figure 6",
        points=points,
        draw=lambda store: side_by_side(
            [point for point in drawn if point.records(store)], store.scored("greedy", "lenient"), untrained
        ),
        judge=judge,
        folder=REAL_RESULTS,
    )


def on_gsm8k(untrained: Point, thirteen: Point, each: Point) -> list[Point]:
    """GSM8K: the untrained model, what word problems taught, and thirteen numbers that were trained on it."""
    carried = [
        point.varied(f"{point.label}, {asked}", task=asked, trained_on=point.trial.task, like=point)
        for asked in GSM8K
        for point in (thirteen, each)
    ]
    trained = thirteen.varied(f"13 random, trained on {GSM8K[1]}", task=GSM8K[1], like=thirteen, seeds=1)
    return [
        *(untrained.varied(f"untrained, {asked}", task=asked) for asked in GSM8K),
        *carried,
        replace(trained, trial=replace(trained.trial, steps=30, prompts=8)),
    ]


def primary(thirteen: Point, untrained: Point, store: Store) -> tuple[str, str]:
    """The word of the primary comparison, and the comparison in words, with both of its intervals."""
    gain, sums = paired(thirteen, untrained, store), over_sums(thirteen, untrained, store)
    low, high = min(gain.low, sums.low), max(gain.high, sums.high)
    word = HELPS if low > 0 else "They harm" if high < 0 else "Undecided"
    much = ", and not by much within this budget" if word == "Undecided" and high < LITTLE else ""
    over = f"13 random over untrained by {gain.as_points()} over draws of P, {sums.as_points()} over sums"
    return word, f"{word}{much}: {over}"


def paired(point: Point, base: Point, store: Store) -> Estimate:
    """The difference of greedy accuracy, read leniently, on the same problems: Student's interval over draws of P."""
    store = store.scored("greedy", "lenient")
    (floor,) = base.accuracies(store)
    return Estimate.of_differences([accuracy - floor for accuracy in point.accuracies(store)])


def operators(text: str) -> list[str]:
    r"""The operators of an answer in their order, those after ``####`` left out.

    >>> operators("24 x 2 = 48 shells\n48 - 3 = 45\n#### 45")
    ['*', '-']
    """
    found = re.findall(r"(?<=\s)[-+*/x\u00d7÷](?=\s)", text.partition("####")[0])
    return ["*" if sign in "x\u00d7" else sign for sign in found]


def choice_and_sum(point: Point, store: Store) -> tuple[float, float]:
    """Of greedy answers, the share with the worked answer's operators, and of these the share that is right, leniently.

    Over all draws together. Raises ``OSError`` where no answers were kept.
    """
    from tinylora_lite.lab.tasks import task_of

    problems = task_of(point.trial.task, point.trial.base).test
    chosen: list[int] = []
    trials = [trial for trial in point.tests(point.rate(store)) if trial in store]
    for kept in (store.answers(trial)["greedy"] for trial in trials):
        answers = zip(problems, kept["texts"], kept["lenient"], strict=True)
        chosen += [int(earned) for p, text, earned in answers if operators(text) == operators(p.solution or "")]
    return len(chosen) / (len(trials) * len(problems)), sum(chosen) / max(1, len(chosen))


def over_sums(point: Point, base: Point, store: Store) -> Estimate:
    """The same difference, with its interval over the sums that the test problems ask for.

    Problems of one sum are answered alike, so they are no independent tests: the error is the cluster-robust one
    (Liang and Zeger, 1986, with G / (G - 1)), and Student's t has G - 1 degrees of freedom for G sums. A run that
    diverged counts as wrong throughout. Raises ``OSError`` where no answers were kept.
    """
    import numpy as np
    from scipy import stats

    from tinylora_lite.lab.tasks import task_of  # here, as it imports torch

    problems = task_of(point.trial.task, point.trial.base).test

    def right(of: Point) -> np.ndarray:
        """The mean over draws for each problem, ``[problems]`` float64."""
        trials = [trial for trial in of.tests(of.rate(store)) if trial in store]
        wrong = "0" * len(problems)
        earned = [wrong if store[t].get("diverged") else store.answers(t)["greedy"]["lenient"] for t in trials]
        means: np.ndarray = np.array([list(map(int, digits)) for digits in earned], dtype=float).mean(axis=0)
        return means

    change = right(point) - right(base)
    sums = np.unique([problem.solution or problem.prompt for problem in problems], return_inverse=True)[1]
    mean, G = float(change.mean()), int(sums.max()) + 1
    apart = np.bincount(sums, weights=change - mean)
    error = float(np.sqrt(G / (G - 1) * (apart**2).sum())) / len(change)
    half = float(stats.t.ppf(0.975, G - 1)) * error
    return Estimate(mean, mean - half, mean + half, tuple(change.tolist()))
