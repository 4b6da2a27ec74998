"""What chapter 12, "Seeing the landscape", says of the lab's records."""

import numpy as np
import pytest

from tinylora_lite.lab import landscape
from tinylora_lite.lab.claims import gradients
from tinylora_lite.lab.claims import rl_parameters as rl
from tinylora_lite.lab.landscape import START, Plane
from tinylora_lite.lab.statistics import difference


@pytest.fixture(scope="module")
def plane():
    return Plane(landscape.load("calibrated-2"))


@pytest.fixture(scope="module")
def peak(plane):
    return plane.at("reward", plane.best("reward"))


def test_a_plane_is_read_at_the_next_point_of_its_grid():
    axes = [[-1.0, 0.0, 1.0], [-2.0, 2.0]]
    surfaces = {"reward": [0, 1, 2, 3, 9, 5], "careful": [6, 5, 4, 3, 2, 1], "stranger": [0, 1, 2, 3, 4, 5]}
    made = Plane({"settings": {"axes": axes}, "paths": {"es": {"v": [[[0, 0], [0.6, -1.0]]]}}} | surfaces)
    assert made.ends == {"es": [(0.6, -1.0)]}
    assert made.at("reward", made.ends["es"][0]) == 9
    assert made.best("reward") == (1.0, -2.0)
    assert made.best("careful") == (1.0, 2.0)
    assert made.best("stranger") == (-1.0, -2.0)


def test_grpo_and_the_evolution_strategy_stop_at_the_top(plane, peak):
    for way in ("grpo", "es"):
        assert np.mean([plane.at("reward", end) for end in plane.ends[way]]) > peak - 0.1


def test_two_of_three_imitations_of_the_stranger_walk_the_other_way(plane):
    start = plane.at("reward", START)
    rewards = [plane.at("reward", end) for end in plane.ends["sft"]]
    assert np.mean(rewards) < start
    assert max(rewards) == start
    gone = [end for end in plane.ends["sft"] if np.linalg.norm(end) > 0.1]
    assert len(gone) == 2
    assert all(np.dot(end, plane.best("reward")) < 0 for end in gone)


def test_the_loss_is_less_where_the_farthest_went_and_as_before_where_the_others_end(plane):
    lost = sorted(plane.at("stranger", end) - plane.at("stranger", START) for end in plane.ends["sft"])
    assert lost[0] < -0.03
    assert min(lost[1:]) > -0.001


def test_the_strangers_valley_has_no_reward_and_the_careful_writers_is_on_the_hill(plane, peak):
    assert plane.at("reward", plane.best("stranger")) < 0.1
    assert plane.at("reward", plane.best("careful")) > peak - 0.1


def test_the_runs_beside_the_landscapes_are_of_as_many_numbers():
    assert rl.CALIBRATED[1].trial.u == 2
    assert rl.CALIBRATED[0].trial.u == rl.RANDOM[0].trial.u == 1


def test_the_plane_of_two_calibrated_numbers_is_higher_than_that_of_two_random_ones(peak):
    assert max(landscape.load("random-2")["reward"]) < peak - 0.1


def test_on_good_directions_a_ranking_is_enough(store):
    assert abs(difference(*gradients.PAIRS["13 calibrated"], store).mean) < 0.05


@pytest.mark.parametrize("label", ["13 random", "4 random"])
def test_three_seeds_decide_nothing_on_random_directions(label, store):
    gap = difference(*gradients.PAIRS[label], store)
    assert gap.low < 0 < gap.high


def test_of_the_strategys_three_runs_on_13_random_numbers_one_climbed(store):
    base = gradients.BASE.estimate(store).mean
    assert sum(value > base + 0.1 for value in gradients.PAIRS["13 random"][1].estimate(store).values) == 1
