"""Qwen needs fewer numbers than Llama, says the paper: here small bases of both architectures."""

from __future__ import annotations

from matplotlib.figure import Figure

from tinylora_lite.lab.claim import Claim, Verdict
from tinylora_lite.lab.figures import share_against_numbers
from tinylora_lite.lab.gain import share_of_gain, smallest_count, times_fewer, verdict_on
from tinylora_lite.lab.shapes import RUNGS, ends, ladder_on
from tinylora_lite.lab.store import Store
from tinylora_lite.lab.trial import BASE

FAMILIES = {BASE: "Qwen2", "llama-0.4m": "Llama"}
"""Bases of one size: another architecture in transformers, and other shares of the writers in what it read."""
LADDERS = {base: ladder_on(base) for base in FAMILIES}
SHARE = 0.9


def draw(store: Store) -> Figure:
    """The share of the full gain against the numbers trained, a line for each family."""
    ladders = {FAMILIES[base]: ladder for base, ladder in LADDERS.items()}
    return share_against_numbers(ladders, RUNGS, store, (SHARE,))


def judge(store: Store) -> Verdict:
    """The smallest update for 90 % of the gain in each family; the claim holds if the first needs fewer."""
    rungs = {base: ([ladder[name] for name in RUNGS], *ends(ladder)) for base, ladder in LADDERS.items()}
    parts = []
    for base, ladder in LADDERS.items():
        count, low, high = smallest_count(SHARE, *rungs[base], store)
        thirteen = share_of_gain(ladder["13 random"], *ends(ladder), store)
        parts.append(
            f"{FAMILIES[base]}: {count:,} numbers [{low:,}, {high:,}] for {SHARE:.0%}, "
            f"13 recover {thirteen.as_percent()}"
        )
    qwen, llama = rungs.values()
    fewer = times_fewer(SHARE, qwen, llama, store)
    ours = f"{'; '.join(parts)}. Llama needs {fewer.as_times()} as many."
    return Verdict(ours, verdict_on(fewer, 1.0, strictly=True))


CLAIM = Claim(
    name="family",
    order=11,
    title="Qwen needs about ten times fewer numbers than Llama.",
    paper=(
        "Llama-3.2-3B behind Qwen2.5-3B at nearly every size of the update: 60 against 74 % with 100 numbers, and "
        "nothing gained below 5."
    ),
    where="Figures 7 to 9 and the text beside them",
    points=tuple(point for ladder in LADDERS.values() for point in ladder.values()),
    draw=draw,
    judge=judge,
)
