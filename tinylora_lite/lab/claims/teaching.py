"""Eliciting or teaching: skills that no pretraining text has, and what learning them costs the old one."""

from __future__ import annotations

import numpy as np

from tinylora_lite.lab.claim import Claim, Finding, Point, Verdict, flat
from tinylora_lite.lab.claims import rl_parameters as rl
from tinylora_lite.lab.claims import sft_parameters as sft
from tinylora_lite.lab.estimate import Estimate
from tinylora_lite.lab.figures import METHODS, in_percent, percent
from tinylora_lite.lab.shapes import untouched
from tinylora_lite.lab.statistics import difference, share_of_gain, verdict_between, verdict_over
from tinylora_lite.lab.store import Store
from tinylora_lite.view import plot

SKILLS = {"longer": "chains of 5 and 6 steps", "doubling": "an unknown operation"}
SHAPES = {
    "13 random": rl.THIRTEEN,
    "13 calibrated": rl.CALIBRATED[-1],
    "196 LoRA-XS": rl.LORA_XS[1],
    "LoRA": rl.LORA,
    "all": rl.FULL,
}
WAYS = ("rewards", "demonstrations")
"""GRPO, and SFT on worked answers to problems of the new skill, which show it where rewards may never find it."""


def taught(name: str, skill: str, way: str) -> Point:
    """A shape trained on a new skill and scored on it; calibrated numbers are calibrated on it too."""
    calibration = f"task={skill}" if SHAPES[name].trial.numbers == "calibrated" else ""
    by = {"method": "sft", "steps": 60} if way == "demonstrations" else {}
    settings = {"task": skill, "calibration": calibration, "sweep_seeds": 1, "seeds": 3}
    return SHAPES[name].varied(f"{name}, {way}", **settings, **by)


POINTS = {skill: {way: {name: taught(name, skill, way) for name in SHAPES} for way in WAYS} for skill in SKILLS}
BASES = {skill: untouched(task=skill) for skill in SKILLS}
OLD = {"13 calibrated": sft.CALIBRATED["careful"], "all": sft.LADDERS["careful"][-1]}
"""On the old task by its own demonstrations."""


def kept(point: Point, store: Store) -> Estimate | None:
    """The accuracy on the old task after training on a new one."""
    return point.estimate(store, "old skill")


@plot.style()
def draw(store: Store) -> plot.Figure:
    """New skill against old: right is learned, high is not forgotten. Filled by rewards, hollow by demonstrations."""
    drawn, both = plot.panels(1, len(SKILLS), 3.6, sharey=True)
    for axes, (skill, title) in zip(both, SKILLS.items(), strict=True):
        for way, points in POINTS[skill].items():
            for name, point in points.items():
                look = plot.METHODS[METHODS[point.trial.numbers]]
                x, y = point.accuracies(store), point.accuracies(store, "old skill")
                fill = "none" if way == "demonstrations" else look.colour
                axes.plot(x, y, ".", color=look.colour, ms=5, alpha=0.6)
                if x:
                    axes.plot(np.mean(x), np.mean(y), look.marker, mec=look.colour, mfc=fill, ms=9, mew=1.5,
                              ls="none", label=name if way == "rewards" else None)  # fmt: skip
        start, old = BASES[skill].estimate(store), rl.BASE.estimate(store)
        if start is not None and old is not None:
            axes.plot(start.mean, old.mean, "+", color=plot.INK, ms=10, mew=2, ls="none", label="base")
        axes.plot([], [], "o", mec=plot.INK, mfc="none", ls="none", label="hollow: by demonstrations")
        axes.set(title=title, xlabel="accuracy on the new skill")
        axes.xaxis.set_major_formatter(in_percent)
    percent(both[0], "accuracy on the old task")
    drawn.legend(*both[-1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return drawn


def judge(store: Store) -> Verdict:
    """What 13 calibrated numbers and all weights gain on each new skill, beside the share on the old task.

    The claim holds where all weights learn a skill from demonstrations and 13 numbers recover less of that gain than
    of the old task's, by demonstrations too; where all weights learn nothing either, there is no gain to compare.
    """
    by_rewards = share_of_gain(rl.CALIBRATED[-1], rl.FULL, rl.BASE, store)
    old = share_of_gain(OLD["13 calibrated"], OLD["all"], rl.BASE, store)
    parts = [
        f"13 calibrated numbers recover {by_rewards.as_percent()} by rewards and {old.as_percent()} by demonstrations "
        "of all weights' gain on what the base can do"
    ]
    findings: set[Finding] = set()
    for skill, title in SKILLS.items():
        base, gains = BASES[skill], []
        for way, points in POINTS[skill].items():
            few, full = (difference(points[name], base, store) for name in ("13 calibrated", "all"))
            cost = kept(points["all"], store)
            gains.append(
                f"by {way} 13 gain {few.as_points()}, all weights {full.as_points()}"
                + (f" (the old task then {cost.as_percent()})" if cost is not None else "")
            )
        if full.low > 0:
            findings.add(verdict_between(old, share_of_gain(points["13 calibrated"], points["all"], base, store)))
        parts.append(f"on {title}, {'; '.join(gains)}")
    return Verdict("; ".join(parts) + ".", verdict_over(findings))


CLAIM = Claim(
    name="teaching",
    order=16,
    title="Few numbers elicit what a model knows and cannot teach it what it does not.",
    paper="Conjectured: the knowledge may already be there, and only the style of the answer changes.",
    where="section 8",
    points=flat(rl.BASE, rl.FULL, rl.CALIBRATED[-1], OLD, BASES, POINTS),
    draw=draw,
    judge=judge,
)
