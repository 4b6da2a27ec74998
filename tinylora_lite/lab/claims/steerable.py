"""What makes a model steerable by few numbers? Bases that differ in one thing of their pretraining only."""

from __future__ import annotations

from matplotlib.figure import Figure

from tinylora_lite.lab.claim import Claim, Verdict
from tinylora_lite.lab.figures import share_beside
from tinylora_lite.lab.gain import share_of_gain, smallest_count
from tinylora_lite.lab.shapes import RUNGS, ladder_on
from tinylora_lite.lab.store import Store
from tinylora_lite.lab.trial import BASE

TWINS = {
    BASE: "writers named in half",
    "qwen2-0.4m-unnamed": "writers never named",
    "qwen2-0.4m-often": "writers named in nine of ten",
    "qwen2-0.4m-undecayed": "no weight decay",
    "qwen2-0.4m-short": "half as long",
    "qwen2-0.4m-seed1": "another seed",
}
"""What each base has that the first has not; all else is the same, the seed too. Only the last differs in nothing that
was chosen: it tells how far apart two bases of one recipe are."""
SHARES = (0.5, 0.9)
LADDERS = {base: ladder_on(base, seeds=3) for base in TWINS}


def draw(store: Store) -> Figure:
    """The share of the full gain against the numbers trained, a panel for each twin."""
    (own, *_), others = LADDERS.values(), {TWINS[base]: ladder for base, ladder in LADDERS.items() if base != BASE}
    return share_beside((TWINS[BASE], own), others, RUNGS, store, SHARES)


def judge(store: Store) -> Verdict:
    """The smallest updates for half and for 90 % of the gain on every twin."""
    parts = []
    for base, ladder in LADDERS.items():
        rungs = [ladder[name] for name in RUNGS]
        counts = [
            "{:,} [{:,}, {:,}] numbers for {:.0%}".format(
                *smallest_count(share, rungs, ladder["all weights"], ladder["base"], store), share
            )
            for share in SHARES
        ]
        thirteen = share_of_gain(ladder["13 random"], ladder["all weights"], ladder["base"], store)
        parts.append(f"{TWINS[base]}: {', '.join(counts)}; 13 recover {thirteen.as_percent()}")
    return Verdict("; ".join(parts) + ".", "not in the paper")


CLAIM = Claim(
    name="steerable",
    order=12,
    title="A model that was told who writes is steered by fewer numbers.",
    paper="Finds that Qwen needs ten times fewer numbers than Llama, and leaves the reason open.",
    where="section 7; a hypothesis of this book",
    points=tuple(point for ladder in LADDERS.values() for point in ladder.values()),
    draw=draw,
    judge=judge,
)
