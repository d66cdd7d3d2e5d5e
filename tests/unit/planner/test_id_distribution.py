"""Expected distinct ids, hottest shares and miss rates against sums over every row."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gr.planner.id_distribution import distinct_ids, harmonic, hottest_share, miss_rate

ROWS = st.integers(1, 100_000)
SKEW = st.floats(0.0, 4.0)


def shares(rows: int, skew: float) -> np.ndarray:
    weights = np.arange(1.0, rows + 1) ** -skew
    return weights / weights.sum()


def exact_distinct(rows: int, draws: float, skew: float) -> float:
    with np.errstate(divide="ignore"):
        return float(-np.expm1(draws * np.log1p(-shares(rows, skew))).sum())


class TestDistinct:
    @given(ROWS, st.integers(1, 10**9), SKEW)
    def test_equals_the_sum_over_rows(self, rows, draws, skew):
        assert float(distinct_ids(rows, draws, skew)) == pytest.approx(exact_distinct(rows, draws, skew), rel=1e-3)

    @given(st.integers(1, 10**10), st.floats(1e-3, 1e9), SKEW)
    def test_bounds(self, rows, draws, skew):
        distinct = float(distinct_ids(rows, draws, skew))
        assert 0 < distinct <= min(rows, max(draws, 1.0)) * (1 + 1e-12)
        assert draws >= 1 or distinct == draws

    def test_uniform_draws_have_a_closed_form(self):
        rows, draws = 10**10, 10**9
        assert float(distinct_ids(rows, draws, 0.0)) == pytest.approx(-rows * np.expm1(-draws / rows), rel=1e-6)

    def test_measured_by_drawing(self):
        rows, draws, skew = 5_000, 20_000, 1.05
        random = np.random.default_rng(0)
        distinct = [len(np.unique(random.choice(rows, draws, p=shares(rows, skew)))) for _ in range(20)]
        assert float(distinct_ids(rows, draws, skew)) == pytest.approx(np.mean(distinct), rel=0.01)

    def test_nothing_is_drawn(self):
        assert distinct_ids([10, 1], 0.0, 1.0).tolist() == [0.0, 0.0]

    def test_arrays_broadcast_and_a_thousand_tables_are_fast(self):
        random = np.random.default_rng(1)
        rows = np.exp(random.uniform(0, 23, 1000)).astype(np.int64)
        started = time.process_time()
        distinct = distinct_ids(rows, 1e6, random.uniform(0, 2, 1000))
        assert distinct.shape == (1000,)
        assert time.process_time() - started < 0.1


class TestShares:
    @given(ROWS, SKEW)
    def test_harmonic_and_hottest_share(self, rows, skew):
        total = (np.arange(1.0, rows + 1) ** -skew).sum()
        assert float(harmonic(rows, skew)) == pytest.approx(total, rel=1e-8)
        assert float(hottest_share(rows, skew)) == pytest.approx(1 / total, rel=1e-8)

    def test_harmonic_of_huge_tables(self):
        # H(n, 1) = ln n + Euler's constant + 1 / 2n; H(n, 2) nears pi^2 / 6
        assert float(harmonic(10**10, 1.0)) == pytest.approx(np.log(1e10) + 0.5772156649015329, rel=1e-9)
        assert float(harmonic(10**10, 1.0 + 1e-12)) == pytest.approx(float(harmonic(10**10, 1.0)), rel=1e-9)
        assert float(harmonic(10**10, 2.0)) == pytest.approx(np.pi**2 / 6 - 1e-10, rel=1e-9)

    @given(st.integers(1, 50_000), SKEW, st.floats(0.01, 1.0))
    def test_miss_rate_equals_the_sum_over_cold_rows(self, rows, skew, fraction):
        expected = shares(rows, skew)[int(np.ceil(rows * fraction)) :].sum()
        assert float(miss_rate(rows, skew, fraction, np.nan)) == pytest.approx(expected, abs=1e-7)

    @given(st.integers(100, 10**10), st.floats(0.001, 0.75))
    def test_cacheability_is_the_miss_rate_of_a_fifth(self, rows, cacheability):
        assert float(miss_rate(rows, 0.0, 0.2, cacheability)) == pytest.approx(cacheability, abs=1e-4)

    def test_cacheability_wins_over_skew_where_it_is_given(self):
        missed = miss_rate([1000, 1000, 1000], [1.0, 1.0, 0.0], [0.2, 0.2, 0.5], [np.nan, 0.3, 0.8])
        assert missed == pytest.approx([float(miss_rate(1000, 1.0, 0.2, np.nan)), 0.3, 0.5], abs=1e-3)

    def test_a_bigger_cache_misses_less(self):
        missed = miss_rate(10**9, 0.9, np.linspace(0.05, 1.0, 20), np.nan)
        assert (np.diff(missed) < 0).all()
        assert missed[-1] == 0.0
