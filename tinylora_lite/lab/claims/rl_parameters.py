"""Accuracy against the number of trained parameters, by GRPO: Figure 1 of the paper."""

from __future__ import annotations

from tinylora_lite.lab import shapes
from tinylora_lite.lab.claim import Claim, Verdict, flat
from tinylora_lite.lab.figures import Series, against_numbers
from tinylora_lite.lab.statistics import share_of_gain, smallest_reaching, verdict_on
from tinylora_lite.lab.store import Store

PAPER_SHARE = 0.71
"""Of full finetuning's gain, by 13 numbers on Qwen2.5-7B: (0.907 - 0.756) / (0.970 - 0.756), Figure 1."""

RANDOM = (*(shapes.random_numbers(n_tie) for n_tie in ("all", 25, 13, 7, 4, 2, 1)), shapes.random_numbers(1, u=2))
LORA_XS = tuple(map(shapes.lora_xs_numbers, (1, 2, 4, 8)))
CALIBRATED = tuple(map(shapes.calibrated_numbers, (1, 2, 4, 8, 13)))
THIRTEEN, FORTY_NINE = RANDOM[4], RANDOM[6]
"""The first as the paper has it. Of 49, one to a module, the draw of P moves the result less."""
LORA, FULL = shapes.lora_numbers(), shapes.all_weights()
FULL_LONG = FULL.varied("all weights, 60 steps", steps=60)
BASE = shapes.untouched()
LADDER = (*RANDOM, *LORA_XS, LORA, FULL)
"""From few numbers to many but for the last of the random shapes, which has more than the first LoRA-XS."""
SERIES = [Series(points) for points in (RANDOM, CALIBRATED, LORA_XS, (LORA,), (FULL,))]
"""A line for each method."""


def judge(store: Store) -> Verdict:
    """Thirteen random numbers against the paper's share of the full gain."""
    share = share_of_gain(THIRTEEN, FULL, BASE, store)
    reached = {s: smallest_reaching(s, LADDER, FULL, BASE, store) for s in (0.9, 0.95, 0.975)}
    smallest = ", ".join(f"{s:.1%}: {label}" for s, label in reached.items())
    ours = f"13 random numbers recover {share.as_percent()} of what all weights gain. The smallest update for "
    return Verdict(f"{ours}{smallest}.", verdict_on(share, PAPER_SHARE, strictly=False))


CLAIM = Claim(
    name="rl-parameters",
    order=1,
    title=f"By reinforcement learning, 13 numbers recover {PAPER_SHARE:.0%} of what full finetuning gains.",
    paper=(
        f"91 % on GSM8K with 13 numbers, {PAPER_SHARE:.0%} of full finetuning's gain; 95 % of it with 120 numbers, "
        "says the text, where the figure has 90 % at 196."
    ),
    where="Figure 1 and sections 1 and 6.1",
    points=flat(BASE, FULL, FULL_LONG, RANDOM, CALIBRATED, LORA_XS, LORA),
    draw=lambda store: against_numbers(SERIES, store, BASE),
    judge=judge,
)
