"""The random projections: pinned by literal numbers, distributed as promised, apart for every module and seed."""

import numpy as np
import pytest
import torch
from scipy import stats

from tinylora_lite.adapter.layer import random_projection


@pytest.mark.parametrize(
    ("arguments", "numbers"),
    [
        ((0, 0, 1, 2), [0.112100348, 2.10921407, -1.3616699, -0.583310425]),
        ((2**64 - 1, 195, 1, 2), [-0.60354799, 0.0375390984, 0.515410542, -0.583295226]),
        ((7, 3, 3, 1), [-0.195438579, -1.19201195, -0.987162471]),
    ],
)
def test_the_same_numbers_on_every_machine(arguments, numbers):
    torch.testing.assert_close(random_projection(*arguments).flatten(), torch.tensor(numbers), rtol=2e-7, atol=0)


def test_the_stream_is_what_the_docstring_says():
    words = [int(word) for word in np.random.Philox(key=np.array([5, 9], dtype=np.uint64)).random_raw(4)]
    first, second, third, fourth = (((word >> 11) + 0.5) / 2**53 for word in words)
    expected = [
        np.sqrt(-2 * np.log(first)) * np.cos(2 * np.pi * second),
        np.sqrt(-2 * np.log(first)) * np.sin(2 * np.pi * second),
        np.sqrt(-2 * np.log(third)) * np.cos(2 * np.pi * fourth),
        np.sqrt(-2 * np.log(third)) * np.sin(2 * np.pi * fourth),
    ]
    found = random_projection(5, 9, 1, 2).flatten().double().numpy() * np.sqrt(2)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(("u", "rank"), [(1, 1), (3, 1), (1, 2), (13, 2), (5, 3), (2, 8)])
def test_shape_and_dtype(u, rank):
    P = random_projection(0, 0, u, rank)
    assert P.shape == (u, rank, rank)
    assert P.dtype == torch.float32


@pytest.mark.parametrize("rank", [2, 8])
def test_entries_are_normal_with_variance_one_over_r(rank):
    entries = random_projection(1, 2, 100_000 // rank**2, rank).double().flatten().numpy()
    scaled = entries * np.sqrt(rank)
    # Four standard errors of a mean and of a variance of normal numbers.
    assert abs(scaled.mean()) < 4 / np.sqrt(len(scaled))
    assert abs(scaled.var() - 1) < 4 * np.sqrt(2 / len(scaled))
    assert stats.kstest(scaled, "norm").pvalue > 0.001


def test_modules_and_seeds_are_independent():
    drawn = torch.stack([random_projection(s, m, 1250, 2).flatten() for s in (0, 1, 2**32, 2**63) for m in (0, 1, 196)])
    correlations = torch.corrcoef(drawn.double()).fill_diagonal_(0)
    assert correlations.abs().max() < 5 / drawn.shape[1] ** 0.5


def test_seed_and_module_are_not_added():
    # With seed + module, as in PEFT, module 1 of seed 0 would be module 0 of seed 1.
    assert not torch.equal(random_projection(0, 1, 1, 2), random_projection(1, 0, 1, 2))


def test_a_longer_v_begins_with_the_directions_of_a_shorter_one():
    assert torch.equal(random_projection(4, 1, 13, 2)[:3], random_projection(4, 1, 3, 2))


@pytest.mark.parametrize(
    ("seed", "module", "name"), [(-1, 0, "seed"), (2**64, 0, "seed"), (0, -1, "module"), (0, 2**64, "module")]
)
def test_keys_that_philox_does_not_have(seed, module, name):
    with pytest.raises(ValueError, match=rf"^{name} must be an integer from 0 to 2\*\*64 - 1"):
        random_projection(seed, module, 1, 2)


def test_torchs_and_numpys_own_generators_are_left_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    random_projection(0, 0, 4, 4)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
