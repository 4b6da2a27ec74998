"""The truncated SVD: against LAPACK's, in every regime; the same signs and the same numbers everywhere."""

import pytest
import torch

from tinylora_lite.adapter import svd, weights
from tinylora_lite.adapter.svd import EXACT_AT_WORST, EXACT_UP_TO, canonical_signs, decompose, truncated_svd

LARGE = (600, 520)  # decomposed by iteration at small ranks


def with_spectrum(shape, values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.as_tensor(values, dtype=torch.float64)
    U, V = (
        torch.linalg.qr(torch.randn(side, len(values), generator=generator, dtype=torch.float64))[0] for side in shape
    )
    return (U * values) @ V.T


def truncation(factors):
    U, S, Vh = factors
    return (U.double() * S.double()) @ Vh.double()


def exact(matrix, rank):
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def relative_error(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def check_factors(factors, shape, rank):
    U, S, Vh = factors
    assert (U.shape, S.shape, Vh.shape) == ((shape[0], rank), (rank,), (rank, shape[1]))
    assert all(factor.dtype == torch.float32 and factor.is_contiguous() for factor in factors)
    torch.testing.assert_close(U.T @ U, torch.eye(rank), atol=1e-5, rtol=0)
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(rank), atol=1e-5, rtol=0)
    assert (S >= 0).all()
    assert (S.diff() <= 0).all()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (1, 9), (9, 1), LARGE, LARGE[::-1]])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_truncation_is_lapacks(shape, rank):
    rank = min(rank, *shape)
    matrix = with_spectrum(shape, 0.9 ** torch.arange(min(shape))).float()
    factors = truncated_svd(matrix, rank)
    check_factors(factors, shape, rank)
    assert relative_error(truncation(factors), exact(matrix, rank)) < 1e-5


SPECTRA = {
    "power law": 1 / torch.arange(1, 521) ** 0.5,
    "a cliff of 5 % and then flat": [1.0, 0.95, *[0.95 * 0.95] * 518],
    "two spikes over a plateau": [100.0, 90.0, *[1.0] * 518],
    "rank 3": [3.0, 2.0, 1.0],
    "rank 2": [3.0, 1.0],
    "steep": 0.5 ** torch.arange(60),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_the_iteration_finds_the_truncation(name):
    matrix = with_spectrum(LARGE, SPECTRA[name])
    assert relative_error(truncation(truncated_svd(matrix, 2)), exact(matrix, 2)) < 1e-4


def test_the_iteration_without_a_gap():
    matrix = torch.randn(LARGE, generator=torch.Generator().manual_seed(0))
    assert min(LARGE) > EXACT_UP_TO
    assert relative_error(truncation(truncated_svd(matrix, 2)), exact(matrix, 2)) < 1e-4


def test_neighbours_closer_than_float32_resolves():
    # In float32 these two vectors mix; the numbers v would mean something else on another machine.
    matrix = with_spectrum((600, 520), [2.0, 2.0 * (1 - 5e-5), *[1.0] * 518])
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    found, wanted = truncated_svd(matrix, 2), canonical_signs(U[:, :2], S[:2], Vh[:2])
    torch.testing.assert_close(found[0].double(), wanted[0], atol=1e-4, rtol=0)


def test_full_rank_gives_the_matrix_back():
    matrix = torch.randn(20, 13, generator=torch.Generator().manual_seed(1))
    assert relative_error(truncation(truncated_svd(matrix, 13)), matrix.double()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(30, 20), LARGE])
def test_other_dtypes_are_decomposed_as_their_values(dtype, shape):
    matrix = with_spectrum(shape, 0.8 ** torch.arange(min(shape))).to(dtype)
    factors = truncated_svd(matrix, 2)
    check_factors(factors, shape, 2)
    assert relative_error(truncation(factors), exact(matrix, 2)) < 1e-5
    assert matrix.dtype == dtype


@pytest.mark.parametrize("shape", [(40, 24), LARGE])
def test_the_same_numbers_again_and_on_more_threads(shape):
    matrix = with_spectrum(shape, 1 / torch.arange(1, min(shape) + 1) ** 0.3).float()
    first, again = truncated_svd(matrix, 2), truncated_svd(matrix, 2)
    assert all(map(torch.equal, first, again))
    torch.set_num_threads(2)
    for here, there in zip(first, truncated_svd(matrix, 2), strict=True):
        torch.testing.assert_close(here, there, atol=1e-6, rtol=1e-6)


def test_small_work_is_done_on_one_thread(monkeypatch):
    seen = []
    for module, name in ((svd.torch.linalg, "svd"), (weights, "_update")):
        found = getattr(module, name)
        spy = lambda *args, found=found, **kwargs: seen.append(torch.get_num_threads()) or found(*args, **kwargs)  # noqa: E731
        monkeypatch.setattr(module, name, spy)
    torch.set_num_threads(2)
    svd.decompose(torch.eye(40), 2)
    weights.weight_fingerprint(torch.eye(40))
    weights.base_fingerprint(torch.nn.Linear(4, 4))
    assert set(seen) == {1}
    assert len(seen) == 4
    assert torch.get_num_threads() == 2


def test_the_seed_moves_the_start_alone():
    matrix = with_spectrum(LARGE, 1 / torch.arange(1, 521))
    for here, there in zip(truncated_svd(matrix, 2), truncated_svd(matrix, 2, seed=2**64 - 1), strict=True):
        torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-5)


def test_signs_do_not_depend_on_the_decomposition():
    U, S, Vh = truncated_svd(torch.randn(16, 12, generator=torch.Generator().manual_seed(2)), 4)
    largest = U[U.abs().argmax(dim=0), torch.arange(4)]
    assert (largest > 0).all()
    for flips in torch.cartesian_prod(*[torch.tensor([1.0, -1.0])] * 4):
        flipped = canonical_signs(U * flips, S, Vh * flips[:, None])
        assert all(map(torch.equal, flipped, (U, S, Vh)))


def test_of_equal_entries_the_first_decides():
    # Without a rule for ties, rounding would choose between these two, and the update would change its sign.
    for rounding in (1e-7, -1e-7):
        U = torch.tensor([[-0.5 - rounding], [0.5], [0.5], [0.5]])
        flipped, _, Vh = canonical_signs(U, torch.ones(1), torch.ones(1, 3))
        assert flipped[0] > 0
        assert (Vh == -1).all()


def test_no_column_is_multiplied_by_zero():
    _, _, Vh = canonical_signs(torch.zeros(3, 1), torch.zeros(1), torch.ones(1, 2))
    assert torch.equal(Vh, torch.ones(1, 2))
    for shape in ((8, 6), LARGE):
        factors = truncated_svd(torch.zeros(shape), 2)
        check_factors(factors, shape, 2)
        assert (factors[1] == 0).all()


@pytest.mark.parametrize("rank", [0, 5, -1])
def test_a_rank_that_does_not_exist(rank):
    with pytest.raises(ValueError, match=rf"rank must be an integer from 1 to 4 for a weight of \(4, 6\), not {rank}$"):
        truncated_svd(torch.ones(4, 6), rank)


def test_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"takes a matrix, not a tensor of shape \(3, 4, 5\)"):
        truncated_svd(torch.ones(3, 4, 5), 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(value):
    matrix = torch.ones(4, 6)
    matrix[2, 3] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        truncated_svd(matrix, 1)


@pytest.mark.parametrize(
    ("weight", "rank", "message"),
    [
        (torch.ones(4, 6, device="meta"), 1, "on the meta device and has no values"),
        (torch.ones(4, 6, dtype=torch.int8), 1, r"holds torch\.int8, no floating-point numbers"),
        (torch.ones(4, 6), 1.0, r"rank must be an integer .*, not 1\.0"),
        (torch.ones(4, 6), True, "rank must be an integer .*, not True"),
    ],
)
def test_what_has_no_decomposition(weight, rank, message):
    with pytest.raises(ValueError, match=message):
        truncated_svd(weight, rank)


@pytest.mark.parametrize("shape", [LARGE, LARGE[::-1]])
@pytest.mark.parametrize(
    ("values", "portable"),
    [
        ([1.0, 0.9, *[0.8 - 1e-3 * i for i in range(518)]], True),
        ([1.0, 1.0 - 1e-4, *[0.8 - 1e-3 * i for i in range(518)]], True),
        ([1.0, 1.0, *[0.8 - 1e-3 * i for i in range(518)]], False),
        ([1.0, 0.9, 0.9 * (1 - 1e-7), *[0.8 - 1e-3 * i for i in range(517)]], False),
        ([100.0, 1.0, *[0.9 - 1e-3 * i for i in range(518)]], True),
    ],
    ids=["apart", "close", "tied inside", "tied at the cut", "an outlier"],
)
def test_what_another_machine_would_find(shape, values, portable):
    matrix = with_spectrum(shape, values)
    found = decompose(matrix, 2)
    assert found.portable is portable
    torch.testing.assert_close(found.S, torch.tensor(values[:2]), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.beyond, torch.tensor(values[2]), rtol=1e-3, atol=0)
    if portable:
        # LAPACK in float64 stands for the other machine.
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        U, S, Vh = canonical_signs(U[:, :2], S[:2], Vh[:2])
        assert (found.U - U).norm(dim=0).max() < 1e-4
        assert (found.Vh - Vh).norm(dim=1).max() < 1e-4


def test_the_last_value_has_nothing_beyond_it():
    found = decompose(torch.diag(torch.tensor([3.0, 2.0])), 2)
    assert found.beyond == 0
    assert found.portable


def test_noise_without_leading_directions_gets_an_approximation_and_says_so(monkeypatch):
    # Above EXACT_AT_WORST there is no exact decomposition to fall back on.
    monkeypatch.setattr(svd, "EXACT_AT_WORST", 0)
    monkeypatch.setattr(svd, "MOST_RESTARTS", 1)
    matrix = torch.randn(900, 600, generator=torch.Generator().manual_seed(0))
    found = decompose(matrix, 2)
    assert not found.portable
    best = torch.linalg.svdvals(matrix)[:2]
    assert (best * (1 + 1e-5) >= found.S).all()
    assert (0.97 * best <= found.S).all()
    check_factors((found.U, found.S, found.Vh), matrix.shape, 2)


def test_close_neighbours_in_a_slow_decay_settle(monkeypatch):
    monkeypatch.setattr(svd, "EXACT_AT_WORST", 0)
    matrix = with_spectrum(LARGE, [1.0, 0.999, *(0.99 * 0.998 ** torch.arange(518))])
    found = decompose(matrix, 8)
    assert found.portable
    assert relative_error(truncation((found.U, found.S, found.Vh)), exact(matrix, 8)) < 1e-4


def test_where_float64_does_not_converge_the_triplets_in_float32_are_kept(monkeypatch):
    arpack = svd._arpack
    monkeypatch.setattr(svd, "EXACT_AT_WORST", 0)
    monkeypatch.setattr(svd, "_arpack", lambda m, *rest: None if m.dtype == torch.float64 else arpack(m, *rest))
    found = decompose(with_spectrum(LARGE, [2.0, 2.0 * (1 - 5e-4), *[1.0] * 518]), 2)
    assert not found.portable
    torch.testing.assert_close(found.S, torch.tensor([2.0, 1.999]), atol=1e-5, rtol=0)


def test_a_matrix_on_which_the_iteration_does_not_settle_is_decomposed_exactly_where_that_is_quick(monkeypatch):
    assert min(LARGE) <= EXACT_AT_WORST
    monkeypatch.setattr(svd, "MOST_RESTARTS", 1)
    calls = []
    exact_svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **options: calls.append(args) or exact_svd(*args, **options))
    assert decompose(torch.randn(LARGE, generator=torch.Generator().manual_seed(0)), 2).portable
    assert calls[-1][0].shape == LARGE


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_large_weight_that_is_not_finite(value):
    matrix = with_spectrum(LARGE, 0.9 ** torch.arange(520)).float()
    matrix[599, 3] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        truncated_svd(matrix, 1)


@pytest.mark.parametrize("shape", [(24, 40), LARGE])
@pytest.mark.parametrize(("scale", "dtype"), [(1e-30, torch.float32), (1e25, torch.float32), (1e-9, torch.bfloat16)])
def test_weights_of_any_size(shape, scale, dtype):
    matrix = (with_spectrum(shape, 0.8 ** torch.arange(min(shape))) * scale).to(dtype)
    factors = truncated_svd(matrix, 2)
    check_factors(factors, shape, 2)
    assert relative_error(truncation(factors), exact(matrix, 2)) < 1e-5
