"""Comparisons against published intervals, other algorithms, enumeration and simulation."""

import doctest
import itertools
import math
import sys

import numpy as np
import pytest
from scipy import stats

import tinylora_lite as tl
from tinylora_lite.evaluation.score import Completion, Score, Z, bootstrap_interval, paired_interval


def score(rewards, lenient=None, prompt="p") -> Score:
    """Problems ``p0``, ``p1``...; rewards ``[problems, samples]``, or one for each problem."""
    rewards = np.asarray(rewards, dtype=float)
    rewards = rewards[:, None] if rewards.ndim == 1 else rewards
    lenient = rewards * np.nan if lenient is None else np.asarray(lenient, dtype=float).reshape(rewards.shape)
    rows = [
        Completion(f"{prompt}{i}", str(i), "", r, 1, False, None if math.isnan(other) else other)
        for i, (row, others) in enumerate(zip(rewards, lenient, strict=True))
        for r, other in zip(row, others, strict=True)
    ]
    return Score.of(rows, rewards.shape[1])


def pair(both: int, better: int, worse: int, neither: int) -> tuple[Score, Score]:
    base = [1] * both + [0] * better + [1] * worse + [0] * neither
    adapted = [1] * both + [1] * better + [0] * worse + [0] * neither
    return score(base), score(adapted)


def quartic(n: int, better: int, worse: int) -> tuple[float, float]:
    """Tango's limits as roots of a polynomial (Yang, Sun and Hardin, Statistics in Medicine 32, 2013)."""
    g, d, s = Z**2, better - worse, better + worse
    coefficients = [
        n**2 * (n / g + 1) ** 2,
        -n * d * (n / g + 1) * (4 * n / g + 1),
        2 * n * d**2 * (3 * n / g + 2) / g - n**2 * (s / g + 1),
        n * d * (2 * s / g + 1) - d**3 * (4 * n / g + 1) / g,
        d**2 * (d**2 / g - s) / g,
    ]
    roots = np.roots(coefficients)
    real = roots[abs(roots.imag) < 1e-6].real
    return float(real.min()), float(real.max())


class TestPairedInterval:
    def test_worked_example(self):
        assert doctest.testmod(sys.modules["tinylora_lite.evaluation.score"]) == (0, 4)

    @pytest.mark.parametrize(
        ("better", "worse", "n", "expected"),
        [
            (9, 3, 32, (-0.027, 0.390)),  # Tango 1998, section 6
            (1, 7, 21, (-0.517, -0.026)),  # Fagerland, Lydersen and Laake 2014, airway reactivity
        ],
    )
    def test_published(self, better, worse, n, expected):
        assert paired_interval(better, worse, n) == pytest.approx(expected, abs=5e-4)

    def test_another_algorithm(self):
        cases = [(b, w, n) for n in (1, 5, 30, 1319) for b in (0, 1, 4, 20) for w in (0, 1, 7) if b + w <= n]
        for better, worse, n in cases:
            assert paired_interval(better, worse, n) == pytest.approx(quartic(n, better, worse), abs=1e-6)

    def test_by_hand(self):
        bound = Z**2 / (44 + Z**2)  # no problem on which the two disagree
        assert paired_interval(0, 0, 44) == pytest.approx((-bound, bound))

    def test_the_ends(self):
        low, high = paired_interval(10, 0, 10)
        assert (low > 0, high) == (True, 1.0)
        assert paired_interval(0, 10, 10) == pytest.approx((-1.0, -low))

    @pytest.mark.parametrize("chances", [(0.05, 0.02), (0.3, 0.3), (0.01, 0.0), (0.5, 0.05)])
    def test_coverage(self, chances):
        better, worse = chances
        draws = np.random.default_rng(0).multinomial(60, [better, worse, 1 - better - worse], size=1500)
        kinds, counts = np.unique(draws[:, :2], axis=0, return_counts=True)
        held = [low - 1e-9 <= better - worse <= high + 1e-9 for low, high in (paired_interval(*k, 60) for k in kinds)]
        assert np.average(held, weights=counts) >= 0.93
        assert all(quartic(60, *kind)[1] - quartic(60, *kind)[0] < 0.45 for kind in kinds), "and not by being endless"


class TestOneSample:
    def test_all_of_it(self):
        base, adapted = pair(20, 9, 3, 10)
        found = tl.compare(base, adapted)
        assert (found.n, found.lenient) == (42, None)
        strict = found.strict
        assert (strict.base, strict.adapted) == pytest.approx((23 / 42, 29 / 42))
        assert strict.difference == pytest.approx(6 / 42)
        assert (strict.low, strict.high) == pytest.approx(quartic(42, 9, 3), abs=1e-6)
        assert (strict.better, strict.worse, strict.test) == (9, 3, "McNemar, exact")
        # Of 12 problems on which they disagree, 3 or fewer one way or the other: 2 · (1 + 12 + 66 + 220) / 2¹².
        assert strict.p_value == pytest.approx(2 * 299 / 4096)

    def test_no_disagreement(self):
        found = tl.compare(*pair(5, 0, 0, 5)).strict
        assert (found.difference, found.p_value) == (0.0, 1.0)
        assert found.low < 0 < found.high

    def test_exchanging_the_two_turns_the_sign(self):
        base, adapted = pair(20, 9, 3, 10)
        one, other = tl.compare(base, adapted).strict, tl.compare(adapted, base).strict
        assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
        assert one.p_value == other.p_value

    def test_pairing_is_what_finds_it(self):
        """15 of 200 problems won and 3 lost are news, however many others both solve; unpaired they would not be."""
        base, adapted = pair(100, 15, 3, 82)
        assert tl.compare(base, adapted).strict.p_value < 0.01
        assert stats.fisher_exact([[103, 97], [115, 85]]).pvalue > 0.2


class TestManySamples:
    def test_the_p_value_is_all_sign_flips_where_they_are_few(self):
        base = np.array([[0, 0], [1, 0], [0, 0], [1, 1], [0, 1], [0, 0]])
        adapted = np.array([[1, 1], [1, 1], [0, 1], [1, 0], [1, 1], [1, 0]])
        gaps = adapted.mean(axis=1) - base.mean(axis=1)
        sums = [abs(np.dot(signs, gaps)) for signs in itertools.product((-1, 1), repeat=6)]
        expected = np.mean([total >= abs(gaps.sum()) - 1e-12 for total in sums])
        found = tl.compare(score(base), score(adapted)).strict
        assert found.test == "sign flips"
        assert found.p_value == pytest.approx(expected)
        assert (found.better, found.worse) == (5, 1)

    def test_the_interval_is_the_bootstrap_s_over_problems(self):
        rng = np.random.default_rng(1)
        base, adapted = rng.random((50, 4)).round(), rng.random((50, 8)).round()
        gaps = adapted.mean(axis=1) - base.mean(axis=1)
        found = tl.compare(score(base), score(adapted), seed=2).strict
        assert (found.low, found.high) == bootstrap_interval(gaps, 2)
        # Student's, whose assumptions fifty means of eight come close to.
        expected = stats.t.interval(0.95, 49, loc=gaps.mean(), scale=stats.sem(gaps))
        assert (found.low, found.high) == pytest.approx(expected, abs=0.02)

    def test_coverage_and_false_alarms(self):
        """Equal systems on problems of all difficulties: the interval holds 0, and p < 0.05 is as rare as it says."""
        rng = np.random.default_rng(3)
        held, alarms = [], []
        for _ in range(60):
            rates = rng.beta(0.7, 0.7, (40, 1))
            base, adapted = (rng.random((2, 40, 4)) < rates).astype(float)
            found = tl.compare(score(base), score(adapted)).strict
            held.append(found.low <= 0 <= found.high)
            alarms.append(found.p_value < 0.05)
        assert np.mean(held) >= 0.85  # 0.95 less three standard errors of sixty draws
        assert np.mean(alarms) <= 0.14

    @pytest.mark.parametrize("gap", [0.0, 1.0, -1.0, 0.5])
    def test_equal_gaps_are_not_certainty(self, gap):
        base = np.array([[0.0, 1.0]] * 12) if gap == 0 else np.full((12, 2), float(gap < 0))
        adapted = base if gap == 0 else np.array([[1.0, 0.0]] * 12) if gap == 0.5 else base + gap
        found = tl.compare(score(base), score(adapted)).strict
        assert found.difference == gap
        assert found.low <= gap <= found.high
        assert found.high - found.low > 0.1

    def test_rewards_that_are_no_marks(self):
        found = tl.compare(score([0.2, 0.4, 0.1]), score([2.2, 2.4, 2.1])).strict
        assert (found.low, found.difference, found.high) == pytest.approx((2.0, 2.0, 2.0))
        assert found.test == "sign flips"


class TestLenient:
    def test_both_are_compared(self):
        base, adapted = score([0, 0, 0, 0], [1, 1, 0, 0]), score([1, 1, 1, 0], [1, 1, 1, 0])
        found = tl.compare(base, adapted)
        assert (found.strict.better, found.lenient.better) == (3, 1)
        assert found.summary()["lenient"]["difference"] == 0.25
        assert str(found) == (
            "0.0% -> 75.0%, +75.0 points [-10.7, +95.4], better on 3 and worse on 0, p = 0.25 (McNemar, exact); "
            "lenient: 50.0% -> 75.0%, +25.0 points [-36.2, +69.9], better on 1 and worse on 0, p = 1 (McNemar, exact); "
            "n = 4"
        )

    def test_one_without_it(self):
        assert tl.compare(score([0, 1], [0, 1]), score([0, 1])).lenient is None


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (score([0, 1]), r"number 3 is 'p2' \(answer '2'\) in the one and not there in the other"),
        (score([0, 1, 1], prompt="q"), r"number 1 is 'p0' \(answer '0'\) in the one and 'q0' \(answer '0'\)"),
        (Score(0.5, 0.2, 0.8, 3, 1, ()), "without completions"),
    ],
)
def test_other_problems_are_refused(other, match):
    with pytest.raises(ValueError, match=match) as error:
        tl.compare(score([0, 1, 1]), other)
    assert "\n" not in str(error.value)
