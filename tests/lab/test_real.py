"""Real bases in the lab: found by hash, trials that go on, answers that are kept, rates chosen with caution."""

import json
import shutil
from dataclasses import replace

import pytest

from tinylora_lite import nano
from tinylora_lite.lab import running
from tinylora_lite.lab.claims import claim_of
from tinylora_lite.lab.real import load_base
from tinylora_lite.lab.registered import Cautious, paired
from tinylora_lite.lab.store import Store
from tinylora_lite.lab.tasks import task_of
from tinylora_lite.lab.trial import REAL, Trial

TRIAL = Trial(base="tiny", task="words-1", n_tie=4, prompts=2, steps=2, split="validation")


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A nano base in the place of a real one."""
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path))
    monkeypatch.setitem(REAL, "tiny", "ab12")
    monkeypatch.setattr(running, "SWEEP_PROBLEMS", 8)
    folder = tmp_path / "lab" / "bases" / "tiny"
    shutil.copytree(nano.CHECKPOINTS / "qwen2-0.4m", folder)
    (folder / "gguf.json").write_text(json.dumps({"sha256": "ab12"}))
    return folder


def test_a_checkpoint_of_another_file_or_none_is_refused(checkpoint, monkeypatch):
    model, _ = load_base("tiny")
    assert not model.training
    monkeypatch.setitem(REAL, "tiny", "cd34")
    with pytest.raises(ValueError, match=r"ab12.*cd34"):
        load_base("tiny")
    (checkpoint / "gguf.json").unlink()
    with pytest.raises(FileNotFoundError, match="no checkpoint of tiny"):
        load_base("tiny")


@pytest.mark.parametrize("numbers", ["random", "LoRA"])
def test_a_trial_that_was_stopped_goes_on_after_its_last_step(checkpoint, monkeypatch, numbers):
    trial = replace(TRIAL, numbers=numbers)
    (whole,) = running.run_trials([trial])
    assert whole["file_sha256"] == "ab12"
    assert whole["steps"]["reward"] == pytest.approx(whole["curve"], abs=1e-4)
    assert len(whole["curve"]) == len(whole["steps"]["norm"]) == 2
    shutil.rmtree(checkpoint.parents[1] / "runs")
    with monkeypatch.context() as patch:
        patch.setattr(running, "evaluate", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            running.run_trials([trial])
    with monkeypatch.context() as patch:
        patch.setattr("tinylora_lite.training.loop.update", None)  # not called again
        (resumed,) = running.run_trials([trial])
    same = ("curve", "scores", "vectors", "norm", "parameters", "tokens")
    assert {key: resumed[key] for key in same} == {key: whole[key] for key in same}


def test_a_test_keeps_its_answers_and_what_each_earned_beside_the_record(checkpoint, monkeypatch, tmp_path):
    task = task_of("words-1", "tiny")
    monkeypatch.setattr(running, "task_of", lambda *_: replace(task, test=task.test[:6]))
    trial = replace(TRIAL, method="none", split="test")
    (record,) = running.run_trials([trial])
    store = Store(tmp_path / "records")
    store.add(trial, record)
    assert "answers" not in Store(tmp_path / "records")[trial]
    for name, kept in store.answers(trial).items():
        score = record["scores"][name]
        assert len(kept["texts"]) == len(kept["strict"]) == 6
        assert kept["strict"].count("1") / 6 == score["accuracy"]
        assert kept["lenient"].count("1") / 6 == score["lenient"]
        right = [task.score(text, example.gold) for text, example in zip(kept["texts"], task.test, strict=False)]
        assert all(earned == "0" or worth for earned, worth in zip(kept["strict"], right, strict=True))


@pytest.mark.parametrize(
    ("accuracy", "chosen"),
    [
        ({0.05: 0.2, 0.1: 0.3, 0.2: 0.25}, 0.1),
        ({0.05: 0.2, 0.1: 0.3, 0.2: 0.05}, 0.05),  # beside a rate that diverges
        ({0.05: 0.2, 0.1: 0.3, 0.2: 0.4, 0.4: 0.02}, 0.1),
        ({0.05: 0.01, 0.1: 0.02, 0.2: 0.01}, 0.05),
    ],
)
def test_a_rate_is_not_taken_beside_one_that_diverges(tmp_path, accuracy, chosen):
    point, store = Cautious("x", Trial(), (0.05, 0.1, 0.2), 2, sweep_seeds=2, reach=1, sweep_from=100), Store(tmp_path)
    while point.rate(store) is None:
        for trial in point.sweep(point.swept(store)[0]):
            assert trial.seed in (100, 101)
            value = accuracy.get(trial.learning_rate, 0.0)
            store.add(trial, {"scores": {"sampled": {"accuracy": value}}, "curve": [0.2]})
    assert point.rate(store) == chosen


def test_the_primary_comparison_is_of_greedy_answers_read_leniently(tmp_path):
    claim, store = claim_of("real-smollm2"), Store(tmp_path)
    gains = {"untrained": [0.0], "13 random": [0.1, 0.12, 0.14, 0.1, 0.14], "LoRA, r = 1": [0.2, 0.24, 0.28, 0.2, 0.28]}
    base, points = claim.points[0], {point.label: point for point in claim.points}
    for label, own in gains.items():
        point = points[label]
        while point.rate(store) is None:
            for trial in point.sweep(point.swept(store)[0]):
                store.add(trial, {"scores": {"sampled": {"accuracy": 0.2}}, "curve": [0.2]})
        for trial, gain in zip(point.tests(point.rate(store)), own, strict=True):
            scores = {"sampled": {"accuracy": 0.9}, "greedy": {"accuracy": 0.8, "lenient": 0.3 + gain}}
            store.add(trial, {"scores": scores, "parameters": 13})
    assert paired(points["13 random"], base, store).mean == pytest.approx(0.12)
    ours, finding = claim.judge(store)
    assert finding == "reproduced"
    assert "share 50%" in ours
