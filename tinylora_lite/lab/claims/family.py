"""Qwen needs fewer numbers than Llama, says the paper: here small bases of both architectures."""

from __future__ import annotations

from tinylora_lite.lab.claim import Claim, Verdict, flat
from tinylora_lite.lab.figures import share_against_numbers
from tinylora_lite.lab.shapes import climb, counts_on, ladder_on
from tinylora_lite.lab.statistics import times_fewer, verdict_of_replicates, verdict_on, verdict_over
from tinylora_lite.lab.store import Store
from tinylora_lite.lab.trial import BASE

QWEN = {BASE: "Qwen2", "qwen2-0.4m-seed1": "Qwen2, another seed"}
LLAMA = {"llama-0.4m": "Llama, other texts", "llama-0.4m-default": "Llama, the same texts"}
FAMILIES = QWEN | LLAMA
"""Bases of one size.

Another architecture in transformers with other shares of the writers in what it read, which is how families differ, and
with the same ones, which tells the two apart.
"""
LADDERS = {base: ladder_on(base) for base in FAMILIES}
SHARE = 0.9
LESS = 0.5
"""A share at which nothing is judged, and that tells how far the answer hangs on the first."""


def judge(store: Store) -> Verdict:
    """The smallest update for 90 % of the gain.

    The claim holds for a Llama if both Qwen2 need fewer numbers than it; if it holds for one Llama, it holds in part.
    """
    found = {
        llama: {qwen: times_fewer(SHARE, climb(LADDERS[qwen]), climb(LADDERS[llama]), store) for qwen in QWEN}
        for llama in LLAMA
    }
    half = times_fewer(LESS, climb(LADDERS[BASE]), climb(LADDERS["llama-0.4m"]), store)
    times = "; ".join(
        f"{LLAMA[llama]}, needs {ratio.as_times()} as many as {QWEN[qwen]}"
        for llama, ratios in found.items()
        for qwen, ratio in ratios.items()
    )
    ours = (
        f"{counts_on(LADDERS, FAMILIES, SHARE, store)}. {times}. For {LESS:.0%} {LLAMA['llama-0.4m']}, needs "
        f"{half.as_times()} as many as {QWEN[BASE]}, on rungs that grow by factors of two to twelve."
    )
    verdicts = (verdict_of_replicates(verdict_on(ratio, 1.0) for ratio in ratios.values()) for ratios in found.values())
    return Verdict(ours, verdict_over(verdicts))


CLAIM = Claim(
    name="family",
    order=11,
    title="Qwen needs fewer numbers than Llama.",
    paper=(
        "Llama-3.2-3B behind Qwen2.5-3B at nearly every size of the update: 60 against 74 % with 100 numbers, and "
        "nothing gained below 5."
    ),
    where="Figures 7 to 9 and the text beside them",
    points=flat(LADDERS),
    draw=lambda store: share_against_numbers({FAMILIES[base]: LADDERS[base] for base in LADDERS}, store, (SHARE,)),
    judge=judge,
)
