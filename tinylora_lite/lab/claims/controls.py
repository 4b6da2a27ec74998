"""Controls: noise in place of training, rewards for something else, other headers, a lenient reading of answers."""

from __future__ import annotations

from dataclasses import replace

from tinylora_lite.lab.claim import Claim, Point, Verdict, flat
from tinylora_lite.lab.claims.rl_parameters import BASE, CALIBRATED, FULL, LORA_XS, THIRTEEN
from tinylora_lite.lab.estimate import Estimate
from tinylora_lite.lab.figures import side_by_side
from tinylora_lite.lab.shapes import ladder_on, untouched
from tinylora_lite.lab.statistics import difference, listed
from tinylora_lite.lab.store import Store
from tinylora_lite.nano.writers import WRITERS
from tinylora_lite.view import plot

TRAINED = {point.label: point for point in (THIRTEEN, CALIBRATED[-1], LORA_XS[0], FULL)}
NORMS = (0.5, 0.75, 1.0, 2.0, 4.0)
"""Of random v; training ends at norms between the first and a little below the fourth."""
NOISE = {
    kind: tuple(point.varied(f"noise of norm {norm:g}", method="noise", learning_rate=norm, rates=()) for norm in NORMS)
    for kind, point in TRAINED.items()
    if point is not FULL
}
"""Of all weights there is none: the lab draws noise for the numbers of an adapter."""


def others(point: Point) -> tuple[Point, Point]:
    """The same numbers trained on two other rewards for the same problems, and scored on the plain task."""
    # The rate is the plain reward's: to choose one by the plain score would train on what is to be ruled out.
    return (
        point.varied("rewarded for the format", trained_on="format only", like=point),
        point.varied("rewarded at random", trained_on="unrelated", like=point),
    )


OTHERS = {kind: others(point) for kind, point in TRAINED.items()}
FORMAT_SLOWER = OTHERS["49 LoRA-XS"][0].varied(
    "rewarded for the format, at a quarter of the rate", learning_rate=0.025, rates=(), like=None
)
SLOWER = {"49 LoRA-XS": [FORMAT_SLOWER]}
"""The format's reward at a second rate, since the first was chosen for another reward."""
ELSEWHERE = {
    base: (ladder["base"], ladder["49 LoRA-XS"], *others(replace(ladder["49 LoRA-XS"], seeds=3)))
    for base in ("qwen2-1m", "qwen2-5m", "llama-0.4m")
    for ladder in (ladder_on(base),)
}
"""On other bases: untouched, 49 numbers of LoRA-XS by rewards for right answers, and by the two other rewards."""
HEADERS = {name: untouched(task=f"header: {name}").varied(f"base, told to be the {name} writer") for name in WRITERS}
"""Prompts that the base knows, one for each writer whom it read."""
HEADER = HEADERS["careful"]
SHOWN = {kind: point.varied(f"{kind}: right answers") for kind, point in TRAINED.items()}


def lenient(point: Point, store: Store) -> Estimate:
    """Accuracy when the answer may be anywhere in the text."""
    return Estimate.of([record["scores"][store.score]["lenient"] for record in point.records(store)])


def draw(store: Store) -> plot.Figure:
    """Trained numbers above what should not reach them."""
    rows = [BASE, *HEADERS.values()]
    for kind, point in SHOWN.items():
        rows += [point, *OTHERS[kind], *SLOWER.get(kind, ()), *NOISE.get(kind, ())]
    return side_by_side(rows, store, BASE, FULL)


def judge(store: Store) -> Verdict:
    """Each control against the trained numbers, and the gain as a lenient reader sees it."""
    parts = []
    for kind, point in TRAINED.items():
        name, beside = kind, [*OTHERS[kind], *SLOWER.get(kind, ())]
        if kind in NOISE:
            norm = sum(record["norm"] for record in point.records(store)) / point.seeds
            name += f" (their norm {norm:.1f})"
            beside.append(min(NOISE[kind], key=lambda noise: abs(noise.trial.learning_rate - norm)))
        gain = difference(point, BASE, store).as_points()
        parts.append(f"{name} over the base {gain}; {listed(beside, store)}")
    for base, (_, point, *beside) in ELSEWHERE.items():
        parts.append(f"on {base} {listed((point, *beside), store)}")
    under = listed([point.varied(name) for name, point in HEADERS.items()], store)
    parts.append(f"the base under each writer's header: {under}")
    read = ", ".join(f"{point.label} {lenient(point, store).as_percent()}" for point in (BASE, *TRAINED.values()))
    return Verdict("; ".join(parts) + f"; read leniently: {read}.", "not in the paper")


CLAIM = Claim(
    name="controls",
    order=15,
    title="Does the gain come from training on right answers?",
    paper="No controls.",
    where="left open",
    points=flat(BASE, HEADERS, TRAINED, OTHERS, NOISE, FORMAT_SLOWER, ELSEWHERE),
    draw=draw,
    judge=judge,
)
