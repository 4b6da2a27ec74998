"""Eliciting or teaching: skills that no pretraining text has, and what learning them costs the old one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

from tinylora_lite import plot
from tinylora_lite.lab.claim import Claim, Estimate, Point, Verdict
from tinylora_lite.lab.claims import rl_parameters as rl
from tinylora_lite.lab.figures import percent
from tinylora_lite.lab.gain import share_of_gain, verdict_between
from tinylora_lite.lab.shapes import all_weights, calibrated_numbers, lora_numbers, lora_xs_numbers, untouched
from tinylora_lite.lab.store import Store

SKILLS = {"longer": "chains of 5 and 6 steps", "doubling": "an unknown operation"}
LOOKS = {
    "13 random": "tinylora",
    "13 calibrated": "calibrated",
    "196 LoRA-XS": "lora_xs",
    "LoRA": "lora",
    "all": "full",
}


def taught(point: Point, skill: str) -> Point:
    """The same numbers trained on a new skill and scored on it; calibrated ones are calibrated on it too."""
    trial = replace(point.trial, task=skill)
    if trial.numbers == "calibrated":
        trial = replace(trial, calibration=f"task={skill}")
    return replace(point, trial=trial, sweep_seeds=1, seeds=3)


SHAPES = {
    "13 random": rl.THIRTEEN,
    "13 calibrated": calibrated_numbers(13),
    "196 LoRA-XS": lora_xs_numbers(2),
    "LoRA": lora_numbers(1),
    "all": all_weights(),
}
POINTS = {skill: {name: taught(point, skill) for name, point in SHAPES.items()} for skill in SKILLS}
BASES = {skill: untouched(task=skill) for skill in SKILLS}


def kept(point: Point, store: Store) -> Estimate | None:
    """The accuracy on the old task after training on a new one."""
    values = [record["scores"]["old skill"]["accuracy"] for record in point.records(store)]
    return Estimate.of(values) if len(values) > 1 else None


@plot.style()
def draw(store: Store) -> Figure:
    """New skill against old: right is learned, high is not forgotten; every seed a dot, the mean a large marker."""
    drawn = Figure(figsize=(plot.WIDTH, 3.6))
    panels = drawn.subplots(1, len(SKILLS), sharey=True)
    for axes, (skill, title) in zip(panels, SKILLS.items(), strict=True):
        for name, point in POINTS[skill].items():
            look, records = plot.METHODS[LOOKS[name]], point.records(store)
            x = [record["scores"]["sampled"]["accuracy"] for record in records]
            y = [record["scores"]["old skill"]["accuracy"] for record in records]
            axes.plot(x, y, ".", color=look.colour, ms=5, alpha=0.6)
            if records:
                axes.plot(np.mean(x), np.mean(y), look.marker, color=look.colour, ms=9, mec="white", label=name)
        start, old = BASES[skill].estimate(store), rl.BASE.estimate(store)
        if start is not None and old is not None:
            axes.plot(start.mean, old.mean, "+", color=plot.INK, ms=10, mew=2, label="base")
        axes.set(title=title, xlabel="accuracy on the new skill")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    percent(panels[0], "accuracy on the old task")
    drawn.legend(*panels[-1].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return drawn


def judge(store: Store) -> Verdict:
    """The share of all weights' gain by 13 calibrated numbers, on the old task and on each new skill."""
    old = share_of_gain(rl.CALIBRATED[-1], rl.FULL, rl.BASE, store)
    parts, new = [f"13 calibrated numbers recover {old.as_percent()} of all weights' gain on what the base can do"], []
    for skill, title in SKILLS.items():
        points = POINTS[skill]
        start, full = BASES[skill].estimate(store), points["all"].estimate(store)
        assert start is not None
        assert full is not None
        new.append(share_of_gain(points["13 calibrated"], points["all"], BASES[skill], store))
        cost = [
            f"{name} {estimate.as_percent()}"
            for name, point in points.items()
            if (estimate := kept(point, store)) is not None
        ]
        parts.append(
            f"on {title}, from {start.as_percent()} to {full.as_percent()} by all weights, {new[-1].as_percent()}; "
            f"the old task then: {', '.join(cost)}"
        )
    findings = {verdict_between(old, share) for share in new}
    return Verdict("; ".join(parts) + ".", findings.pop() if len(findings) == 1 else "undecided")


CLAIM = Claim(
    name="teaching",
    order=16,
    title="Few numbers elicit what a model knows and cannot teach it what it does not.",
    paper="Conjectured: the knowledge may already be there, and only the style of the answer changes.",
    where="section 7",
    points=(
        rl.BASE,
        rl.FULL,
        rl.CALIBRATED[-1],
        *BASES.values(),
        *(point for points in POINTS.values() for point in points.values()),
    ),
    draw=draw,
    judge=judge,
)
