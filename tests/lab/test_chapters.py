"""The runs of the first chapters: what is swept and reported, what the records hold, and that they are the lab's."""

import json
from dataclasses import replace

import pytest

from tinylora_lite import lora_xs, nano
from tinylora_lite.cli import main
from tinylora_lite.lab import running, scoring
from tinylora_lite.lab.bases import config_of
from tinylora_lite.lab.claim import Claim, Point, Verdict
from tinylora_lite.lab.claims import chapters, claim_of, claims, everything
from tinylora_lite.lab.plan import missing, progress_of
from tinylora_lite.lab.running import KEPT, execute, run_trials
from tinylora_lite.lab.store import CHAPTERS, RESULTS, Store
from tinylora_lite.nano.task import task as make_task

CLAIM = chapters.CLAIM


def record(accuracy: float) -> dict:
    return {"parameters": 13, "scores": {kind: {"accuracy": accuracy} for kind in ("sampled", "greedy")}}


def test_they_are_run_by_name_and_are_no_row_of_the_table():
    assert claim_of("chapters") is CLAIM
    assert everything().keys() - claims().keys() == {"chapters", "real-smollm2", "real-qwen"}
    assert CLAIM.folder == CHAPTERS != RESULTS
    assert progress_of(CLAIM, Store(CHAPTERS))["missing"] == 0
    assert {trial.key for point in CLAIM.points for trial in point.tests(0.1)}.isdisjoint(
        trial.key for claim in claims().values() for point in claim.points for trial in point.tests(0.1)
    )


def test_no_two_points_share_a_run():
    trials = [trial.key for point in CLAIM.points for trial in (*point.sweep(point.rates), *point.tests(-1.0))]
    assert len(trials) == len(set(trials))


def test_the_rate_is_the_best_of_the_sweep_and_no_other_is_tried(tmp_path):
    store = Store(tmp_path)
    assert chapters.PAPER.rate(store) is None
    for trial, accuracy in zip(chapters.PAPER.sweep((0.1, 0.2, 0.4)), (0.5, 0.4, 0.45), strict=True):
        store.add(trial, record(accuracy))
    store.add(chapters.PAPER.tests(0.4)[0], record(0.99))
    assert chapters.PAPER.rate(store) == 0.1
    assert {trial.learning_rate for trial in missing(chapters.PAPER, store)} == {0.1}
    assert chapters.CALIBRATED.rate(store) is None


def test_one_command_sweeps_on_validation_and_reports_the_best_rate_on_test(tmp_path, monkeypatch):
    done = []

    def pretend(trials):
        done.extend(trials)
        return [record(trial.learning_rate) for trial in trials]

    from .test_execute import Pool

    monkeypatch.setattr(running, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(running, "run_trials", pretend)
    assert execute([CLAIM], Store(tmp_path), workers=1)
    swept = {point.trial.shape(): max(point.rates) for point in CLAIM.points if point.rates}
    reported = [trial for trial in done if trial.split == "test" and trial.shape() in swept]
    assert len(reported) == sum(point.seeds for point in CLAIM.points if point.rates)
    assert all(trial.learning_rate == swept[trial.shape()] for trial in reported)
    assert {trial.key for trial in done} == {
        trial.key
        for point in CLAIM.points
        for trial in (*point.sweep(point.rates), *point.tests(max(point.rates, default=point.trial.learning_rate)))
    }
    assert json.loads((tmp_path / "qwen2-1m.jsonl").read_text().splitlines()[0])["trial"]["base"] == nano.BASE


def test_lora_xs_and_lora_train_what_they_say(monkeypatch):
    made = {p.trial.rank: config_of(p.trial) for p in (chapters.XS_ONE, chapters.XS_TWO["split"])}
    made[32] = config_of(chapters.XS_LARGE["right"].trial)
    assert made == {1: lora_xs(1, sigma="right"), 2: lora_xs(2, sigma="split"), 32: lora_xs(32, sigma="right")}
    small = make_task(64, 8, 8)
    monkeypatch.setattr(running, "task_of", lambda name, base: small)
    monkeypatch.setattr(scoring, "task_of", lambda name, base: small)
    found = {}
    for point in (chapters.XS_ONE, chapters.XS_LARGE["right"], chapters.LORA):
        (made_record,) = run_trials([replace(point.trial, steps=1)])
        found[point.trial.numbers, point.trial.rank] = (made_record["parameters"], len(made_record["vectors"]))
        assert made_record["scores"]["sampled"]["n"] == made_record["scores"]["greedy"]["n"] == 8
    # 50,176 numbers would make a record of megabytes.
    assert found == {("LoRA-XS", 1): (49, 49), ("LoRA-XS", 32): (50_176, 0), ("LoRA", 1): (15_680, 0)}


def test_several_answers_to_each_problem_give_pass_at_k_and_styles(monkeypatch):
    small = make_task(8, 8, 30)
    monkeypatch.setattr(running, "task_of", lambda name, base: small)
    monkeypatch.setattr(scoring, "task_of", lambda name, base: small)
    (found,) = run_trials([chapters.BASE.trial])
    assert (found["scores"]["sampled"]["samples"], found["scores"]["greedy"]["samples"]) == (8, 1)
    at = found["pass_at"]
    assert list(at) == ["1", "2", "4", "8"]
    assert at["1"] == pytest.approx(found["scores"]["sampled"]["accuracy"])
    assert at["1"] < at["2"] < at["4"] < at["8"]
    writers = found["writers"]
    assert sum(style["share"] for style in writers.values()) == pytest.approx(1.0)
    assert sum(style["share"] * style["accuracy"] for style in writers.values()) == pytest.approx(at["1"])
    assert writers["chatty"]["accuracy"] == 0.0
    assert "pass_at" not in run_trials([replace(chapters.BASE.trial, samples=1)])[0]


def test_the_committed_records_meet_the_bars_of_the_world():
    store = Store(CHAPTERS)
    (base,) = chapters.BASE.records(store)
    assert 0.25 <= base["scores"]["sampled"]["accuracy"] <= 0.65
    assert base["scores"]["sampled"]["n"] == 1000
    assert base["pass_at"]["8"] >= 0.80
    everything = chapters.ALL.estimate(store)
    assert len(everything.values) >= 5
    assert everything.mean >= 0.92


def test_the_committed_records_are_whole():
    """Every step's metrics by the names that training gives them, and v where it is short enough."""
    for found in Store(CHAPTERS).values():
        if found["trial"].get("method") == "none":
            continue
        assert len(found["curve"]) == found["trial"]["steps"] == 30
        assert all(len(column) == 30 for column in found["steps"].values())
        assert {"gradient_norm", "seconds"} <= found["steps"].keys()
        if found["trial"]["numbers"] not in ("LoRA", "all weights") if "numbers" in found["trial"] else True:
            assert len(found["vectors"]) == (found["parameters"] if found["parameters"] <= KEPT else 0)
            assert {"frac_reward_zero_std", "entropy", "truncated", "clipped", "norm"} <= found["steps"].keys()


def test_their_folder_is_not_mixed_with_the_lab_s(capsys):
    assert main(["lab", "list", "chapters", "rank"]) == 1
    assert "name one alone" in capsys.readouterr().err
    assert main(["lab", "list", "chapters", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (row["claim"], row["missing"]) == ("chapters", 0)


def test_a_claim_of_ones_own_keeps_its_records_with_the_lab_s():
    point = Point("base", chapters.BASE.trial)
    made = Claim("mine", 0, "", "", "", (point,), lambda store: None, lambda store: Verdict("", "undecided"))
    assert made.folder == RESULTS
