"""The same by SFT, on demonstrations of three kinds: Figure 2 of the paper, and what its section 9 leaves open."""

from __future__ import annotations

from tinylora_lite.lab.claim import Claim, Verdict, flat
from tinylora_lite.lab.claims import rl_parameters as rl
from tinylora_lite.lab.figures import Series, against_numbers
from tinylora_lite.lab.shapes import by_imitation
from tinylora_lite.lab.statistics import share_of_gain, times_fewer, verdict_on
from tinylora_lite.lab.store import Store

KINDS = {
    "stranger": "an unseen writer's (off-policy)",
    "careful": "the careful writer's",
    "own": "the base's own, rewarded",
}
SHAPES = (rl.RANDOM[0], rl.THIRTEEN, rl.FORTY_NINE, rl.LORA_XS[1], rl.LORA_XS[3], rl.LORA, rl.FULL)
LADDERS = {kind: tuple(by_imitation(point, kind) for point in SHAPES) for kind in KINDS}
CALIBRATED = {kind: by_imitation(rl.CALIBRATED[-1], kind) for kind in KINDS}
HALF = 0.5
"""Of the gain of all weights by GRPO: the accuracy at which numbers are counted."""
FAR = 10.0
"""How many times as many numbers are far more; the paper has 100 to 1,000."""
LOOKS = {"stranger": "lora", "careful": "lora_xs", "own": "calibrated"}
SERIES = [
    Series(SHAPES, "GRPO"),
    *(Series(LADDERS[kind], f"SFT, {label}", LOOKS[kind]) for kind, label in KINDS.items()),
]


def judge(store: Store) -> Verdict:
    """How many times as many numbers SFT takes for half of the full gain, on each kind of demonstrations.

    The paper's demonstrations are off-policy, and these must take ``FAR`` times as many; if others do not, the claim is
    about demonstrations of one kind, and holds in part.
    """
    rewarded = tuple(point.varied(f"{point.label}, GRPO") for point in SHAPES[:-1])
    times = {
        kind: times_fewer(HALF, (rewarded, rl.FULL, rl.BASE), (ladder, rl.FULL, rl.BASE), store)
        for kind, ladder in LADDERS.items()
    }
    by_rl = share_of_gain(rl.THIRTEEN, rl.FULL, rl.BASE, store)
    by_sft = {kind: share_of_gain(LADDERS[kind][1], rl.FULL, rl.BASE, store) for kind in KINDS}
    found = "; ".join(
        f"SFT on {label} {by_sft[kind].as_percent()}, and for half of it {times[kind].as_times()} GRPO's numbers"
        for kind, label in KINDS.items()
    )
    ours = f"Of the full gain, 13 random numbers recover {by_rl.as_percent()} by GRPO; {found}."
    findings = {kind: verdict_on(ratio, FAR, strictly=False) for kind, ratio in times.items()}
    off = findings["stranger"]
    return Verdict(ours, "reproduced in part" if off == "reproduced" and len(set(findings.values())) > 1 else off)


CLAIM = Claim(
    name="sft-parameters",
    order=2,
    title="Imitation needs far more numbers than reinforcement for the same accuracy.",
    paper="83 % with 13 numbers by SFT, 91 % by reinforcement learning; SFT needs 100 to 1,000 times as many numbers.",
    where="Figures 1 and 2, section 6.1; section 9 says that on-policy data could change it",
    points=flat(rl.BASE, rl.FULL, SHAPES, [(LADDERS[kind], CALIBRATED[kind]) for kind in KINDS]),
    draw=lambda store: against_numbers(SERIES, store, rl.BASE),
    judge=judge,
)
