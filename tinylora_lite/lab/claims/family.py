"""Qwen needs fewer numbers than Llama, says the paper: here small bases of both architectures."""

from __future__ import annotations

from matplotlib.figure import Figure

from tinylora_lite.lab.claim import Claim, Verdict
from tinylora_lite.lab.figures import share_against_numbers
from tinylora_lite.lab.gain import share_of_gain, smallest_count, verdict_between
from tinylora_lite.lab.shapes import RUNGS, ladder_on
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
    """The smallest update for 90 % of the gain in each family, and thirteen numbers' share in both."""
    parts, shares = [], []
    for base, ladder in LADDERS.items():
        rungs, full, floor = [ladder[name] for name in RUNGS], ladder["all weights"], ladder["base"]
        count, low, high = smallest_count(SHARE, rungs, full, floor, store)
        shares.append(share_of_gain(ladder["13 random"], full, floor, store))
        parts.append(
            f"{FAMILIES[base]}: {count:,} numbers [{low:,}, {high:,}] for {SHARE:.0%}, "
            f"13 recover {shares[-1].as_percent()}"
        )
    return Verdict("; ".join(parts) + ".", verdict_between(*shares))


CLAIM = Claim(
    name="family",
    order=11,
    title="Qwen needs about ten times fewer numbers than Llama.",
    paper="Llama-3.2-3B and 3.1-8B behind Qwen2.5 at every size of the update; with few numbers hardly above the base.",
    where="Figure 4 and section 7",
    points=tuple(point for ladder in LADDERS.values() for point in ladder.values()),
    draw=draw,
    judge=judge,
)
