"""What chapter 15, "Does it scale?", says of the lab's records."""

from itertools import pairwise

import pytest

from tinylora_lite.book.tables import swept
from tinylora_lite.lab.claims import family, size, steerable
from tinylora_lite.lab.shapes import climb, ends
from tinylora_lite.lab.statistics import difference, share_of_gain, smallest_count, times_fewer

SMALL, OTHER, MIDDLE, LARGE = size.LADDERS.values()
QWEN, AGAIN, LLAMA, SAME = family.LADDERS.values()
TOLD, UNTOLD, OFTEN, SHORT, UNDECAYED, SEED = steerable.LADDERS.values()


@pytest.fixture(scope="module")
def share(store):
    return lambda ladder, shape: share_of_gain(ladder[shape], *ends(ladder), store)


@pytest.fixture(scope="module")
def smallest(store):
    return lambda ladder, part, by=store: smallest_count(part, *climb(ladder), by)[0]


def parameters(point, store) -> int:
    return point.records(store)[0]["parameters"]


def overlap(first, second) -> bool:
    return first.high > second.low and second.high > first.low


def test_the_trend_of_the_paper_does_not_show_here(store, greedy, share):
    for score in (store, greedy):
        assert size.CLAIM.judge(score).finding == "undecided"
    for smaller, larger in pairwise((SMALL, MIDDLE, LARGE)):
        assert share(larger, "49 LoRA-XS").high < share(smaller, "49 LoRA-XS").low
    for ladder in size.LADDERS.values():
        for shape in ("49 random", "98 random"):
            assert share(ladder, shape).high > 0.3


def test_a_second_base_of_the_recipe_recovers_less_than_the_first(share):
    assert share(OTHER, "49 LoRA-XS").high < share(SMALL, "49 LoRA-XS").low
    assert share(OTHER, "49 LoRA-XS").low > share(LARGE, "49 LoRA-XS").high
    assert share(OTHER, "49 LoRA-XS").low < share(MIDDLE, "49 LoRA-XS").high
    assert share(OTHER, "13 random").high < share(LARGE, "13 random").low


def test_the_step_to_thousands_is_to_a_lora_of_rank_1_on_every_base_that_takes_it(store, smallest):
    for ladder in (OTHER, MIDDLE, LARGE):
        assert smallest(ladder, 0.95) == parameters(ladder["LoRA, r = 1"], store)


def test_by_greedy_answers_the_count_is_the_same_on_all_bases(greedy, smallest):
    assert len({smallest(ladder, 0.95, greedy) for ladder in size.LADDERS.values()}) == 1


def test_between_families_the_direction_is_the_papers_by_sampled_answers(store, greedy, share, smallest):
    assert family.CLAIM.judge(store).finding == "reproduced in part"
    assert family.CLAIM.judge(greedy).finding == "undecided"
    for shape in ("49 LoRA-XS", "196 LoRA-XS", "13 calibrated"):
        assert share(LLAMA, shape).high < share(QWEN, shape).low
    assert smallest_count(0.9, *climb(LLAMA), store)[1] > parameters(LLAMA["LoRA, r = 1"], store)
    assert smallest_count(0.5, *climb(LLAMA), store) == smallest_count(0.5, *climb(QWEN), store)
    assert smallest(LLAMA, 0.9, greedy) == smallest(QWEN, 0.9, greedy)


def test_thirteen_random_numbers_leave_the_llama_of_other_texts_as_it_is(store, share):
    recovered = share(LLAMA, "13 random")
    assert recovered.low < 0 < recovered.high < 0.05
    assert LLAMA["13 random"].rate(store) == min(trial.learning_rate for trial, _ in swept(LLAMA["13 random"], store))
    full, base = (point.estimate(store).mean for point in ends(LLAMA))
    assert full - base > 0.3


def test_the_llama_of_the_same_texts_is_among_the_qwens(store, share):
    times = times_fewer(0.9, climb(AGAIN), climb(SAME), store)
    assert times.low < 1 < times.high
    for shape in ("49 random", "49 LoRA-XS"):
        assert overlap(share(SAME, shape), share(AGAIN, shape))
    for shape in ("13 random", "49 LoRA-XS"):
        assert share(SAME, shape).low > share(LLAMA, shape).high


def test_the_base_that_was_told_is_ahead_with_few_random_numbers_and_then_the_difference_ends(store):
    for shape in ("13 random", "49 random"):
        assert difference(TOLD[shape], UNTOLD[shape], store).low > 0
    for shape in ("98 random", "49 LoRA-XS"):
        gap = difference(TOLD[shape], UNTOLD[shape], store)
        assert gap.low < 0 < gap.high
    told, untold = (ladder["all weights"].estimate(store) for ladder in (TOLD, UNTOLD))
    assert told.low < untold.mean < told.high
    assert UNTOLD["196 LoRA-XS"].estimate(store).low > 0.8


def test_without_weight_decay_49_random_numbers_recover_less_and_lora_xs_all(share):
    for with_decay in (TOLD, SEED):
        assert share(UNDECAYED, "49 random").high < share(with_decay, "49 random").low
    for shape in ("49 LoRA-XS", "98 random"):
        assert share(UNDECAYED, shape).high > 1


def test_the_base_that_was_told_in_nine_of_ten_is_far_below(store, share, smallest):
    for shape in ("49 LoRA-XS", "196 LoRA-XS", "784 LoRA-XS"):
        assert difference(TOLD[shape], OFTEN[shape], store).low > 0.1
        assert share(OFTEN, shape).high < share(TOLD, shape).low
    assert share(SEED, "49 LoRA-XS").low > share(OFTEN, "49 LoRA-XS").high + 0.3
    count, *_ = smallest_count(0.5, steerable.drawn(OFTEN), *ends(OFTEN), store)
    assert count == parameters(OFTEN["all weights"], store)
    assert smallest(OFTEN, 0.9) > 100 * smallest(TOLD, 0.9)


def test_half_as_long_is_not_told_from_the_first_with_49_numbers_of_lora_xs(share):
    assert share(SHORT, "49 LoRA-XS").high > share(TOLD, "49 LoRA-XS").low
