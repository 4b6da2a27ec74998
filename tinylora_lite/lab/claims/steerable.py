"""What makes a model steerable by few numbers: bases that differ in one thing of their pretraining."""

from __future__ import annotations

from tinylora_lite.lab.claim import Claim, Point, Verdict, flat
from tinylora_lite.lab.claims.size import SMALLEST
from tinylora_lite.lab.figures import share_beside
from tinylora_lite.lab.shapes import RUNGS, climb, ends, ladder_on
from tinylora_lite.lab.statistics import share_of_gain, smallest_count
from tinylora_lite.lab.store import Store
from tinylora_lite.lab.trial import BASE

TWINS = {
    BASE: "writers named in half",
    "qwen2-0.4m-unnamed": "writers never named",
    "qwen2-0.4m-often": "writers named in nine of ten",
    "qwen2-0.4m-short": "half as long",
    "qwen2-0.4m-undecayed": "no weight decay",
    "qwen2-0.4m-seed1": "another seed",
}
"""What each base has that the first has not; all else is the same, the seed too but for the last.

That one differs in nothing that was chosen: it tells how far apart two bases of one recipe are.
"""
SHARES = (0.5, 0.9)
LADDERS = {base: ladder_on(base, seeds=5 if base in SMALLEST else 3) for base in TWINS}
OTHERS = {TWINS[base]: ladder for base, ladder in LADDERS.items() if base != BASE}


def drawn(ladder: dict[str, Point]) -> list[Point]:
    """The rungs on random directions: where LoRA-XS of rank 1 does all, a count of any kind tells twins not apart."""
    return [ladder[name] for name in RUNGS if ladder[name].trial.numbers == "random"]


def judge(store: Store) -> Verdict:
    """The smallest updates on random directions for half of the gain, and of any kind for 90 %, on every twin."""
    parts = []
    for base, ladder in LADDERS.items():
        count, low, high = smallest_count(SHARES[0], drawn(ladder), *ends(ladder), store)
        most, most_low, most_high = smallest_count(SHARES[1], *climb(ladder), store)
        thirteen = share_of_gain(ladder["13 random"], *ends(ladder), store)
        parts.append(
            f"{TWINS[base]}: {count:,} random numbers [{low:,}, {high:,}] for {SHARES[0]:.0%}, {most:,} of any kind "
            f"[{most_low:,}, {most_high:,}] for {SHARES[1]:.0%}; 13 random recover {thirteen.as_percent()}"
        )
    return Verdict("; ".join(parts) + ".", "not in the paper")


CLAIM = Claim(
    name="steerable",
    order=12,
    title="What makes a model steerable by few numbers?",
    paper="Finds that Qwen needs ten times fewer numbers than Llama, and leaves the reason open.",
    where="section 7; a hypothesis of this book",
    points=flat(LADDERS),
    draw=lambda store: share_beside((TWINS[BASE], LADDERS[BASE]), OTHERS, store, SHARES),
    judge=judge,
)
