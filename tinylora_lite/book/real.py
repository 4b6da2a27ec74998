"""The chapter on real models: its tables and figures, from the registered runs as far as they are recorded."""

from __future__ import annotations

from tinylora_lite.book.glue import Markdown, table
from tinylora_lite.lab.claim import Claim, Point
from tinylora_lite.lab.claims import claim_of
from tinylora_lite.lab.estimate import Estimate
from tinylora_lite.lab.plan import progress_of
from tinylora_lite.lab.registered import GSM8K, Cautious, choice_and_sum, primary
from tinylora_lite.lab.store import REAL_RESULTS, Record, Store
from tinylora_lite.lab.tasks import task_of
from tinylora_lite.lab.trial import REAL
from tinylora_lite.utils.record import Run
from tinylora_lite.view import plot

MODELS = {
    "real-smollm2": ("SmolLM2-135M-Instruct", "one step"),
    "real-qwen": ("Qwen2.5-Coder-0.5B-Instruct", "two steps"),
}
UNTRAINED, PROMPTED, THIRTEEN = "untrained", "untrained, best of five prompts", "13 random"


def points_of(claim: Claim) -> dict[str, Point]:
    """The points of a claim by label."""
    return {point.label: point for point in claim.points}


def outcome(claim: Claim, store: Store) -> str:
    """The primary comparison in words; how many of its runs are recorded while some are missing."""
    points = points_of(claim)
    thirteen, untrained = points[THIRTEEN], points[UNTRAINED]
    made = len(thirteen.records(store))
    if made < thirteen.seeds or not untrained.records(store):
        return f"Not decided yet: {made} of its {thirteen.seeds} trained runs are recorded."
    return primary(thirteen, untrained, store)[1] + "."


def outcomes() -> Markdown:
    """What the registered runs say on each real model, from the committed records."""
    rows = []
    for name, (model, problems) in MODELS.items():
        claim, store = claim_of(name), Store(REAL_RESULTS)
        seeds = points_of(claim)[THIRTEEN].seeds
        file = f"{model} (file {REAL[claim.points[0].trial.base][:8]}…), problems of {problems}, {seeds} draws of P"
        lenient = store.scored("greedy", "lenient")
        scores = (_accuracy(points_of(claim)[label], lenient) for label in (UNTRAINED, PROMPTED, THIRTEEN))
        rows.append((file, *scores, f"{outcome(claim, store)} ({progress(claim, store)})"))
    return table(("model", UNTRAINED, "its best of five prompts", THIRTEEN, "registered comparison"), "lllll", rows)


def progress(claim: Claim, store: Store) -> str:
    """How many runs are recorded, in words."""
    found = progress_of(claim, store)
    return f"{found['recorded']} of {found['recorded'] + found['missing']} runs"


def results(claim: Claim, store: Store) -> Markdown:
    """Every shape and control that has a record, scored on the test problems."""
    rows = []
    for point in claim.points:
        if point.trial.task in GSM8K or not (records := point.records(store)):
            continue
        choice, right = choice_and_sum(point, store)
        runs = f"{len(records)} of {point.seeds}"
        if point.trial.method != "none" and point.rates:
            runs += f", rate {point.rate(store):g}"
        scores = (("greedy", "lenient"), ("sampled", "accuracy"), ("sampled", "formatted"))
        accuracies = (_accuracy(point, store.scored(*score)) for score in scores)
        rows.append((point.label, f"{records[0]['parameters']:,}", runs, *accuracies, f"{choice:.0%}", f"{right:.0%}"))
    columns = ("trained", "numbers", "runs", "greedy", "sampled", "in format", "operators", "sums")
    return table(columns, "lrllllrr", rows)


def _accuracy(point: Point, store: Store) -> str:
    """By the score and reading of the store, with its interval where there are several runs."""
    values = point.accuracies(store)
    if len(values) > 1:
        return Estimate.of(values).as_percent()
    return f"{values[0]:.0%}" if values else "not yet run"


def sweep(point: Cautious, store: Store) -> Markdown:
    """The rates that were compared: validation accuracy and norm of v of every run, and which rate was taken."""
    out, rows = point.excluded(store) or {}, []
    for rate in point.swept(store)[0]:
        made = store.of(point.sweep([rate]))
        runs = ", ".join(f"{record['scores']['sampled']['accuracy']:.1%}" for record in made)
        norms = ", ".join(f"{record['norm']:.2f}" for record in made)
        fate = "taken" if rate == point.rate(store) else f"out: {out[rate]}" if rate in out else ""
        rows.append((f"{rate:g}", runs, norms, fate))
    return table(("rate", "sampled accuracy of both runs", "norm of v", ""), "rlll", rows)


def seconds(point: Point, store: Store) -> dict[str, float]:
    """Core-seconds of the longest reported run, and of the whole sweep; of a resumed run its last part alone."""
    swept = store.of(point.sweep(point.swept(store)[0]))
    return {
        "longest": max(record["cpu_seconds"] for record in point.records(store)),
        "sweep": sum(record["cpu_seconds"] for record in swept),
    }


def changed_answers(claim: Claim, store: Store, count: int = 3) -> Markdown:
    """The first test problems that the first seed answers rightly in place of wrongly, and the first of the reverse."""
    untrained, thirteen = (points_of(claim)[label] for label in (UNTRAINED, THIRTEEN))
    problems = task_of(thirteen.trial.task, thirteen.trial.base).test
    before, after = (store.answers(p.tests(p.rate(store))[0])["greedy"] for p in (untrained, thirteen))
    turned = list(zip(before["lenient"], after["lenient"], strict=True))
    rows: list[tuple[str, ...]] = []
    for change in (("0", "1"), ("1", "0")):
        for place in [place for place, found in enumerate(turned) if found == change][:count]:
            answers = (
                f"{_in_a_cell(kept['texts'][place])} {_mark(kept['lenient'][place])}" for kept in (before, after)
            )
            rows.append((_in_a_cell(problems[place].prompt), *answers))
    return table(("problem", "untrained", "with thirteen numbers"), "lll", rows)


def _in_a_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("#", "\\#").replace("\n", "<br>")


def _mark(earned: str) -> str:
    return "✓" if earned == "1" else "✗"


def turned(claim: Claim, store: Store) -> dict[str, int]:
    """Of the greedy answers of all seeds, read leniently, how many became right and how many became wrong."""
    untrained, thirteen = (points_of(claim)[label] for label in (UNTRAINED, THIRTEEN))
    before = store.answers(untrained.tests(untrained.rate(store))[0])["greedy"]["lenient"]
    trials = [trial for trial in thirteen.tests(thirteen.rate(store)) if trial in store]
    pairs = [pair for trial in trials for pair in zip(before, store.answers(trial)["greedy"]["lenient"], strict=True)]
    return {"right": pairs.count(("0", "1")), "wrong": pairs.count(("1", "0")), "of": len(pairs)}


def curves(point: Point, store: Store) -> plot.Figure:
    """The mean reward of every step, a line for each seed."""
    return plot.learning_curves([plot.Curves("tinylora", [_run(record) for record in point.records(store)])])


def _run(record: Record) -> Run:
    run = Run("grpo", {}, {}, record["parameters"], "words")
    run.steps = [{"step": step + 1, "reward": reward} for step, reward in enumerate(record["steps"]["reward"])]
    return run


@plot.style()
def vectors(point: Point, store: Store) -> plot.Figure:
    """The trained v: a panel of bars for each seed."""
    found = [record["vectors"] for record in point.records(store)]
    drawn, axes = plot.panels(1, len(found), 1.7, sharey=True)
    for seed, (panel, v) in enumerate(zip(axes, found, strict=True)):
        plot.bars(panel, v, plot.METHODS["tinylora"].colour)
        panel.set_title(f"seed {seed}", fontsize=9)
    axes[0].set_ylabel("v")
    return drawn
