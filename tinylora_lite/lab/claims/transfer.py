"""What a calibration is about: directions of one task on another, of another base, and from imitation."""

from __future__ import annotations

from tinylora_lite.lab.claim import Claim, Point, Verdict, flat
from tinylora_lite.lab.claims.rl_parameters import BASE, CALIBRATED, FULL, THIRTEEN
from tinylora_lite.lab.figures import draw_rows, score_label
from tinylora_lite.lab.shapes import untouched
from tinylora_lite.lab.statistics import difference
from tinylora_lite.lab.store import Store
from tinylora_lite.view import plot

SEEDS = 3


def aimed(label: str, calibration: str, task: str = "nano") -> Point:
    """Thirteen numbers trained on a task, on directions that were made elsewhere."""
    return CALIBRATED[-1].varied(label, task=task, calibration=calibration, seeds=SEEDS)


def random(task: str) -> Point:
    """Thirteen numbers on random directions, on a task."""
    return THIRTEEN.varied("random directions", task=task, seeds=SEEDS)


GROUPS = {
    "nano": (
        THIRTEEN.varied("random directions"),
        CALIBRATED[-1].varied("its own"),
        aimed("of a twin base", "base=qwen2-0.4m-unnamed"),
        aimed("of a base of another seed", "base=qwen2-0.4m-seed1"),
        aimed("of the format's reward", "task=format only"),
        aimed("from the careful writer's text", "gradients=careful"),
        aimed("from the unseen writer's text", "gradients=stranger"),
    ),
    "multiplying": (
        untouched(task="multiplying").varied("untrained", seeds=SEEDS),
        random("multiplying"),
        aimed("its own", "task=multiplying", "multiplying"),
        aimed("of problems without it", "task=adding", "multiplying"),
    ),
    "worded": (
        untouched(task="worded").varied("untrained", seeds=SEEDS),
        random("worded"),
        aimed("its own", "task=worded", "worded"),
        aimed("of the other format", "", "worded"),
    ),
}
NAMES = {"nano": "plain", "multiplying": "with products", "worded": "chatty format"}


@plot.style()
def draw(store: Store) -> plot.Figure:
    """Accuracy by where the directions come from, a panel for each task, with lines of that task's own."""
    rows = [len(points) for points in GROUPS.values()]
    drawn, panels = plot.panels(len(rows), 1, 1.7 + 0.27 * sum(rows), sharex=True, height_ratios=rows)
    for axes, (task, points) in zip(panels, GROUPS.items(), strict=True):
        # All weights were trained on the plain task alone, whose base is not among its rows.
        base, full = (BASE, FULL) if task == "nano" else (points[0], None)
        draw_rows(axes, points, store, base, full, method="calibrated")
        axes.set_ylabel(NAMES[task], fontweight="bold")
    panels[-1].set_xlabel(score_label(store))
    drawn.align_ylabels()
    return drawn


def judge(store: Store) -> Verdict:
    """Borrowed directions against a task's own and against random ones."""
    parts = []
    plain, own, *borrowed = GROUPS["nano"]
    compared = [(point.label, plain, own, point) for point in borrowed]
    for label, task in (("problems without products", "multiplying"), ("the chatty writer's format", "worded")):
        _, drawn, aimed_here, elsewhere = GROUPS[task]
        compared.append((label, drawn, aimed_here, elsewhere))
    for label, drawn, aimed_here, elsewhere in compared:
        parts.append(
            f"{label}: {difference(elsewhere, aimed_here, store).as_points()} beside the task's own, "
            f"{difference(elsewhere, drawn, store).as_points()} over random"
        )
    return Verdict("; ".join(parts) + ".", "not in the paper")


CLAIM = Claim(
    name="transfer",
    order=14,
    title="Does a calibration serve another task, and another base?",
    paper="Nothing: its directions are random.",
    where="an idea of this book",
    points=flat(BASE, FULL, GROUPS),
    draw=draw,
    judge=judge,
)
