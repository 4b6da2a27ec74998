"""What chapter 10, "RL against SFT: how many bits?", says of the lab's records."""

import numpy as np
import pytest

from tinylora_lite.book.tables import swept
from tinylora_lite.lab.claims import information as info
from tinylora_lite.lab.claims import rl_parameters as rl
from tinylora_lite.lab.claims import sft_parameters as sft
from tinylora_lite.lab.statistics import difference, smallest_count

PLACES = {"1": 0, "13": 1, "49": 2, "196": 3, "3136": 4}
CAREFUL, OWN, STRANGER = (sft.LADDERS[kind] for kind in ("careful", "own", "stranger"))


@pytest.fixture(scope="module")
def bits(store):
    def mean(point, count=info.demonstration_bits) -> float:
        return float(np.mean([count(record) for record in point.records(store)]))

    return mean


def test_the_strangers_demonstrations_carry_more_than_a_hundred_times_the_bits_of_the_rewards(store, bits):
    rewards = bits(rl.THIRTEEN, info.reward_bits)
    assert bits(STRANGER[1]) > 100 * rewards
    # The stranger's winning rates learn nothing; these are rates that imitate.
    imitating = [info.demonstration_bits(r) for t, r in swept(STRANGER[1], store) if t.learning_rate in (0.1, 0.2)]
    assert len(imitating) == 4
    assert min(imitating) > 100 * rewards


def test_the_careful_writers_are_few_and_with_196_numbers_fewer_than_the_rewards(bits):
    assert bits(rl.THIRTEEN, info.reward_bits) < bits(CAREFUL[1]) < bits(OWN[1])
    assert bits(CAREFUL[1]) < 2 * bits(rl.THIRTEEN, info.reward_bits)
    assert bits(CAREFUL[3]) < bits(rl.LORA_XS[1], info.reward_bits)


@pytest.mark.parametrize(("shape", "rewarded"), [("196", rl.LORA_XS[1]), ("3136", rl.LORA_XS[3])])
def test_the_order_by_bits_is_careful_rewards_own_stranger(shape, rewarded, bits):
    place = PLACES[shape]
    paid = [bits(CAREFUL[place]), bits(rewarded, info.reward_bits), bits(OWN[place]), bits(STRANGER[place])]
    assert paid == sorted(paid)


def test_49_numbers_of_lora_xs_are_the_smallest_update_for_most_of_the_gain(store):
    for share in (0.9, 0.95, 0.975):
        assert smallest_count(share, rl.LADDER[:-1], rl.FULL, rl.BASE, store)[0] == 49
    assert rl.LORA_XS[0].estimate(store).low > rl.RANDOM[-1].estimate(store).mean


def test_three_of_five_greedy_seeds_of_13_do_as_all_weights_and_one_as_the_base(greedy):
    seeds = sorted(rl.THIRTEEN.estimate(greedy).values)
    assert seeds[2] > 0.95
    assert seeds[0] < rl.BASE.estimate(greedy).mean
    assert rl.CLAIM.judge(greedy).finding == "undecided"


def test_imitation_of_the_unseen_writer_with_few_numbers_does_nothing(store, greedy):
    base = rl.BASE.estimate(store).mean
    for point in (*STRANGER[:4], sft.CALIBRATED["stranger"]):
        assert point.estimate(store).mean < base + 0.01
    assert STRANGER[3].estimate(greedy).mean < 0.36
    assert difference(rl.THIRTEEN, STRANGER[1], store).mean > 0.1
    for rewarded, place in ((rl.RANDOM[6], 2), (rl.LORA_XS[1], 3)):
        assert difference(rewarded, STRANGER[place], store).low > 0.1


def test_with_the_careful_writers_answers_the_sign_turns(store):
    gap = difference(rl.THIRTEEN, CAREFUL[1], store)
    assert -0.1 < gap.low < gap.high < 0


def test_all_weights_end_above_rewards_by_the_careful_writer_and_below_by_the_bases_own(store):
    full = rl.FULL.estimate(store)
    assert CAREFUL[-1].estimate(store).low > full.high
    assert OWN[-1].estimate(store).high < full.low


@pytest.mark.parametrize("ladder", [CAREFUL, OWN], ids=["careful", "own"])
def test_by_greedy_answers_rewards_lead_familiar_demonstrations_nowhere(ladder, greedy):
    assert ladder[3].estimate(greedy).mean > 0.95
    for place, rewarded in enumerate((rl.RANDOM[0], rl.THIRTEEN, rl.RANDOM[6], rl.LORA_XS[1])):
        assert difference(rewarded, ladder[place], greedy).low < 0.02


def test_the_better_it_imitates_the_worse_it_is(store):
    few, whole = (
        {
            trial.learning_rate: (np.mean(record["loss"][-10:]), record["scores"]["sampled"]["accuracy"])
            for trial, record in swept(STRANGER[place], store)
            if trial.seed == 0
        }
        for place in (PLACES["196"], -1)
    )
    assert few[0.2][0] < few[0.1][0] < few[min(few)][0]
    assert few[0.1][1] < 0.05 < 0.3 < few[min(few)][1]
    right = [score for _, score in whole.values()]
    assert whole[min(whole)][1] > 0.3
    assert min(right) < 0.1
    assert max(right) > 0.8
