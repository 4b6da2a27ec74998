"""The lab: what is run, what is kept, which learning rate is taken, and what an interruption costs."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from tinylora_lite.cli import main
from tinylora_lite.lab import running, scoring
from tinylora_lite.lab.claim import Claim, Point, Verdict
from tinylora_lite.lab.claims import claim_of, claims, information
from tinylora_lite.lab.estimate import Estimate
from tinylora_lite.lab.plan import POPULATION, jobs, missing, progress_of
from tinylora_lite.lab.statistics import share_of_gain, smallest_reaching, verdict_between, verdict_on
from tinylora_lite.lab.store import Store
from tinylora_lite.lab.trial import Trial

POINT = Point("13 random", Trial(), rates=(0.1, 0.2), seeds=3, sweep_seeds=2)


def record(accuracy: float, parameters: int = 13) -> dict:
    return {"parameters": parameters, "scores": {"sampled": {"accuracy": accuracy}, "greedy": {"accuracy": accuracy}}}


def fill(store: Store, trials: list[Trial], accuracy) -> None:
    for trial in trials:
        store.add(trial, record(accuracy(trial) if callable(accuracy) else accuracy))


def test_records_are_found_again_and_a_torn_line_is_run_again(tmp_path):
    store = Store(tmp_path)
    fill(store, [Trial(seed=0), Trial(seed=1), Trial(base="other", seed=0)], 0.123456789)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.jsonl", "qwen2-0.4m.jsonl"]
    path = tmp_path / "qwen2-0.4m.jsonl"
    path.write_text(path.read_text()[:-20])
    again = Store(tmp_path)
    assert Trial(seed=0) in again
    assert Trial(seed=1) not in again
    assert again[Trial(seed=0)]["scores"]["sampled"]["accuracy"] == 0.12346
    fill(again, [Trial(seed=1)], 0.5)
    assert len(Store(tmp_path)) == 3


def test_a_record_of_unknown_settings_is_named(tmp_path):
    (tmp_path / "qwen2-0.4m.jsonl").write_text(json.dumps({"trial": {"wings": 2}}) + "\n")
    with pytest.raises(ValueError, match=r"qwen2-0\.4m\.jsonl holds a record .*wings"):
        Store(tmp_path)


def test_a_sweep_is_scored_on_validation_and_goes_on_while_the_best_rate_is_at_its_end(tmp_path):
    store = Store(tmp_path)
    first = missing(POINT, store)
    assert {trial.split for trial in first} == {"validation"}
    assert {(trial.learning_rate, trial.seed) for trial in first} == {(0.1, 0), (0.1, 1), (0.2, 0), (0.2, 1)}
    fill(store, first, lambda trial: trial.learning_rate)  # the larger the better
    for further in [0.2 * 2**k for k in range(1, POINT.reach + 1)]:
        assert POINT.rate(store) is None
        assert {trial.learning_rate for trial in missing(POINT, store)} == {further}
        fill(store, missing(POINT, store), lambda trial: trial.learning_rate)
    assert POINT.rate(store) == 0.2 * 2**POINT.reach  # and no further
    tests = missing(POINT, store)
    assert {(trial.split, trial.learning_rate, trial.seed) for trial in tests} == {
        ("test", 0.2 * 2**POINT.reach, s) for s in range(3)
    }
    fill(store, tests[:2], 0.5)
    assert missing(POINT, store) == tests[2:]
    fill(store, tests[2:], 0.5)
    assert missing(POINT, store) == []


def test_the_rate_is_the_one_of_the_best_mean_over_seeds(tmp_path):
    store = Store(tmp_path)
    point = replace(POINT, rates=(0.1, 0.2, 0.4))
    score = {(0.1, 0): 0.3, (0.1, 1): 0.3, (0.2, 0): 0.6, (0.2, 1): 0.6, (0.4, 0): 0.9, (0.4, 1): 0.1}
    fill(store, missing(point, store), lambda trial: score[trial.learning_rate, trial.seed])
    assert point.rate(store) == 0.2
    follower = Point("like it", Trial(projection_seed=7), seeds=1, like=point)
    assert [trial.learning_rate for trial in missing(follower, store)] == [0.2]


def test_trials_share_a_batch_where_a_population_can_hold_them():
    alike = [Trial(seed=s, n_tie=n, learning_rate=r) for s in range(3) for n in (1, 4) for r in (0.1, 0.2)]
    apart = [
        Trial(rank=1),
        Trial(u=2),
        Trial(method="sft", trained_on="demonstrations: own"),
        Trial(split="validation"),
        Trial(precision="bf16"),
        Trial(numbers="all weights"),
        Trial(numbers="all weights", seed=1),
        Trial(method="none"),
    ]
    found = jobs([*alike, *apart, *alike])
    assert sorted(map(len, found)) == sorted([POPULATION, len(alike) - POPULATION] + [1] * len(apart))
    with pytest.raises(ValueError, match="one by one"):
        running.run_trials([Trial(), Trial(rank=1)])


def test_shares_of_the_gain_and_verdicts(tmp_path):
    store = Store(tmp_path)
    base, full = Point("base", Trial(method="none"), seeds=2), Point("full", Trial(numbers="all weights"), seeds=2)
    small, large = Point("small", Trial(n_tie=7), seeds=2), Point("large", Trial(n_tie=1), seeds=2)
    for point, values in ((base, (0.2, 0.2)), (full, (0.8, 0.8)), (small, (0.49, 0.51)), (large, (0.77, 0.79))):
        fill(store, point.tests(0.1), lambda trial, values=values: values[trial.seed])
    share = share_of_gain(small, full, base, store)
    assert share.mean == pytest.approx(0.5)
    # Student's t with one degree of freedom is 12.706; the standard error of 0.49 and 0.51 is 0.01.
    assert share.high - share.low == pytest.approx(2 * 12.706 * 0.01 / 0.6, rel=1e-3)
    assert smallest_reaching(0.9, (small, large), full, base, store) == "large"
    assert smallest_reaching(0.99, (small, large), full, base, store) == "none of these"
    found = [Estimate(0.5, *ends, ()) for ends in ((0.5, 0.6), (0.4, 0.6), (0.4, 0.49))]
    touching = [verdict_on(estimate, 0.5, strictly=False) for estimate in found]
    assert touching == ["reproduced", "undecided", "not reproduced"]
    assert verdict_on(found[0], 0.5) == "undecided"
    low, high = Estimate(0.3, 0.2, 0.4, ()), Estimate(0.7, 0.6, 0.8, ())
    assert (verdict_between(high, low), verdict_between(low, high)) == ("reproduced", "not reproduced")
    with pytest.raises(ValueError, match="not all runs of other"):
        share_of_gain(Point("other", Trial(n_tie=2)), full, base, store)


def test_the_interval_of_a_share_holds_the_errors_of_ceiling_and_floor(tmp_path):
    """Against draws of all three means, each from its own standard error."""
    store, rng = Store(tmp_path), np.random.default_rng(0)
    points = [Point(n, Trial(n_tie=k), seeds=40) for k, n in enumerate(("own", "full", "base"), start=1)]
    values = [rng.normal(mean, sd, 40) for mean, sd in ((0.5, 0.05), (0.8, 0.08), (0.3, 0.02))]
    for point, of_seeds in zip(points, values, strict=True):
        fill(store, point.tests(0.1), lambda trial, of_seeds=of_seeds: float(of_seeds[trial.seed]))
    share = share_of_gain(*points, store)
    own, full, base = (rng.normal(v.mean(), v.std(ddof=1) / 40**0.5, 100_000) for v in values)
    low, high = np.percentile((own - base) / (full - base), (2.5, 97.5))
    assert (share.low, share.high) == pytest.approx((low, high), abs=0.005)
    alone = 1.96 * values[0].std(ddof=1) / 40**0.5 / (values[1].mean() - values[2].mean())
    assert (share.high - share.low) / 2 > 1.2 * alone


def test_a_rate_is_found_again_to_the_last_digit(tmp_path):
    trial = Trial(learning_rate=1 / 3)
    Store(tmp_path).add(trial, {"scores": {"sampled": {"accuracy": 2 / 3}}})
    again = Store(tmp_path)
    assert trial in again
    assert again[trial]["scores"]["sampled"]["accuracy"] == 0.66667


def test_a_run_that_diverges_is_a_record_that_every_reader_takes(tmp_path, monkeypatch):
    def diverges(*_, **__):
        raise FloatingPointError("the gradient is not finite")

    for name in ("fit", "train_lora"):
        monkeypatch.setattr(running, name, diverges)
    for trial, numbers in (
        (Trial(), 13),
        (Trial(numbers="all weights"), 437_184),
        (Trial(numbers="LoRA", rank=1), 9408),
        (Trial(method="sft", trained_on="demonstrations: careful", steps=60), 13),
    ):
        (record,) = running.run_trials([trial])
        assert (record["diverged"], record["parameters"]) == (True, numbers)
        assert record["scores"]["sampled"]["accuracy"] == record["scores"]["greedy"]["lenient"] == 0.0
        bits = information.demonstration_bits if trial.method == "sft" else information.reward_bits
        assert bits(record) == pytest.approx(0.0, abs=1e-3)


def test_every_claim_asks_for_enough_seeds_and_has_a_name_of_its_own():
    assert [claim.name for claim in claims().values()] == list(claims())
    for claim in claims().values():
        assert claim.points
        for point in claim.points:
            assert point.seeds >= 3, (claim.name, point.label)
            named = "of the rate" in point.label  # a rate that a claim sets by itself
            assert point.rates or point.like or named or point.trial.method in ("none", "noise"), point.label


CLAIM_OF_ONES_OWN = """
from dataclasses import replace
from tinylora_lite.lab.claims.rl_parameters import CLAIM as OTHER, THIRTEEN
point = replace(THIRTEEN, trial=replace(THIRTEEN.trial, sigma="split"), seeds=3)
CLAIM = replace(OTHER, name="mine", points=(point,))
"""


def test_a_claim_of_ones_own_comes_from_a_file(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(CLAIM_OF_ONES_OWN)
    assert claim_of(str(path)).name == "mine"
    assert main(["lab", "list", str(path), "--folder", str(tmp_path / "records"), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (row["claim"], row["recorded"], row["missing"]) == ("mine", 0, 9)  # 3 rates of 2 seeds, and 3 seeds
    for name, message in (("nothing", "no claim named 'nothing'"), (str(tmp_path / "no.py"), "no file")):
        assert main(["lab", "list", name]) == 1
        assert message in capsys.readouterr().err
    path.write_text("CLAIM = 3")
    assert main(["lab", "list", str(path)]) == 1
    assert "must define CLAIM" in capsys.readouterr().err


def test_an_empty_lab_says_not_yet_run(tmp_path, capsys):
    assert main(["lab", "table", "--folder", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["finding"] for row in rows} == {"not yet run"}
    assert main(["lab", "run"]) == 1
    assert "say which claim to run" in capsys.readouterr().err


def test_the_table_compares_by_the_score_asked_for(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("tinylora_lite.lab.plan.rows_of", lambda chosen, store: seen.append(store.score) or [])
    for words in ([], ["--score", "greedy"]):
        assert main(["lab", "table", "--folder", str(tmp_path), *words]) == 0
    assert seen == ["sampled", "greedy"]


IMPORTS = """
import sys
from tinylora_lite.lab.claims import claims, everything
from tinylora_lite.lab.plan import progress_of
from tinylora_lite.lab.store import Store

print({name: progress_of(claim, Store(claim.folder)) for name, claim in everything().items()})
assert {"torch", "transformers", "matplotlib", "scipy"}.isdisjoint(sys.modules), "a list should not wait for them"
"""


def test_claims_are_listed_without_torch_and_matplotlib():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert "'chapters': {'recorded': " in done.stdout


def test_a_claim_runs_to_its_end_and_is_not_run_twice(tmp_path, monkeypatch):
    """With real runs of the smallest kind: one step, few problems."""
    monkeypatch.setattr(scoring, "SWEEP_PROBLEMS", 4)
    task = running.task_of("nano", "qwen2-0.4m")
    few = replace(task, test=task.test[:6])
    monkeypatch.setattr(running, "task_of", lambda name, base: few)
    monkeypatch.setattr(scoring, "task_of", lambda name, base: few)
    point = replace(POINT, trial=Trial(steps=1), rates=(0.1,), seeds=2, sweep_seeds=1, reach=0)
    claim = Claim(
        "tiny", 0, "", "", "", (point,), draw=lambda store: None, judge=lambda store: Verdict("", "undecided")
    )
    store = Store(tmp_path)
    while trials := missing(point, store):
        for members in jobs(trials):
            for trial, found in zip(members, running.run_trials(members), strict=True):
                store.add(trial, found)
    assert progress_of(claim, Store(tmp_path)) == {"recorded": 3, "missing": 0}
    (first, second) = point.records(store)
    assert first["parameters"] == 13
    assert len(first["curve"]) == 1
    assert len(first["vectors"]) == 13
    assert first["population"] == 2
    assert first["curve"] != second["curve"]
    assert {"tinylora_lite", "torch", "machine"} <= first["environment"].keys()
    assert set(first["scores"]) == {"sampled", "greedy"}


def test_what_the_command_line_cannot_do_it_says_in_a_line(tmp_path, capsys):
    broken, plain, file = tmp_path / "broken.py", tmp_path / "plain.py", tmp_path / "records"
    broken.write_text("CLAIM = Claim(\n")
    plain.write_text("CLAIM = 13\n")
    file.write_text("")
    for arguments, message in (
        (["list", str(broken)], "broken.py does not run: SyntaxError"),
        (["list", str(plain)], "must define CLAIM"),
        (["list", str(tmp_path / "none.py")], "there is no file"),
        (["list", "tyings"], "no claim named 'tyings'; there are: rl-parameters"),
        (["list", "--folder", str(file)], "records is a file; records lie in a folder"),
        (["draw", "tying", "--out", str(tmp_path)], "is a folder; --out takes the picture's name"),
        (["draw", "tying", "size", "--out", str(tmp_path / "x.svg")], "--out is for one claim"),
        (["run"], "say which claim to run"),
    ):
        assert main(["lab", *arguments]) == 1
        error = capsys.readouterr().err
        assert message in error, arguments
        assert error.count("\n") == 1
    for minutes in ("-3", "nan", "soon"):
        with pytest.raises(SystemExit):
            main(["lab", "run", "tying", "--minutes", minutes])
    assert sorted(tmp_path.iterdir()) == [broken, plain, file]
