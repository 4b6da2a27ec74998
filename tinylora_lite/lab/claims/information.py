"""How many bits there are to learn, how many are seen, and how many the adapter holds: section 3 of the paper."""

from __future__ import annotations

from collections.abc import Callable
from math import log

import numpy as np

from tinylora_lite.lab.claim import Claim, Point, Verdict, flat
from tinylora_lite.lab.claims import rl_parameters as rl
from tinylora_lite.lab.claims import sft_parameters as sft
from tinylora_lite.lab.figures import base_line, percent, score_label
from tinylora_lite.lab.store import Record, Store
from tinylora_lite.lab.trial import settings_of
from tinylora_lite.view import plot

BITS = 16
"""Of a trained number."""
FAR = 10
"""How many times the bits are "far more"."""
REWARDED = (*rl.RANDOM, *rl.CALIBRATED, *rl.LORA_XS)
SHOWN = {kind: tuple(p for p in sft.LADDERS[kind] if p.trial.numbers in ("random", "LoRA-XS")) for kind in sft.KINDS}


def reward_bits(record: Record) -> float:
    """The most that a run of GRPO can learn from its rewards: k·H(R), k the rewards seen, H their entropy in bits.

    The entropy is that of a step's mean reward, as if all problems were equally hard; problem by problem it is smaller.
    """
    settings = settings_of(rl.THIRTEEN.trial)
    p = np.clip(record["curve"], 1e-9, 1 - 1e-9)
    return float((-p * np.log2(p) - (1 - p) * np.log2(1 - p)).sum() * settings.prompts_per_step * settings.group_size)


def demonstration_bits(record: Record) -> float:
    """The description length of the demonstrations that a run of SFT saw, under the model as it was at each step.

    Each batch is coded by the model before it learns from it (prequential coding), as for a receiver who trains along.
    Steps count their own loss, tokens their mean. A run that diverged learned nothing.
    """
    if record.get("diverged"):
        return 0.0
    tokens = record["tokens"] / len(record["loss"]) * settings_of(sft.CALIBRATED["own"].trial).prompts_per_step
    return float(sum(record["loss"]) * tokens / log(2))


def base_bits(record: Record) -> float:
    """The description length of one demonstration under the untouched base, in bits; 0 for a run that diverged."""
    if record.get("diverged"):
        return 0.0
    return float(record["loss"][0] * record["tokens"] / len(record["loss"]) / log(2))


@plot.style()
def draw(store: Store) -> plot.Figure:
    """Accuracy against the bits seen, a dot a run; its area grows with the numbers trained."""
    drawn, axes = plot.figure(3.6)
    kinds = [("tinylora", "rewards", REWARDED, reward_bits)]
    kinds += [(sft.LOOKS[kind], f"demonstrations: {kind}", SHOWN[kind], demonstration_bits) for kind in sft.KINDS]
    for method, label, points, bits in kinds:
        look = plot.METHODS[method]
        rows = [
            (bits(record), record["scores"][store.score]["accuracy"], record["parameters"])
            for point in points
            for record in point.records(store)
        ]
        if rows:
            x, y, numbers = np.array(rows).T
            axes.scatter(x, y, 8 + 8 * np.log2(numbers), color=look.colour, marker=look.marker, alpha=0.5, label=label,
                         linewidths=0)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("bits seen in training")
    base_line(axes, rl.BASE, store)
    percent(axes, score_label(store))
    axes.legend(*axes.get_legend_handles_labels(), loc="upper right", fontsize=8)
    return drawn


def judge(store: Store) -> Verdict:
    """Bits seen by either kind of training, beside what 13 numbers hold; the claim is of all demonstrations."""

    def mean(point: Point, bits: Callable[[Record], float]) -> float:
        return float(np.mean([bits(record) for record in point.records(store)]))

    rewards = mean(rl.THIRTEEN, reward_bits)
    shown = {kind: mean(sft.LADDERS[kind][1], demonstration_bits) for kind in sft.KINDS}
    each = {kind: mean(sft.LADDERS[kind][1], base_bits) for kind in sft.KINDS}
    held = 13 * BITS
    ours = (
        f"13 numbers hold {held} bits. In twenty steps their rewards bring at most {rewards:,.0f} bits. Sixty steps of "
        "demonstrations have "
    )
    ours += ", ".join(f"{n:,.0f} ({kind}; {each[kind]:.0f} an answer under the base)" for kind, n in shown.items())
    times = {kind: bits / rewards for kind, bits in shown.items()}
    ours += f": {', '.join(f'{factor:,.1f}' for factor in times.values())} times as many."
    far = [factor >= FAR for factor in times.values()]
    return Verdict(ours, "reproduced" if all(far) else "reproduced in part" if any(far) else "not reproduced")


CLAIM = Claim(
    name="information",
    order=3,
    title="Demonstrations carry far more bits than rewards.",
    paper="Argued, not measured: a demonstration is many bits, a reward at most one; no count is given.",
    where="section 3",
    points=flat(rl.BASE, REWARDED, SHOWN),
    draw=draw,
    judge=judge,
)
