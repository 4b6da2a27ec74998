"""Carrying the runs out: what comes first, what is shared, when it stops, and what an error leaves."""

import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from tinylora_lite.lab import running as executing
from tinylora_lite.lab.claim import Claim, Point, Verdict
from tinylora_lite.lab.store import Store
from tinylora_lite.lab.trial import Trial


class Pool(ThreadPoolExecutor):
    """Threads in the place of processes, so that a test's stand-in for a run is seen there too."""

    _processes = None

    def __init__(self, workers, context, initializer, arguments):
        super().__init__(workers)


@pytest.fixture
def ran(monkeypatch) -> list[list[Trial]]:
    made: list[list[Trial]] = []

    def run_trials(trials):
        made.append(trials)
        return [{"scores": {"sampled": {"accuracy": 0.5 - abs(trial.learning_rate - 0.2)}}} for trial in trials]

    monkeypatch.setattr(executing, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(executing, "run_trials", run_trials)
    return made


def claim(name: str, **settings) -> Claim:
    point = Point(name, Trial(**settings), rates=(0.1, 0.2, 0.4), seeds=3)
    return Claim(name, 0, "", "", "", (point,), draw=lambda store: None, judge=lambda store: Verdict("", "undecided"))


def test_sweeps_come_before_seeds_and_first_claims_before_later_ones(tmp_path, ran):
    first, second, store = claim("first"), claim("second", rank=1), Store(tmp_path)
    left = []
    assert executing.execute([first, second], store, workers=1, report=lambda t, r, count: left.append(count))
    kinds = [(trials[0].rank, trials[0].split, len(trials)) for trials in ran]
    assert kinds == [(2, "validation", 3), (2, "test", 3), (1, "validation", 3), (1, "test", 3)]
    assert {trial.learning_rate for trial in ran[1]} == {0.2}
    assert left == [6, 3, 3, 0]
    ran.clear()
    assert executing.execute([first, second], Store(tmp_path), workers=2)
    assert ran == []


def test_what_two_claims_share_is_run_once(tmp_path, ran):
    assert executing.execute([claim("one"), claim("two")], Store(tmp_path), workers=2)
    trials = [trial.key for made in ran for trial in made]
    assert len(trials) == len(set(trials)) == 6


def test_time_that_is_over_starts_nothing_and_says_so(tmp_path, ran):
    assert not executing.execute([claim("late")], Store(tmp_path), workers=1, seconds=-1)
    assert ran == []


def test_an_error_keeps_what_was_done(tmp_path, ran, monkeypatch):
    good = executing.run_trials

    def run_trials(trials):
        if trials[0].split == "test":
            raise RuntimeError("the disk is full")
        return good(trials)

    monkeypatch.setattr(executing, "run_trials", run_trials)
    with pytest.raises(RuntimeError, match=r"the run .* failed \(RuntimeError: the disk is full\)"):
        executing.execute([claim("broken")], Store(tmp_path), workers=1)
    assert len(Store(tmp_path)) == 3


def test_an_error_in_one_run_keeps_what_ran_beside_it(tmp_path, ran, monkeypatch):
    """The other run ends after the error, and no third one starts."""
    good, failed = executing.run_trials, threading.Event()

    def run_trials(trials):
        if trials[0].rank == 1:
            failed.set()
            raise ValueError("nothing to weigh by")
        failed.wait(10)
        time.sleep(0.2)
        return good(trials)

    monkeypatch.setattr(executing, "run_trials", run_trials)
    both = [claim("broken", rank=1), claim("good"), claim("later", rank=4)]
    with pytest.raises(RuntimeError, match="nothing to weigh by"):
        executing.execute(both, Store(tmp_path), workers=2)
    assert [trial.rank for trial in Store(tmp_path)] == [2] * 3


@pytest.mark.slow
def test_a_process_that_is_ended_from_outside_is_named(tmp_path):
    """As the system does where memory runs out; there is no waiting for ever."""
    ended = threading.Thread(target=_end_children, daemon=True)
    whole = replace(claim("base"), points=(Point("base", Trial(method="none", learning_rate=0.0), seeds=3),))
    ended.start()
    with pytest.raises(RuntimeError, match="terminated abruptly"):
        executing.execute([whole], Store(tmp_path), workers=1)


def _end_children() -> None:
    while not (children := multiprocessing.active_children()):
        time.sleep(0.05)
    time.sleep(0.5)
    for child in children:
        child.kill()


@pytest.mark.slow
def test_processes_make_the_records(tmp_path):
    """With the real pool: a run in another process comes back and is kept."""
    untouched = Point("base", Trial(method="none", learning_rate=0.0), seeds=3)
    whole = replace(claim("base"), points=(untouched,))
    assert executing.execute([whole], Store(tmp_path), workers=2)
    assert len(Store(tmp_path)) == 3
