"""Where 13 directions should point: random, the best of several draws, or calibrated; and what aim costs in bits."""

from __future__ import annotations

from math import ceil, log2

from tinylora_lite.lab.claim import Claim, Point, Verdict, flat
from tinylora_lite.lab.claims import family, seeds, size
from tinylora_lite.lab.claims import rl_parameters as rl
from tinylora_lite.lab.figures import Series, base_line, marks, percent, score_label
from tinylora_lite.lab.shapes import calibrated_numbers, ends
from tinylora_lite.lab.statistics import listed, share_of_gain
from tinylora_lite.lab.store import Store
from tinylora_lite.lab.trial import BASE
from tinylora_lite.view import plot

BITS = 16
"""Of a stored number, of a basis too."""
SEED_BITS = 64
"""Of the seed that P is drawn from."""
MODULES = 49
"""Of every base of the lab."""
NARROW = tuple(calibrated_numbers(13, rank=rank).varied(f"13 calibrated, r = {rank}") for rank in (1, 2, 4))
CALIBRATED = (*NARROW, rl.CALIBRATED[-1].varied("13 calibrated, r = 8"))
FEWER = tuple(
    rl.CALIBRATED[-1].varied(f"{n} problems", calibration=f"problems={n}", seeds=3, sweep_seeds=2)
    for n in (24, 48, 96, 192)
)
"""On bases from fewer problems. Such a basis varies more with them, and a rate that suits one can ruin another."""
SHOWN = [Series(p) for p in (rl.RANDOM, (*CALIBRATED, *rl.CALIBRATED[:-1]), rl.LORA_XS, (rl.LORA,), (rl.FULL,))]
NAMES = {base: name for base, name in (size.SIZES | family.FAMILIES).items() if base != BASE}
ELSEWHERE = {base: calibrated_numbers(13, base, rank=1) for base in NAMES}
"""The narrow basis on every size and family."""
LADDERS = {base: (size.LADDERS | family.LADDERS)[base] for base in NAMES}
BESIDE = ("base", "13 random", "13 calibrated", "49 LoRA-XS", "all weights")
"""The points of each of their ladders that it is compared with."""


def own_bits(point: Point) -> int:
    """Of the trained numbers alone, as the paper counts."""
    trial = point.trial
    return BITS * trial.u * (1 if trial.n_tie == "all" else ceil(MODULES / int(trial.n_tie)))


def basis_bits(point: Point) -> int:
    """Of the basis of a calibrated shape: u directions through all entries of R."""
    return BITS * point.trial.u * MODULES * point.trial.rank**2


def bits(point: Point, store: Store, everything: bool) -> int:
    """Of the trained numbers, or of everything: with the basis of calibrated ones, with the seed of random ones."""
    if point.trial.numbers not in ("random", "calibrated"):
        return BITS * point.parameters(store)
    beside = basis_bits(point) if point.trial.numbers == "calibrated" else SEED_BITS
    return own_bits(point) + (beside if everything else 0)


@plot.style()
def draw(store: Store) -> plot.Figure:
    """Accuracy against the numbers' bits (left), and against all bits with basis and seed (right)."""
    drawn, both = plot.panels(1, 2, 3.6, sharey=True)
    for axes, everything in zip(both, (False, True), strict=True):
        for line in SHOWN:
            look, run = line.look, [(point, point.estimate(store)) for point in line.points]
            rows = [(bits(point, store, everything), estimate) for point, estimate in run if estimate is not None]
            marks(axes, rows, look.colour, look.marker, label=look.label)
        axes.set_xscale("log")
        axes.set_xlabel("bits, with basis and seed" if everything else "bits of the trained numbers")
        base_line(axes, rl.BASE, store)
    percent(both[0], score_label(store))
    drawn.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return drawn


def judge(store: Store) -> Verdict:
    """Calibrated directions against the random ones, the best of eight draws, and LoRA-XS at as few numbers."""
    best = seeds.best_of(seeds.POINTS[13], store, seeds.DRAWS)
    ours = f"13 numbers on the best of {seeds.DRAWS} draws of P ({log2(seeds.DRAWS):.0f} more bits): {best:.0%}; "
    ours += listed((rl.THIRTEEN, *CALIBRATED, *FEWER, rl.LORA_XS[0]), store, "; ")
    narrow = ", ".join(f"{own_bits(p) + basis_bits(p):,} at r = {p.trial.rank}" for p in CALIBRATED)
    shares = {base: share_of_gain(point, *ends(LADDERS[base]), store) for base, point in ELSEWHERE.items()}
    there = ", ".join(f"{NAMES[base]} {share.as_percent()}" for base, share in shares.items())
    ours += f". All bits of 13 calibrated numbers: {narrow}. At r = 1 they recover on other bases: {there} of the gain."
    return Verdict(ours, "not in the paper")


CLAIM = Claim(
    name="aim",
    order=13,
    title="Are 13 numbers worth more on directions that are calibrated on the task?",
    paper="Takes random directions; 26 bytes count the numbers and neither P's seed nor the base.",
    where="section 4; an idea of this book",
    points=flat(rl.BASE, rl.FULL, rl.RANDOM, rl.CALIBRATED, rl.LORA_XS, rl.LORA)
    + flat(NARROW, FEWER, ELSEWHERE, [LADDERS[base][name] for base in NAMES for name in BESIDE], seeds.POINTS[13]),
    draw=draw,
    judge=judge,
)
