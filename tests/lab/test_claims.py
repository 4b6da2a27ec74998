"""Every claim on made-up records: it draws, it judges, and its verdict turns when the records do."""

import hashlib
import math
from collections.abc import Callable
from itertools import combinations
from typing import get_args

import numpy as np
import pytest
from matplotlib.figure import Figure

from tinylora_lite.lab.claim import Claim, Finding, Verdict
from tinylora_lite.lab.claims import claims, controls, family, information, seeds, size
from tinylora_lite.lab.plan import missing, progress_of
from tinylora_lite.lab.store import Store
from tinylora_lite.lab.trial import Trial

CONTENT = get_args(Finding)
Accuracy = Callable[[Trial], float]


def jitter(trial: Trial) -> float:
    """A little noise that is the same every time, so that intervals have a width."""
    digest = hashlib.sha256(f"accuracy of {trial.key}".encode()).digest()
    return 0.01 * (digest[0] / 255 - 0.5)


def count_of(trial: Trial) -> int:
    """How many numbers a trial trains."""
    if trial.method == "none":
        return 0
    if trial.numbers == "all weights":
        return 400_000
    if trial.numbers == "LoRA":
        return 20_000 * trial.rank
    if trial.numbers == "LoRA-XS":
        return 49 * trial.rank**2
    return trial.u * (1 if trial.n_tie == "all" else -(-49 // int(trial.n_tie)))


def by_count(trial: Trial) -> float:
    """The more numbers the better, from 30 to 80 %."""
    return 0.3 + 0.5 * math.log1p(count_of(trial)) / math.log1p(400_000) + jitter(trial)


def record(trial: Trial, accuracy: float) -> dict:
    steps, sft = trial.steps, trial.method == "sft"
    score = {"accuracy": accuracy, "lenient": min(1.0, accuracy + 0.1)}
    return {
        "parameters": count_of(trial),
        "scores": dict.fromkeys(("sampled", "greedy", "old skill"), score),
        "curve": [] if sft else list(np.linspace(0.3, accuracy, steps)),
        "lengths": [] if sft else [20.0] * steps,
        "loss": list(np.linspace(1.0, 0.5, steps)) if sft else [],
        "tokens": 20.0 * steps,
        "training_seconds": 10.0,
        "norm": 1.5,
        "vectors": [],
    }


def rate_of(found: dict) -> float:
    return Trial(**found["trial"]).learning_rate


def filled(claim: Claim, store: Store, accuracy: Accuracy) -> Store:
    """All runs of a claim, as the lab would make them: sweeps first, then the seeds."""
    for point in claim.points:
        while trials := missing(point, store):
            for trial in trials:
                store.add(trial, record(trial, accuracy(trial)))
    return store


@pytest.fixture(params=list(claims()))
def claim(request) -> Claim:
    return claims()[request.param]


def test_a_claim_draws_and_judges_its_own_runs_and_no_others(claim, tmp_path, recwarn):
    store = filled(claim, Store(tmp_path), by_count)
    assert progress_of(claim, store)["missing"] == 0
    figure, verdict = claim.draw(store), claim.judge(store)
    assert isinstance(figure, Figure)
    figure.savefig(tmp_path / "figure.svg")
    marks = [line for axes in figure.axes for line in axes.lines if len(line.get_xdata())]
    marks += [c for axes in figure.axes for c in axes.collections]
    assert len(marks) > 3
    assert verdict.finding in CONTENT
    assert verdict.ours.endswith(".")
    assert "nan" not in verdict.ours.lower()
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning | UserWarning)]


def test_a_claim_draws_what_little_there_is(claim, tmp_path, recwarn):
    """A figure must not wait for the last run: half of the records, and none at all."""
    claim.draw(Store(tmp_path / "none")).savefig(tmp_path / "none.svg")
    store = filled(claim, Store(tmp_path / "all"), by_count)
    half = Store(tmp_path / "half")
    for found in list(store.values())[::2]:
        half.add(Trial(**found["trial"]), {key: value for key, value in found.items() if key != "trial"})
    claim.draw(half).savefig(tmp_path / "half.svg")
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning | UserWarning)]


def shifted(which: Callable[[Trial], bool], by: float) -> Accuracy:
    """The trials of a kind are worth so much more, or less; base and ceiling stay."""

    def accuracy(trial: Trial) -> float:
        moved = which(trial) and trial.method != "none" and trial.numbers != "all weights"
        return min(0.99, max(0.01, 0.5 * (trial.method != "none") + 0.2 + jitter(trial) + by * moved))

    return accuracy


TURNS = {
    "rl-parameters": lambda trial: trial.numbers == "random",
    "rank": lambda trial: trial.rank == 2,
    "precision": lambda trial: trial.precision == "fp32",
}


@pytest.mark.parametrize("name", TURNS)
def test_a_verdict_turns_when_the_records_do(name, tmp_path):
    claim = claims()[name]
    better, worse = (
        claim.judge(filled(claim, Store(tmp_path / str(by)), shifted(TURNS[name], by))).finding for by in (0.2, -0.2)
    )
    same = claim.judge(filled(claim, Store(tmp_path / "same"), shifted(TURNS[name], 0.0))).finding
    assert better == "reproduced"
    assert worse == "not reproduced"
    if name != "rl-parameters":  # whose bar is a share of the gain, and not another shape
        assert same == "undecided"


@pytest.mark.parametrize(
    ("name", "few", "many"),
    [("size", (size.LARGEST,), tuple(size.SMALLEST)), ("family", tuple(family.QWEN), tuple(family.LLAMA))],
)
def test_a_base_needs_fewer_numbers_where_the_other_falls_short_with_few(name, few, many, tmp_path):
    claim = claims()[name]
    found = {
        behind: claim.judge(
            filled(claim, Store(tmp_path / "-".join(behind)), shifted(lambda t, b=behind: t.base in b, -0.2))
        )
        for behind in (many, few, ())
    }
    assert [verdict.finding for verdict in found.values()] == ["reproduced", "not reproduced", "undecided"]
    assert "1 [1, 1] times as many" in found[()].ours


def test_one_of_two_bases_of_the_smallest_size_does_not_decide(tmp_path):
    claim = claims()["size"]
    for behind in size.SMALLEST:
        store = filled(claim, Store(tmp_path / behind), shifted(lambda trial, b=behind: trial.base == b, -0.2))
        assert claim.judge(store).finding == "undecided"


def test_a_family_is_judged_by_each_of_its_bases(tmp_path):
    claim = claims()["family"]

    def judged(*behind: str) -> Verdict:
        return claim.judge(filled(claim, Store(tmp_path / "-".join(behind)), shifted(lambda t: t.base in behind, -0.2)))

    for name in family.LLAMA:
        verdict = judged(name)
        assert verdict.finding == "reproduced in part"
        for other, label in family.LLAMA.items():
            level = f"{label}, needs 1 [1, 1] times as many as Qwen2;" in verdict.ours
            assert level == (other != name)
    for name in family.QWEN:
        assert judged(name).finding == "undecided"
    assert judged(*family.QWEN).finding == "not reproduced"


def test_imitation_that_falls_behind_in_one_kind_only_is_a_claim_in_part(tmp_path):
    claim = claims()["sft-parameters"]

    def found(behind: tuple[str, ...]) -> str:
        accuracy = shifted(lambda trial: trial.trained_on.removeprefix("demonstrations: ") in behind, -0.4)
        return claim.judge(filled(claim, Store(tmp_path / "-".join(behind)), accuracy)).finding

    assert found(("stranger", "careful", "own")) == "reproduced"
    assert found(("stranger", "own")) == "reproduced in part"
    assert found(("careful", "own")) == "not reproduced"


def test_demonstrations_that_carry_far_more_bits_in_one_kind_only_are_a_claim_in_part(tmp_path):
    claim = claims()["information"]

    def found(long: tuple[str, ...]) -> str:
        store = filled(claim, Store(tmp_path / "-".join(long)), by_count)
        for trial, old in list(store.items()):
            if trial.method == "sft":
                bits = 100.0 if trial.trained_on.removeprefix("demonstrations: ") in long else 0.01
                again = {key: value for key, value in old.items() if key != "trial"}
                store.add(trial, again | {"loss": [bits] * 60, "tokens": 600.0})
        return claim.judge(store).finding

    assert found(("stranger", "careful", "own")) == "reproduced"
    assert found(("stranger",)) == "reproduced in part"
    assert found(()) == "not reproduced"


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"r = 2 and r = 16 are there; run the claim first"):
        claims()["rank"].judge(Store(tmp_path))


def test_bits_of_rewards_and_of_demonstrations():
    fair = {"curve": [0.5] * 3 + [1.0, 0.0]}
    assert information.reward_bits(fair) == pytest.approx(3 * 256, rel=1e-4)
    # Two steps of 64 demonstrations, 10 tokens each, at one bit a token and then at half a bit.
    shown = {"loss": [math.log(2), math.log(2) / 2], "tokens": 20.0}
    assert information.demonstration_bits(shown) == pytest.approx(64 * 10 * 1.5)
    assert information.base_bits(shown) == pytest.approx(10.0)


def test_the_shares_of_seeds_are_found_again():
    rng = np.random.default_rng(0)
    between, within = rng.normal(0, 0.1, (4000, 1)), rng.normal(0, 0.03, (4000, 3))
    assert seeds.shares(0.5 + between + within) == pytest.approx((0.1, 0.03), rel=0.05)
    assert seeds.shares(0.5 + within)[0] < 0.01
    assert seeds.shares(np.array([[0.4, 0.6], [0.4, 0.6]])) == (0.0, pytest.approx(0.02**0.5))


def test_the_best_of_some_seeds_is_the_mean_over_all_choices(tmp_path):
    store = filled(claims()["seeds"], Store(tmp_path), by_count)
    rng = np.random.default_rng(1)
    points, table = seeds.POINTS[13], []
    for point in points:
        rows = []
        for trial in point.tests(rate_of(point.records(store)[0])):
            reward, accuracy = rng.random(2)
            store.add(trial, record(trial, float(accuracy)) | {"curve": [float(reward)] * 5})
            rows.append((float(reward), float(accuracy)))
        table.append(rows)
    for count in (1, 3, len(points)):
        brute = [
            max(table[i][repeat] for i in chosen)[1]
            for repeat in range(seeds.REPEATS)
            for chosen in combinations(range(len(points)), count)
        ]
        assert seeds.best_of(points, store, count) == pytest.approx(np.mean(brute), abs=1e-4)


def test_controls_take_the_learning_rate_of_what_they_control(tmp_path):
    """A rate chosen by the plain score would itself train on what the control rules out."""
    store = filled(claims()["controls"], Store(tmp_path), by_count)
    for kind, point in controls.TRAINED.items():
        rate = rate_of(point.records(store)[0])
        for other in controls.OTHERS[kind]:
            assert {rate_of(found) for found in other.records(store)} == {rate}


def test_the_slower_control_has_a_quarter_of_the_rate():
    """Of the rate that the book's records chose, whatever it was when the control was written."""
    point = controls.TRAINED["49 LoRA-XS"]
    assert controls.FORMAT_SLOWER.trial.learning_rate == pytest.approx(point.rate(Store()) / 4)
    assert controls.FORMAT_SLOWER in controls.CLAIM.points
