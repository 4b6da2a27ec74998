"""What chapter 14, "Aim", says of the lab's records."""

import pytest

from tinylora_lite.lab.claims import aim, transfer
from tinylora_lite.lab.claims import rl_parameters as rl
from tinylora_lite.lab.claims import sft_parameters as sft
from tinylora_lite.lab.statistics import difference
from tinylora_lite.training.calibrate import PROMPTS_AT_ONCE

NARROW, *_, WIDE = aim.CALIBRATED
NAMES = ("random", "own", "twin", "seed", "format", "careful", "stranger")
PLAIN = dict(zip(NAMES, transfer.GROUPS["nano"], strict=True))
_, RANDOM_OF_PRODUCTS, OWN_OF_PRODUCTS, BORROWED = transfer.GROUPS["multiplying"]


def undecided(gap) -> bool:
    return gap.low < 0 < gap.high


def test_thirteen_calibrated_numbers_reach_all_weights(store):
    narrow = NARROW.estimate(store)
    assert narrow.low > rl.THIRTEEN.estimate(store).high
    assert narrow.low >= rl.FULL.estimate(store).low
    assert narrow.low > WIDE.estimate(store).high
    assert rl.LORA_XS[0].estimate(store).mean > narrow.mean


def test_by_greedy_answers_calibration_lifts_the_unlucky_draws_alone(greedy):
    gain = difference(NARROW, rl.THIRTEEN, greedy)
    assert gain.low < 0 < gain.mean
    aimed, drawn = NARROW.estimate(greedy).values, rl.THIRTEEN.estimate(greedy).values
    assert min(aimed) > max(drawn)
    assert max(a - b for a, b in zip(aimed, drawn, strict=True) if b > 0.9) < 0.03
    assert undecided(difference(NARROW, WIDE, greedy))


def test_few_problems_are_enough_for_the_directions(store):
    fewest = aim.FEWER[0]
    assert int(fewest.trial.calibration.removeprefix("problems=")) <= PROMPTS_AT_ONCE
    assert fewest.estimate(store).low > rl.THIRTEEN.estimate(store).mean
    assert difference(fewest, aim.CALIBRATED[-1], store).mean > -0.05


@pytest.mark.parametrize("base", aim.ELSEWHERE)
def test_the_bits_of_a_basis_are_those_of_the_first_base_on_every_base(base, store):
    own = aim.ELSEWHERE[base], aim.LADDERS[base]["13 calibrated"]
    assert [aim.bits(p, store, True) for p in own] == [aim.bits(p, store, True) for p in (NARROW, WIDE)]


@pytest.mark.parametrize("base", ["qwen2-1m", "llama-0.4m"])
def test_calibrated_numbers_are_ahead_of_random_ones_and_behind_lora_xs(base, store, greedy):
    point, ladder = aim.ELSEWHERE[base], aim.LADDERS[base]
    for score in (store, greedy):
        assert difference(point, ladder["13 random"], score).low > 0
    assert difference(point, ladder["49 LoRA-XS"], store).mean < 0
    width = difference(point, ladder["13 calibrated"], store)
    assert width.high < 0 if base == "qwen2-1m" else width.low > 0


@pytest.mark.parametrize("base", ["qwen2-0.4m-seed1", "llama-0.4m-default", "qwen2-5m"])
def test_on_every_other_base_too_but_for_rank_one_on_the_largest(base, store):
    ladder = aim.LADDERS[base]
    for name, point in (("narrow", aim.ELSEWHERE[base]), ("broad", ladder["13 calibrated"])):
        ahead = difference(point, ladder["13 random"], store).low > 0
        assert ahead == ((base, name) != ("qwen2-5m", "narrow"))


def test_on_the_largest_base_rank_eight_is_ahead_of_lora_xs(store):
    ladder = aim.LADDERS["qwen2-5m"]
    assert difference(ladder["13 calibrated"], ladder["49 LoRA-XS"], store).low > 0


def test_directions_of_a_twin_serve_less_than_ones_own_and_more_than_random_ones(store):
    assert (
        difference(PLAIN["twin"], PLAIN["own"], store).high < 0 < difference(PLAIN["twin"], PLAIN["random"], store).low
    )


def test_directions_of_another_seed_and_of_the_careful_writers_text_are_not_told_from_ones_own(store):
    assert undecided(difference(PLAIN["careful"], PLAIN["own"], store))
    assert undecided(difference(PLAIN["seed"], PLAIN["own"], store))
    assert difference(PLAIN["seed"], PLAIN["random"], store).low > 0


def test_directions_of_the_unseen_writers_text_leave_the_base_where_it_is(store, greedy):
    base, left = rl.BASE.estimate(store), PLAIN["stranger"].estimate(store)
    assert difference(PLAIN["stranger"], PLAIN["random"], store).high < 0
    assert left.low < base.mean < left.high
    assert PLAIN["stranger"].estimate(greedy).high < 0.5


def test_directions_are_borrowed_by_products_and_by_no_other_format(store, greedy):
    assert undecided(difference(BORROWED, OWN_OF_PRODUCTS, store))
    assert difference(BORROWED, RANDOM_OF_PRODUCTS, store).low > 0
    for point in transfer.GROUPS["worded"]:
        assert point.estimate(store).mean < 0.2
        assert point.estimate(greedy).mean < 0.01


def test_by_greedy_answers_good_directions_and_three_lucky_draws_differ_by_little(greedy):
    pairs = [(PLAIN[name], PLAIN["random"]) for name in ("twin", "seed", "careful")]
    for first, second in (*pairs, (BORROWED, RANDOM_OF_PRODUCTS)):
        assert abs(difference(first, second, greedy).mean) < 0.03


def test_imitation_on_calibrated_directions_learns_from_the_bases_own_and_not_from_the_stranger(store, greedy):
    assert min(sft.CALIBRATED["own"].estimate(greedy).values) > 0.98
    assert sft.CALIBRATED["stranger"].estimate(store).mean < rl.BASE.estimate(store).mean + 0.01
