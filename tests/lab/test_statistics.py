"""Differences seed by seed, and the smallest update that recovers a share of the gain."""

import numpy as np
import pytest
from scipy import stats

from tinylora_lite.lab.claim import Point
from tinylora_lite.lab.estimate import Estimate
from tinylora_lite.lab.statistics import (
    difference,
    smallest_count,
    smallest_reaching,
    verdict_of_replicates,
    verdict_on,
    verdict_over,
)
from tinylora_lite.lab.store import Store
from tinylora_lite.lab.trial import Trial

BASE = Point("base", Trial(method="none", learning_rate=0.0), seeds=3)
FULL = Point("full", Trial(numbers="all weights"), seeds=3)
LADDER = [Point(f"{n}", Trial(n_tie=n), seeds=3) for n in (49, 7, 1)]
COUNTS = {BASE: 0, LADDER[0]: 1, LADDER[1]: 7, LADDER[2]: 49, FULL: 400_000}


@pytest.fixture
def store(tmp_path):
    def fill(values: dict[Point, tuple[float, ...]]) -> Store:
        store = Store(tmp_path)
        for point, accuracies in values.items():
            for trial, accuracy in zip(point.tests(point.trial.learning_rate), accuracies, strict=False):
                scores = {"sampled": {"accuracy": accuracy}}
                store.add(trial, {"parameters": COUNTS.get(point, 1), "scores": scores})
        return store

    return fill


def test_a_difference_is_taken_seed_by_seed(store):
    """Two shapes that a seed moves alike differ by less than each of them varies."""
    high, low = (0.2, 0.5, 0.8), (0.19, 0.48, 0.78)
    gap = difference(LADDER[0], LADDER[1], store({LADDER[0]: high, LADDER[1]: low}))
    reference = stats.ttest_rel(high, low).confidence_interval()
    assert (gap.low, gap.high) == pytest.approx((reference.low, reference.high), abs=1e-4)
    assert gap.mean == pytest.approx(0.05 / 3, abs=1e-4)
    assert verdict_on(gap) == "reproduced"
    assert verdict_on(Estimate(-0.1, -0.2, -0.01, ())) == "not reproduced"
    assert verdict_on(Estimate(0.1, -0.2, 0.4, ())) == "undecided"
    assert verdict_on(Estimate(0.1, 0.0, 0.4, ())) == "undecided"


def test_only_the_seeds_of_both_are_compared(store):
    gap = difference(LADDER[0], LADDER[1], store({LADDER[0]: (0.3, 0.4, 0.9), LADDER[1]: (0.2, 0.3)}))
    assert gap.mean == pytest.approx(0.1)
    assert len(gap.values) == 2


def test_the_smallest_count_and_its_interval(store):
    sure = {BASE: (0.2,) * 3, FULL: (0.8,) * 3, LADDER[0]: (0.3,) * 3, LADDER[1]: (0.6,) * 3, LADDER[2]: (0.78,) * 3}
    found = store(sure)
    for share, count in ((0.1, 1), (0.5, 7), (0.9, 49), (0.99, 400_000)):
        for ladder in (LADDER, LADDER[::-1]):
            assert smallest_count(share, ladder, FULL, BASE, found) == (count, count, count)
    assert smallest_reaching(0.1, LADDER[::-1], FULL, BASE, found) == LADDER[0].label


def test_points_are_compared_by_the_score_that_the_store_says_and_rates_chosen_by_sampled_answers(tmp_path):
    store = Store(tmp_path)
    point = Point("swept", Trial(), rates=(0.1, 0.2), seeds=2)
    for trial in point.sweep((0.1, 0.2, 0.4)):
        store.add(trial, {"scores": {"sampled": {"accuracy": 1 - abs(trial.learning_rate - 0.2)}}})
    for seed, trial in enumerate(point.tests(0.2)):
        store.add(trial, {"scores": {"sampled": {"accuracy": 0.1 * seed}, "greedy": {"accuracy": 0.5 + 0.1 * seed}}})
    assert point.estimate(store).mean == pytest.approx(0.05)
    assert point.estimate(store.scored("greedy")).mean == pytest.approx(0.55)
    assert point.estimate(store.scored("greedy"), "sampled").mean == pytest.approx(0.05)
    assert store.score == "sampled"


def test_a_verdict_over_several_settings():
    yes, no, open_ = "reproduced", "not reproduced", "undecided"
    assert verdict_over([yes, yes]) == yes
    assert verdict_over([yes, open_]) == verdict_over([yes, no]) == "reproduced in part"
    assert verdict_over([no, open_]) == no
    assert verdict_over([open_, open_]) == verdict_over([]) == open_


def test_replicates_of_one_setting_must_agree():
    yes, no, open_ = "reproduced", "not reproduced", "undecided"
    assert [verdict_of_replicates([one, one]) for one in (yes, no, open_)] == [yes, no, open_]
    assert {verdict_of_replicates(two) for two in ([yes, no], [no, open_], [yes, open_])} == {open_}


def test_a_rung_that_is_not_sure_widens_the_interval(store):
    """At seven numbers a resample passes the bar of 0.68 or not, and the interval holds both outcomes."""
    values = {BASE: (0.2,) * 3, FULL: (0.8,) * 3, LADDER[0]: (0.3,) * 3}
    values |= {LADDER[1]: (0.3, 0.8, 0.8), LADDER[2]: (0.79,) * 3}
    count, low, high = smallest_count(0.8, LADDER, FULL, BASE, store(values))
    assert np.mean(values[LADDER[1]]) < 0.68
    assert (count, low, high) == (49, 7, 49)


def test_a_ladder_that_was_not_run_is_refused(store):
    with pytest.raises(ValueError, match="run the claim first"):
        smallest_count(0.5, LADDER, FULL, BASE, store({BASE: (0.2,) * 3}))
    with pytest.raises(ValueError, match="not all runs of 49 and 7"):
        difference(LADDER[0], LADDER[1], store({LADDER[0]: (0.2,) * 3}))
