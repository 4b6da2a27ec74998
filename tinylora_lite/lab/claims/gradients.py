"""GRPO beside an evolution strategy, which needs no gradients, on the same few numbers."""

from __future__ import annotations

import numpy as np

from tinylora_lite.lab.claim import Claim, Point, Verdict, flat
from tinylora_lite.lab.claims.rl_parameters import BASE, THIRTEEN
from tinylora_lite.lab.figures import percent
from tinylora_lite.lab.shapes import around, calibrated_numbers, random_numbers
from tinylora_lite.lab.statistics import estimates
from tinylora_lite.lab.store import Record, Store
from tinylora_lite.lab.trial import settings_of
from tinylora_lite.view import plot

SEEDS = 3
GENERATIONS = 60
"""Three times the samples of GRPO's twenty steps: its curve shows what as many bring, and what more do."""


def both_ways(point: Point, sigma: float) -> tuple[Point, Point]:
    """A shape by GRPO, and by CMA-ES with its first sigma swept as learning rates are, both from three seeds."""
    strategy = {"method": "es", "steps": GENERATIONS, "rates": around(sigma), "sweep_seeds": 1}
    return point.varied(point.label, seeds=SEEDS), point.varied(point.label, seeds=SEEDS, **strategy)


SHAPES = {
    "13 calibrated": (calibrated_numbers(13), 0.1, "calibrated"),
    "13 random": (random_numbers(4), 0.05, "tinylora"),
    "4 random": (random_numbers(13), 0.05, "lora"),
}
PAIRS = {label: both_ways(point, sigma) for label, (point, sigma, _) in SHAPES.items()}


def tokens_sampled(record: Record) -> list[float]:
    """After each step, of all completions; a step of GRPO and a generation have equally many."""
    settings = settings_of(THIRTEEN.trial)
    return list(np.cumsum(record["lengths"]) * settings.prompts_per_step * settings.group_size)


def seconds_spent(record: Record) -> list[float]:
    """After each step: a run's share of its population's time, evaluations left out."""
    return list(np.linspace(0, record["training_seconds"], len(record["curve"]) + 1)[1:])


@plot.style()
def draw(store: Store) -> plot.Figure:
    """The reward of a step's samples against tokens sampled and against seconds; thin seeds, thick means."""
    drawn, both = plot.panels(1, 2, 3.9, sharey=True)
    for axes, measure in zip(both, (tokens_sampled, seconds_spent), strict=True):
        for label, pair in PAIRS.items():
            for point, line, how in zip(pair, ("-", ":"), ("GRPO", "ES"), strict=True):
                records, colour = point.records(store), plot.METHODS[SHAPES[label][2]].colour
                for record in records:
                    axes.plot(measure(record), record["curve"], line, color=colour, lw=0.7, alpha=0.4)
                if records:
                    means = [np.mean([m(r) for r in records], axis=0) for m in (measure, lambda r: r["curve"])]
                    axes.plot(*means, line, color=colour, label=f"{how}, {label}")
        estimate = BASE.estimate(store)
        if estimate is not None:
            axes.axhline(estimate.mean, ls="--", lw=1.2, color=plot.INK, label=plot.METHODS["base"].label)
    percent(both[0], "mean reward of the samples")
    both[0].xaxis.set_major_formatter(lambda value, _: plot.human(value) if value else "0")
    both[0].set_xlabel("tokens sampled")
    both[1].set_xlabel("seconds on one core")
    drawn.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return drawn


def judge(store: Store) -> Verdict:
    """Test accuracy by either, with what the strategy spent to get there."""
    parts = []
    for label, pair in PAIRS.items():
        gradients, evolution = estimates(pair, store)
        tokens, seconds = (
            np.mean([f(r)[-1] for r in pair[1].records(store)]) / np.mean([f(r)[-1] for r in pair[0].records(store)])
            for f in (tokens_sampled, seconds_spent)
        )
        parts.append(
            f"{label} numbers: {gradients.as_percent()} by GRPO, {evolution.as_percent()} by CMA-ES on {tokens:.1f} "
            f"times its tokens in {seconds:.1f} times its seconds"
        )
    return Verdict("; ".join(parts) + ".", "not in the paper")


CLAIM = Claim(
    name="gradients",
    order=17,
    title="Can few numbers be trained without gradients?",
    paper="Nothing: every run of the paper follows a gradient.",
    where="left open",
    points=flat(BASE, PAIRS),
    draw=draw,
    judge=judge,
)
