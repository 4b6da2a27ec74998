"""The study: what is recorded is not run again, rates are chosen on validation, intervals are over seeds."""

import json
from dataclasses import replace

import pytest

from tinylora_lite import lora_xs
from tinylora_lite.lab import study
from tinylora_lite.lab.study import CALIBRATED, CURVE, HEADLINES, LORA, LORA_XS, PAPER, XS_LARGE, XS_ONE, XS_TWO, Trial
from tinylora_lite.nano.task import task as make_task


def write(folder, trial: Trial, sampled: float) -> None:
    path = study.path_of(trial, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    score = {"accuracy": sampled}
    path.write_text(json.dumps({"trial": {}, "sampled": score, "greedy": score, "run": {}}))


def test_every_trial_has_a_name_of_its_own():
    trials = [*study.sweep(), *HEADLINES, *CURVE, *study.sweep(LORA_XS), *LORA_XS]
    names = [trial.name for trial in trials]
    assert len(set(names)) == len(names)
    assert all(name.split("/")[1] in ("validation", "test") for name in names)


def test_the_rate_is_chosen_on_the_validation_split_of_its_own_sweep(tmp_path):
    assert study.best_rate(PAPER, tmp_path) == PAPER
    for rate, accuracy in ((0.1, 0.5), (0.2, 0.4), (0.4, 0.45)):
        write(tmp_path, replace(PAPER, learning_rate=rate, split="validation"), accuracy)
    write(tmp_path, replace(PAPER, learning_rate=0.4), 0.99)
    assert study.best_rate(replace(PAPER, seed=3), tmp_path) == replace(PAPER, seed=3, learning_rate=0.1)
    assert study.best_rate(CALIBRATED, tmp_path) == CALIBRATED


def test_what_is_recorded_is_read_and_not_run(tmp_path, monkeypatch):
    write(tmp_path, PAPER, 0.6)
    monkeypatch.setattr(study, "train_grpo", lambda *a, **k: pytest.fail("it was run again"))
    assert study.run_trial(PAPER, tmp_path)["sampled"]["accuracy"] == 0.6


def test_the_interval_over_seeds_is_student_s(tmp_path):
    for seed, accuracy in enumerate((0.5, 0.6, 0.7)):
        write(tmp_path, replace(PAPER, seed=seed), accuracy)
    found = study.over_seeds(study.seeds_of(PAPER, tmp_path))
    # t(0.975, 2) = 4.3027, standard error 0.1 / sqrt(3)
    assert found == pytest.approx({"accuracy": 0.6, "low": 0.6 - 0.24841, "high": 0.6 + 0.24841, "seeds": 3}, abs=1e-4)
    with pytest.raises(ValueError, match="at least two"):
        study.over_seeds(study.seeds_of(PAPER, tmp_path)[:1])


def test_a_trial_runs_and_leaves_a_record(tmp_path, monkeypatch):
    small = make_task(64, 8, 8)
    monkeypatch.setattr(study.nano, "task", lambda: small)
    trial = replace(PAPER, steps=1)
    record = study.run_trial(trial, tmp_path)
    stored = json.loads(study.path_of(trial, tmp_path).read_text())
    assert stored == record
    assert len(record["vectors"]) == 13
    assert record["run"]["settings"]["learning_rate"] == trial.learning_rate
    assert record["sampled"]["n"] == record["greedy"]["n"] == 8


def test_lora_xs_and_lora_train_what_they_say(tmp_path, monkeypatch):
    small = make_task(64, 8, 8)
    monkeypatch.setattr(study.nano, "task", lambda: small)
    made = {trial.rank: study.adapter_config(trial) for trial in (XS_ONE, replace(XS_TWO, sigma="split"), XS_LARGE)}
    assert made == {1: lora_xs(1), 2: lora_xs(2, sigma="split"), 32: lora_xs(32, sigma="right")}
    parameters = {}
    for trial in (XS_LARGE, LORA):
        record = study.run_trial(replace(trial, steps=1), tmp_path)
        parameters[trial.method, trial.rank] = (record["run"]["parameters"], len(record["vectors"]))
    # 50,176 numbers would make a record of megabytes.
    assert parameters == {("LoRA-XS", 32): (50_176, 0), ("LoRA", 1): (15_680, 0)}


def test_one_command_sweeps_on_validation_and_reports_the_best_rate_on_test(tmp_path, monkeypatch):
    def pretend(trial: Trial, folder) -> dict:
        write(folder, trial, accuracy := trial.learning_rate)
        done.append(trial)
        return {"sampled": {"accuracy": accuracy}, "greedy": {"accuracy": accuracy}, "seconds": 1.0}

    done: list[Trial] = []
    monkeypatch.setattr(study, "run_trial", pretend)
    monkeypatch.setattr("sys.argv", ["study", "lora-xs", "--seeds", "3", "4", "--folder", str(tmp_path)])
    study.main()
    count = len(study.sweep(LORA_XS))
    swept, reported = done[:count], done[count:]
    assert {trial.split for trial in swept} == {"validation"}
    assert {(trial.split, trial.seed) for trial in reported} == {("test", 3), ("test", 4)}
    assert len(reported) == 2 * len(LORA_XS)
    assert all(trial.learning_rate == max(study.rates_of(trial)) for trial in reported)


def test_the_committed_records_meet_the_bars_of_the_world():
    base = study.run_base()
    assert 0.25 <= base["sampled"]["accuracy"] <= 0.65
    assert base["sampled"]["n"] == 1000
    assert base["pass_at"]["8"] >= 0.80
    everything = study.over_seeds(study.seeds_of(study.ALL))
    assert everything["seeds"] >= 5
    assert everything["accuracy"] >= 0.92
