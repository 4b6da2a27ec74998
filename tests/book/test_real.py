"""The tables of the chapter on real models, from made-up records of some of its runs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tinylora_lite.book import real
from tinylora_lite.lab.claims import claim_of
from tinylora_lite.lab.figures import score_label
from tinylora_lite.lab.store import Store
from tinylora_lite.lab.tasks import task_of
from tinylora_lite.lab.trial import REAL, Trial

ROOT = Path(__file__).parents[2]
CLAIM = claim_of("real-smollm2")
POINTS = real.points_of(CLAIM)
FLOOR = Trial(base="smollm2-135m", method="none", task="words-1", learning_rate=0.0, seed=100, split="validation")


def record(right: int, texts: list[str] | None = None) -> dict:
    """A run that is right on the first problems; its answers are the worked ones unless others are given."""
    solved = "1" * right + "0" * (1000 - right)
    worked = [problem.solution or "" for problem in task_of("words-1", "smollm2-135m").test]
    kept = {"texts": texts or worked, "strict": solved, "lenient": solved}
    score = {"accuracy": right / 1000, "lenient": right / 1000, "formatted": 0.9}
    record = {
        "parameters": 13,
        "norm": 0.4,
        "cpu_seconds": 60.0,
        "scores": {"sampled": score, "greedy": score},
        "vectors": [0.1] * 13,
    }
    return record | {"steps": {"reward": [0.1, 0.2]}, "answers": {"greedy": kept}}


@pytest.fixture
def store(tmp_path):
    """The untrained model and two of the five reported runs of 13 random, at the middle rate."""
    store, thirteen = Store(tmp_path), POINTS["13 random"]
    store.add(FLOOR, {"scores": {name: {"accuracy": 0.2} for name in ("sampled", "greedy")}})
    for trial in thirteen.sweep(thirteen.rates):
        sampled = {"accuracy": 0.3 if trial.learning_rate == 0.025 else 0.25}
        store.add(trial, {"scores": {"sampled": sampled}, "norm": 0.3, "cpu_seconds": 30.0})
    wrong = ["1 + 1 = 2\n#### 2"] * 1000
    store.add(POINTS["untrained"].tests(0.0)[0], record(300, wrong) | {"parameters": 0})
    for trial, right in zip(thirteen.tests(0.025), (302, 310), strict=False):
        store.add(trial, record(right))
    return store


def test_the_outcome_waits_for_all_runs(store):
    assert real.outcome(CLAIM, store) == "Not decided yet: 2 of its 5 trained runs are recorded."
    for trial in POINTS["13 random"].tests(0.025)[2:]:
        store.add(trial, record(300))
    assert real.outcome(CLAIM, store).startswith("Undecided")


def test_a_row_for_every_shape_that_has_a_record(store):
    head, _, untrained, thirteen = real.results(CLAIM, store).splitlines()
    assert head.startswith("| trained | numbers | runs |")
    assert untrained.startswith("| untrained | 0 | 1 of 1 | 30% | 30% | 90% |")
    right = "31% [26%, 36%]"
    start = f"| 13 random | 13 | 2 of 5, rate 0.025 | {right} | {right} | 90% [90%, 90%] | 100% | 31% |"
    assert thirteen.startswith(start)


def test_greedy_answers_are_read_leniently_and_sampled_ones_strictly(store):
    (trial,) = POINTS["untrained"].tests(0.0)
    for name, strict, lenient in (("greedy", 0.2, 0.4), ("sampled", 0.1, 0.3)):
        store[trial]["scores"][name] = {"accuracy": strict, "lenient": lenient, "formatted": 0.9}
    assert real.results(CLAIM, store).splitlines()[2].startswith("| untrained | 0 | 1 of 1 | 40% | 10% | 90% |")
    lenient = store.scored("greedy", "lenient")
    assert POINTS["untrained"].accuracies(lenient) == [0.4]
    assert score_label(lenient) == "accuracy of greedy answers, read leniently, test set"


def test_a_rate_is_out_where_a_run_diverged_and_so_is_the_one_below(store):
    thirteen = POINTS["13 random"]
    assert [row.split(" | ")[0][2:] for row in real.sweep(thirteen, store).splitlines()[2:]] == [
        "0.0125",
        "0.025",
        "0.05",
    ]
    assert "| 0.025 | 30.0%, 30.0% | 0.30, 0.30 | taken |" in real.sweep(thirteen, store)
    assert real.seconds(thirteen, store) == {"longest": 60, "sweep": 180}
    store[thirteen.sweep([0.05])[1]]["scores"]["sampled"]["accuracy"] = 0.05
    rows = real.sweep(thirteen, store).splitlines()[2:]
    assert [row.split(" | ")[-1] for row in rows] == [
        "taken |",
        "out: a run diverged at the next rate |",
        "out: a run diverged |",
    ]


def test_the_answers_that_changed_are_shown_whole_and_counted(store):
    first, *rest = real.changed_answers(CLAIM, store, count=3).splitlines()[2:]
    assert "| 1 + 1 = 2<br>\\#\\#\\#\\# 2 ✗ |" in first
    assert first.endswith(" ✓ |")
    assert len(rest) == 1, "seed 0 solves two more"
    assert real.turned(CLAIM, store) == {"right": 12, "wrong": 0, "of": 2000}


def test_a_panel_for_every_seed_and_a_line_for_every_run(store):
    assert len(real.vectors(POINTS["13 random"], store).axes) == 2
    (axes,) = real.curves(POINTS["13 random"], store).axes
    assert len(axes.lines) == 2 + 1  # and their mean


def test_gsm8k_is_asked_of_qwen_alone_and_what_was_trained_is_not_trained_again():
    assert not any(point.trial.task.startswith("gsm8k") for point in CLAIM.points)
    points = real.points_of(claim_of("real-qwen"))
    carried = points["13 random, gsm8k"].tests(0.025)[0]
    assert carried.training() == points["13 random"].tests(0.025)[0].training()
    assert points["13 random, trained on gsm8k, boxed"].seeds == 1
    assert replace(carried, task="gsm8k, boxed") in points["13 random, gsm8k, boxed"].tests(0.025)


def test_captions_name_the_file_the_problems_and_the_seeds():
    cells = json.loads((ROOT / "notebooks" / "17_a_real_model.ipynb").read_text(encoding="utf-8"))["cells"]
    figures = [cell["metadata"].get("mystnb", {}).get("figure") for cell in cells]
    captions = {figure["name"]: figure["caption"] for figure in figures if figure}
    assert set(captions) == {"fig-real-smollm2", "fig-real-v", "fig-real-curves", "fig-real-qwen"}
    for name, caption in captions.items():
        claim = claim_of("real-qwen" if "qwen" in name else "real-smollm2")
        thirteen = real.points_of(claim)["13 random"]
        assert f"{REAL[thirteen.trial.base][:8]}…" in caption
        if name in ("fig-real-v", "fig-real-curves", "fig-real-qwen"):
            assert {3: "three", 5: "five"}[thirteen.seeds] in caption.lower()
    assert POINTS["13 random"].trial.prompts * 8 * POINTS["13 random"].trial.steps == 2560
    assert "2,560 answers" in captions["fig-real-v"]
