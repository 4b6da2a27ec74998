"""The larger the model, the fewer numbers it needs: Figures 3 and 6 of the paper."""

from __future__ import annotations

from tinylora_lite.lab.claim import Claim, Verdict, flat
from tinylora_lite.lab.figures import share_against_numbers
from tinylora_lite.lab.shapes import climb, counts_on, ladder_on
from tinylora_lite.lab.statistics import times_fewer, verdict_of_replicates, verdict_on
from tinylora_lite.lab.store import Store
from tinylora_lite.lab.trial import BASE

SMALLEST = {BASE: "0.4M", "qwen2-0.4m-seed1": "0.4M, another seed"}
"""Two, to see how much is the base's own luck."""
LARGEST = "qwen2-5m"
SIZES = {**SMALLEST, "qwen2-1m": "1.2M", LARGEST: "5.2M"}
"""Bases by one recipe, from small to large."""
LADDERS = {base: ladder_on(base) for base in SIZES}
SHARE = 0.95


def judge(store: Store) -> Verdict:
    """The smallest update for 95 %; judged by the largest base against each of the smallest, which must agree."""
    fewer = {base: times_fewer(SHARE, climb(LADDERS[LARGEST]), climb(LADDERS[base]), store) for base in SMALLEST}
    ours = f"{counts_on(LADDERS, SIZES, SHARE, store)}. "
    ours += "; ".join(
        f"{SIZES[base]} needs {found.as_times()} as many as {SIZES[LARGEST]}" for base, found in fewer.items()
    )
    return Verdict(f"{ours}.", verdict_of_replicates(verdict_on(found, 1.0) for found in fewer.values()))


CLAIM = Claim(
    name="size",
    order=10,
    title="The larger the model, the fewer numbers it needs.",
    paper=(
        "95 % of the best: 549,888 numbers at 0.5B, 50,176 at 1.5B, 4,032 at 3B, 49 at 7B; the axis that says model "
        "size is a LoRA's."
    ),
    where="Figures 3 and 6, section 6.2",
    points=flat(LADDERS),
    draw=lambda store: share_against_numbers({SIZES[base]: LADDERS[base] for base in LADDERS}, store, (SHARE,)),
    judge=judge,
)
