"""What chapter 13, "What 13 numbers cannot do", says of the lab's records."""

import numpy as np
import pytest

from tinylora_lite.lab import untrained
from tinylora_lite.lab.claims import controls, teaching
from tinylora_lite.lab.claims import rl_parameters as rl
from tinylora_lite.lab.statistics import difference

RANDOM, CALIBRATED, XS, FULL = "13 random", "13 calibrated", "49 LoRA-XS", "all weights"
LARGE = {(skill, "demonstrations", name) for skill in teaching.SKILLS for name in ("LoRA", "all")}
LARGE |= {("doubling", "demonstrations", "196 LoRA-XS")}


def norm_of(point, store) -> float:
    return float(np.mean([record["norm"] for record in point.records(store)]))


@pytest.fixture(params=["sampled", "greedy"])
def score(request, store, greedy):
    return {"sampled": store, "greedy": greedy}[request.param]


def test_the_careful_writers_header_brings_more_than_13_numbers_and_the_others_less(store):
    told = controls.HEADER.estimate(store)
    for name, point in controls.HEADERS.items():
        assert name == "careful" or point.estimate(store).high < told.low
    assert told.low > controls.SHOWN[CALIBRATED].estimate(store).high
    for base in ("qwen2-0.4m", "qwen2-1m"):
        assert untrained.recorded(base)["header"]["best"] == "careful"


def test_by_greedy_answers_a_second_header_wins(store, greedy):
    sloppy = controls.HEADERS["sloppy"]
    assert abs(sloppy.estimate(store).mean - rl.BASE.estimate(store).mean) < 0.02
    assert sloppy.estimate(greedy).mean > 0.98


def test_on_calibrated_directions_the_order_is_coin_base_format_right_answers(score):
    for_format, by_chance = (point.estimate(score) for point in controls.OTHERS[CALIBRATED])
    base = rl.BASE.estimate(score)
    assert by_chance.high < base.low
    assert base.high < for_format.low
    assert for_format.high < controls.SHOWN[CALIBRATED].estimate(score).low
    for noise in controls.NOISE[CALIBRATED]:
        assert noise.estimate(score).high < base.low


def test_greedy_answers_are_in_the_format_and_grow_longer_with_training(store):
    for point in (rl.BASE, controls.SHOWN[CALIBRATED], controls.OTHERS[CALIBRATED][0]):
        scores = [record["scores"]["greedy"] for record in point.records(store)]
        assert np.mean([one["formatted"] for one in scores]) > 0.99
        assert (np.mean([one["tokens"] for one in scores]) > 20) == (point is not rl.BASE)


def test_on_random_directions_the_interval_takes_in_zero_by_sampled_answers_only(store, greedy):
    gain = difference(controls.SHOWN[RANDOM], rl.BASE, store)
    assert gain.low < 0 < gain.mean
    assert difference(controls.SHOWN[RANDOM], rl.BASE, greedy).low > 0


def test_its_controls_are_all_below_the_base_and_those_with_a_reward_walk_further(store, greedy):
    for score in (store, greedy):
        for point in (*controls.OTHERS[RANDOM], *controls.NOISE[RANDOM]):
            assert point.estimate(score).mean < rl.BASE.estimate(score).mean
    for point in controls.OTHERS[RANDOM]:
        assert point.estimate(store).high < rl.BASE.estimate(store).low
        assert norm_of(point, store) > norm_of(controls.SHOWN[RANDOM], store)


def test_at_a_quarter_of_the_rate_the_formats_reward_brings_most_of_it(store, greedy):
    assert controls.FORMAT_SLOWER.estimate(store).low > rl.BASE.estimate(store).high
    assert controls.FORMAT_SLOWER.estimate(greedy).mean > 0.9


@pytest.mark.parametrize("base", controls.ELSEWHERE)
def test_a_reward_for_the_format_lifts_the_base_of_1_2_million_weights_and_ruins_the_others(base, store):
    start, _, form, chance = (point.estimate(store) for point in controls.ELSEWHERE[base])
    assert form.low > start.high if base == "qwen2-1m" else form.high < start.low
    assert chance.mean < start.low


def test_by_greedy_answers_the_formats_reward_gains_on_all_weights(greedy):
    assert difference(controls.OTHERS[FULL][0], rl.BASE, greedy).low > 0


def test_one_seed_of_the_coin_on_lora_xs_and_no_other_climbed(store):
    base = rl.BASE.estimate(store)
    *_, fourth, high = sorted(controls.OTHERS[XS][1].estimate(store).values)
    assert high > base.high + 0.1 > fourth + 0.1
    for kind in (RANDOM, CALIBRATED, FULL):
        assert max(controls.OTHERS[kind][1].estimate(store).values) < base.high


@pytest.mark.parametrize("skill", teaching.SKILLS)
def test_rewards_teach_no_new_skill_and_demonstrations_teach_larger_updates(skill, store):
    start = teaching.BASES[skill].estimate(store)
    rewards, shown = (
        {name: point.estimate(store) for name, point in teaching.POINTS[skill][way].items()} for way in teaching.WAYS
    )
    assert all(estimate.mean < start.mean + 0.03 for estimate in rewards.values())
    assert shown["13 random"].mean < start.mean + 0.03
    assert shown["13 calibrated"].high < shown["all"].low
    for name in ("LoRA", "all"):
        assert shown[name].low > start.high + 0.3


def test_thirteen_numbers_are_not_above_the_base_on_either_skill_by_any_interval(store, greedy):
    by_sampled, by_greedy = (
        {
            (skill, way, name)
            for skill, ways in teaching.POINTS.items()
            for way, points in ways.items()
            for name, point in points.items()
            if difference(point, teaching.BASES[skill], score).low > 0
        }
        for score in (store, greedy)
    )
    assert by_sampled == LARGE
    assert by_greedy == LARGE | {("doubling", "rewards", "all"), ("longer", "demonstrations", "196 LoRA-XS")}
