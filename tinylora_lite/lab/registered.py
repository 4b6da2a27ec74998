"""The registered runs on a real model: shapes, controls and the primary comparison, in the order they are made."""

from __future__ import annotations

from typing import Any

from tinylora_lite.lab.claim import Claim, Point, Verdict
from tinylora_lite.lab.estimate import Estimate
from tinylora_lite.lab.figures import side_by_side
from tinylora_lite.lab.store import REAL_RESULTS, Record, Store
from tinylora_lite.lab.trial import Trial

PROMPTS, STEPS = 16, 20
"""Problems of a step, each with 8 completions, and updates of a run."""
SWEPT = 100
"""The first seed of the sweeps, which no reported run has."""
NORMS = {"random": (0.125, 0.25, 0.5), "LoRA-XS": (1.0, 2.0, 4.0)}
"""Of random v, to be compared with what training ends at. At 1, thirteen random numbers leave no answer right."""


def diverged(record: Record) -> bool:
    """Whether a sweep run ended in NaN, or below half of what the untrained model earned in its first step."""
    return bool(record.get("diverged")) or record["scores"]["sampled"]["accuracy"] < record["curve"][0] / 2


class Cautious(Point):
    """A point that takes no learning rate at which, or at the next larger of which, a run of the sweep diverged."""

    def rate(self, store: Store) -> float | None:
        """The best of the rates that are left; the smallest of all where none is."""
        if self.like is not None or not self.rates:
            return super().rate(store)
        rates, best = self.swept(store)
        if best is None:
            return None
        ended = [any(map(diverged, store.of(self.sweep([rate])))) for rate in rates]
        safe = [r for r, own, above in zip(rates, ended, [*ended[1:], False], strict=True) if not own and not above]
        return max(safe or rates[:1], key=lambda rate: self.sweep_accuracy(rate, store) or 0.0)


def registered(name: str, order: int, base: str, task: str, seeds: int, tie: int) -> Claim:
    """The claim of one model; ``tie`` modules share each of thirteen numbers."""

    def shape(label: str, rates: tuple[float, ...], seeds: int = seeds, **settings: Any) -> Point:
        trial = Trial(base=base, task=task, prompts=PROMPTS, steps=STEPS, **settings)
        return Cautious(label, trial, rates, seeds, sweep_seeds=2, reach=1, sweep_from=SWEPT)

    def beside(point: Point) -> list[Point]:
        """The controls of a shape: other rewards over three rates, and random v over three norms."""
        centre = point.rates[1]
        rewards = {"rewarded for the format": "format only", "rewarded at random": "unrelated"}
        found = [
            point.varied(
                f"{point.label}, {what}, {r:g}", trained_on=f"{task}, {by}", learning_rate=r, rates=(), seeds=1
            )
            for what, by in rewards.items()
            for r in (centre / 4, centre / 2, centre)
        ]
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
    points = (
        *(untrained, thirteen, each, lora, calibrated),
        *beside(thirteen),
        *beside(each),
        *(fork, untied),
        *(untrained.varied(f"untrained, {kind}", task=f"{task}, {kind}") for kind in ("prose", "plain")),
        *(p.varied(f"{p.label}, prose", task=f"{task}, prose", like=p, seeds=3) for p in (thirteen, each)),
        *(p.varied(f"{p.label}, by imitation", method="sft", like=p, seeds=3) for p in (thirteen, each)),
    )

    def judge(store: Store) -> Verdict:
        gain = paired(thirteen, untrained, store)
        most = paired(lora, untrained, store)
        ours = f"13 random over untrained by {gain.as_points()}; LoRA r = 1 by {most.as_points()}"
        if most.low > 0:
            ours += f"; share {gain.mean / most.mean:.0%}"
        # The paper claims nothing of 13 numbers at this size, so a null result speaks against none of its sentences.
        return Verdict(ours + ".", "reproduced" if gain.low > 0 else "not testable at this size")

    return Claim(
        name=name,
        order=order,
        title=f"Thirteen numbers trained by rewards make {base} more accurate.",
        paper="Qwen2.5-7B on GSM8K: from 76 to 91 %; models of 0.5B gain little or nothing below 1,000 numbers.",
        where="section 6.2 and Figure 6",
        points=points,
        draw=lambda store: side_by_side(points, store.scored("greedy"), untrained),
        judge=judge,
        folder=REAL_RESULTS,
    )


def paired(point: Point, base: Point, store: Store) -> Estimate:
    """The difference of greedy accuracy, read leniently, on the same problems: Student's interval over draws of P."""
    (floor,) = (record["scores"]["greedy"]["lenient"] for record in base.records(store))
    return Estimate.of_differences([r["scores"]["greedy"]["lenient"] - floor for r in point.records(store)])
