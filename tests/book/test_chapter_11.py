"""What chapter 11, "What to spend the budget on", says of the lab's records."""

import numpy as np
import pytest

from tinylora_lite.lab.claims import directions, precision, rank, seeds, sigma, tying
from tinylora_lite.lab.claims import rl_parameters as rl
from tinylora_lite.lab.statistics import difference


def spread(point, store) -> float:
    return float(np.std(point.estimate(store).values, ddof=1))


def undecided(gap) -> bool:
    return gap.low < 0 < gap.high


def test_runs_of_one_setting_are_not_noisy_but_different_models(store, greedy):
    for points in seeds.POINTS.values():
        by_p, by_rest = seeds.shares(seeds.table(points, store))
        assert by_p > 2 * by_rest
        by_p, by_rest = seeds.shares(seeds.table(points, greedy))
        assert by_p > 4 * by_rest
    by_p, by_rest = seeds.shares(seeds.table(seeds.POINTS[13], store))
    assert by_p > 5 * by_rest
    of_p = [seeds.shares(seeds.table(seeds.POINTS[n], store))[0] for n in (1, 4, 13)]
    assert of_p[0] < of_p[1] < of_p[2]


def test_three_bits_well_spent_bring_thirteen_numbers_as_far_as_any_other_choice(store):
    assert abs(seeds.best_of(seeds.POINTS[13], store, 8) - rl.FULL.estimate(store).mean) < 0.06


def test_by_greedy_answers_two_draws_of_one_number_learn(greedy):
    means = np.sort(seeds.table(seeds.POINTS[1], greedy).mean(axis=1))
    assert means[-2] > 0.4 > means[-3]


def test_the_claim_on_ranks_is_reproduced_in_part_and_by_greedy_answers_reproduced(store, greedy):
    assert rank.CLAIM.judge(store).finding == "reproduced in part"
    assert rank.CLAIM.judge(greedy).finding == "reproduced"
    assert difference(rank.FORTY_NINE[2], rank.FORTY_NINE[16], store).low > 0
    assert difference(rank.THIRTEEN[2], rank.THIRTEEN[16], store).low < 0
    ranked = [rank.THIRTEEN[r].estimate(store).mean for r in rank.RANKS]
    assert ranked == sorted(ranked, reverse=True)


def test_rank_one_and_two_are_not_told_apart(store, greedy):
    for score in (store, greedy):
        for points in (rank.THIRTEEN, rank.FORTY_NINE):
            assert undecided(difference(points[1], points[2], score))


def test_random_numbers_vary_over_seeds_and_lora_xs_does_not(store, greedy):
    for point in (rl.THIRTEEN, rl.RANDOM[6], rl.RANDOM[-1]):
        assert spread(point, store) > 0.08
        assert spread(point, greedy) > 0.08
    for point in (rl.RANDOM[6], rl.RANDOM[-1]):
        assert sum(accuracy > 0.99 for accuracy in point.estimate(greedy).values) == 4
    assert spread(rl.LORA_XS[0], store) < 0.01
    assert spread(rank.FORTY_NINE[1], store) > 0.2


def test_groups_and_one_long_vector_differ_in_spread_and_not_in_mean(store, greedy):
    for score in (store, greedy):
        assert tying.CLAIM.judge(score).finding == "undecided"
    assert undecided(difference(tying.AROUND_49[0], tying.AROUND_49[3], store))
    assert undecided(difference(tying.AROUND_13[0], tying.AROUND_13[2], store))
    assert spread(tying.AROUND_49[0], store) > 3 * spread(tying.AROUND_49[3], store)


def test_two_numbers_a_type_lead_tiled_groups_by_sampled_answers_only(store, greedy):
    assert difference(tying.TYING[3], tying.TYING[2], store).low > 0
    assert difference(tying.TYING[3], tying.TYING[2], greedy).low < 0


def test_lora_xs_is_ahead_of_one_long_vector(store, greedy):
    for score in (store, greedy):
        assert difference(rl.LORA_XS[0], tying.AROUND_49[3], score).low > 0


@pytest.mark.parametrize("place", ["split", "right"])
def test_where_sigma_is_makes_no_difference_that_we_can_see(place, store, greedy):
    for score in (store, greedy):
        assert undecided(difference(sigma.POINTS[place], sigma.POINTS["left"], score))


def test_which_directions_are_kept_matters_as_much_as_anything(store, greedy):
    found = {kind: point.estimate(store) for kind, point in directions.POINTS.items()}
    base = rl.BASE.estimate(store)
    for kind in ("middle", "trailing", "rotated", "Fisher"):
        assert found[kind].mean < base.mean + 0.02
    assert found["activations"].low > base.high
    for kind, point in directions.POINTS.items():
        if kind != "leading":
            assert difference(directions.POINTS["leading"], point, store).low > 0
            by_greedy = difference(directions.POINTS["leading"], point, greedy)
            assert (by_greedy.low < 0) == (kind == "activations")
    assert difference(directions.POINTS["Fisher"], rl.BASE, greedy).low > 0


def test_at_equal_count_precision_moves_the_mean_by_a_point_or_so_and_one_run_was_lost(store):
    for n in (13, 49, 98):
        assert abs(difference(precision.POINTS["fp32"][n], precision.POINTS["bf16"][n], store).mean) < 0.03
    broken, whole = (min(precision.POINTS[kind][25].estimate(store).values) for kind in ("bf16", "fp16"))
    assert broken < 0.1 < 0.5 < whole
    every = [a for points in precision.POINTS.values() for p in points.values() for a in p.estimate(store).values]
    assert sum(accuracy < 0.3 for accuracy in every) == 1


def test_at_equal_bytes_fp32_is_clearly_behind_in_one_pair_and_ahead_in_none(store, greedy):
    for few, many in precision.EQUAL_BYTES:
        for narrow in ("bf16", "fp16"):
            for score in (store, greedy):
                gap = difference(precision.POINTS["fp32"][few], precision.POINTS[narrow][many], score)
                assert gap.high < 0 if (few, many, narrow) == (13, 25, "fp16") else undecided(gap)
    assert difference(precision.POINTS["fp32"][25], precision.POINTS["fp32"][13], store).low > 0
    for score in (store, greedy):
        assert precision.CLAIM.judge(score).finding == "not reproduced"
