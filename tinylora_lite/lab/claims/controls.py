"""What should not work: noise in place of training, rewards for something else, another header, a milder reading."""

from __future__ import annotations

from dataclasses import replace

from matplotlib.figure import Figure

from tinylora_lite.lab.claim import Claim, Estimate, Point, Verdict
from tinylora_lite.lab.claims.rl_parameters import BASE, CALIBRATED, FULL, THIRTEEN
from tinylora_lite.lab.figures import side_by_side
from tinylora_lite.lab.gain import difference
from tinylora_lite.lab.shapes import untouched
from tinylora_lite.lab.store import Store
from tinylora_lite.nano.writers import WRITERS

TRAINED = {"random": THIRTEEN, "calibrated": CALIBRATED[-1]}
NORMS = (0.5, 0.75, 1.0, 2.0, 4.0)
"""Of random v; training ends at norms between the first and a little above the third."""
NOISE = {
    kind: tuple(
        replace(
            point,
            label=f"noise of norm {norm:g}",
            trial=replace(point.trial, method="noise", learning_rate=norm),
            rates=(),
        )
        for norm in NORMS
    )
    for kind, point in TRAINED.items()
}


def rewarded(point: Point, task: str, label: str) -> Point:
    """The same numbers trained on another reward for the same problems, and scored on the plain task."""
    # The rate is the plain reward's: to choose one by the plain score would train on what is to be ruled out.
    return replace(point, label=label, trial=replace(point.trial, trained_on=task), like=point)


OTHERS = {
    kind: (
        rewarded(point, "format only", "rewarded for the format"),
        rewarded(point, "unrelated", "rewarded at random"),
    )
    for kind, point in TRAINED.items()
}
HEADERS = {
    name: replace(untouched(task=f"header: {name}"), label=f"base, told to be the {name} writer") for name in WRITERS
}
"""Prompts that the base knows, one for each writer whom it read."""
HEADER = HEADERS["careful"]
SHOWN = {kind: replace(point, label="trained, right answers rewarded") for kind, point in TRAINED.items()}


def lenient(point: Point, store: Store) -> Estimate:
    """Accuracy when the answer may stand anywhere in the text."""
    return Estimate.of([record["scores"][store.score]["lenient"] for record in point.records(store)])


def draw(store: Store) -> Figure:
    """Trained numbers above what should not reach them."""
    groups: list[tuple[str, tuple[Point, ...]]] = [("", (BASE, *HEADERS.values()))]
    groups += [(f"13 {kind}:", (SHOWN[kind], *OTHERS[kind], *NOISE[kind])) for kind in TRAINED]
    return side_by_side(groups, store, BASE, full=FULL)


def judge(store: Store) -> Verdict:
    """Each control against the trained numbers, and the gain as a lenient reader sees it."""
    parts = []
    for kind, point in TRAINED.items():
        norm = sum(record["norm"] for record in point.records(store)) / point.seeds
        nearest = min(NOISE[kind], key=lambda noise: abs(noise.trial.learning_rate - norm))
        gaps = [
            f"{control.label} {estimate.as_percent()}"
            for control in (*OTHERS[kind], nearest)
            if (estimate := control.estimate(store)) is not None
        ]
        parts.append(f"13 {kind} (their norm {norm:.1f}) over the base {difference(point, BASE, store).as_points()}; ")
        parts[-1] += ", ".join(gaps)
    told = {name: point.estimate(store) for name, point in HEADERS.items()}
    under = ", ".join(f"{name} {estimate.as_percent()}" for name, estimate in told.items() if estimate is not None)
    parts.append(f"the base under each writer's header: {under}")
    read = ", ".join(f"{point.label} {lenient(point, store).as_percent()}" for point in (BASE, *TRAINED.values(), FULL))
    return Verdict("; ".join(parts) + f"; read leniently: {read}.", "not in the paper")


CLAIM = Claim(
    name="controls",
    order=15,
    title="Does the gain come from training on right answers?",
    paper="No controls.",
    where="left open",
    points=(
        BASE,
        FULL,
        *HEADERS.values(),
        *TRAINED.values(),
        *(point for kind in TRAINED for point in (*OTHERS[kind], *NOISE[kind])),
    ),
    draw=draw,
    judge=judge,
)
