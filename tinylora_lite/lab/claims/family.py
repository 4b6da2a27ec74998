"""Qwen needs fewer numbers than Llama, says the paper: here small bases of both architectures."""

from __future__ import annotations

from matplotlib.figure import Figure

from tinylora_lite.lab.claim import Claim, Verdict
from tinylora_lite.lab.figures import share_against_numbers
from tinylora_lite.lab.gain import times_fewer, verdict_on
from tinylora_lite.lab.ladder import RUNGS, climb, counts_on, ladder_on
from tinylora_lite.lab.store import Store
from tinylora_lite.lab.trial import BASE

FAMILIES = {BASE: "Qwen2", "llama-0.4m": "Llama"}
"""Bases of one size: another architecture in transformers, and other shares of the writers in what it read."""
LADDERS = {base: ladder_on(base) for base in FAMILIES}
SHARE = 0.9
LESS = 0.5
"""A share at which nothing is judged, and that tells how far the answer hangs on the first."""


def draw(store: Store) -> Figure:
    """The share of the full gain against the numbers trained, a line for each family."""
    ladders = {FAMILIES[base]: ladder for base, ladder in LADDERS.items()}
    return share_against_numbers(ladders, RUNGS, store, (SHARE,))


def judge(store: Store) -> Verdict:
    """The smallest update for 90 % of the gain in each family; the claim holds if the first needs fewer."""
    qwen, llama = LADDERS.values()
    fewer = times_fewer(SHARE, climb(qwen), climb(llama), store)
    half = times_fewer(LESS, climb(qwen), climb(llama), store)
    ours = (
        f"{counts_on(LADDERS, FAMILIES, SHARE, store)}. For {LESS:.0%} Llama needs {half.as_times()} as many as Qwen2, "
        "on rungs that grow by factors of two to twelve."
    )
    return Verdict(ours, verdict_on(fewer, 1.0, strictly=True))


CLAIM = Claim(
    name="family",
    order=11,
    title="Qwen needs fewer numbers than Llama.",
    paper=(
        "Llama-3.2-3B behind Qwen2.5-3B at nearly every size of the update: 60 against 74 % with 100 numbers, and "
        "nothing gained below 5."
    ),
    where="Figures 7 to 9 and the text beside them",
    points=tuple(point for ladder in LADDERS.values() for point in ladder.values()),
    draw=draw,
    judge=judge,
)
