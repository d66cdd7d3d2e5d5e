"""Fits recover what was planted."""

from itertools import product

import numpy as np
import pytest

from gr.errors import DataError
from gr.scaling.fit import METRICS, Cells, Law, fit_law, fit_tower, optima, optimum_exponent, predict_largest, slope

PLANTED = Law(E=2.0, A=60.0, a=0.5, B=400.0, b=0.4)
SIZES, BUDGETS = 2.0 ** np.arange(8, 20, 2), 10.0 ** np.arange(9, 12)


def planted(noise: float, seeds: int = 2) -> Cells:
    """Cells of C = 6 N D whose log losses have normal errors; HR@10 rises by .1 a decade."""
    random = np.random.default_rng(0)
    N, C = np.array([pair for pair in product(SIZES, BUDGETS) for _ in range(seeds)]).T
    D = C / (6 * N)
    L = PLANTED(N, D) * np.exp(noise * random.standard_normal(len(N)))
    metrics = {name: 0.1 * np.log10(C) for name in METRICS}
    return Cells(N, D, C, C, L, metrics)


@pytest.mark.parametrize("floor", [None, PLANTED.E])
def test_without_noise_the_law_is_exact(floor: float | None) -> None:
    law = fit_law(planted(0.0), floor)
    for name in ("E", "A", "a", "B", "b"):
        assert getattr(law, name) == pytest.approx(getattr(PLANTED, name), rel=1e-3), name


@pytest.mark.slow
@pytest.mark.parametrize("floor", [None, PLANTED.E])
def test_the_exponents_lie_within_their_intervals(floor: float | None) -> None:
    fit = fit_tower("planted", planted(0.003), floor, resamples=100)
    expected = {"a": PLANTED.a, "b": PLANTED.b, "b/(a+b)": 0.4 / 0.9, "isoFLOP": 0.4 / 0.9, "hr@10 a decade": 0.1}
    for name, value in expected.items():
        interval = fit.intervals[name]
        # Of ten intervals of 95 % one often misses a little, so twice the half-width is asked for.
        assert abs(interval.value - value) <= interval.high - interval.low + 1e-9, (name, interval)
    assert fit.intervals["a"].half_width < 0.1
    assert fit.prediction is not None and np.abs(fit.prediction.errors).max() < 0.05
    assert fit.summary()["held_out"]["budget"] == BUDGETS[-1]


def test_optima_are_those_of_the_law() -> None:
    """N_opt = (a A / (b B))^(1 / (a + b)) (C / 6)^(b / (a + b)) (arXiv 2203.15556, Eq. 4)."""
    cells = planted(0.0)
    exact = (0.5 * 60 / (0.4 * 400)) ** (1 / 0.9) * (BUDGETS / 6) ** (0.4 / 0.9)
    np.testing.assert_allclose([each.N for each in optima(cells)], exact, rtol=0.15)
    assert optimum_exponent(cells) == pytest.approx(0.4 / 0.9, abs=0.03)
    assert slope(cells, "hr@10") == pytest.approx(0.1)


def test_an_optimum_at_the_edge_is_not_counted() -> None:
    cells = planted(0.0)
    small = cells.take(cells.N >= 2**14)
    assert [each.inside for each in optima(small)] == [False, False, False]
    assert np.isnan(optimum_exponent(small))


def test_the_largest_budget_is_predicted_from_the_others() -> None:
    cells = planted(0.0)
    prediction = predict_largest(cells, None)
    assert prediction is not None and prediction.budget == BUDGETS[-1]
    np.testing.assert_allclose(prediction.errors, 0, atol=2e-3)
    assert predict_largest(cells.take(cells.budget >= BUDGETS[1]), None) is None  # one other budget fits no law


def test_too_few_cells_and_another_oracle_are_named() -> None:
    cells = planted(0.0)
    with pytest.raises(DataError, match="planted: 4 finished cells of 2 sizes at 1 budgets: a law needs 6, of 2 sizes"):
        fit_tower("planted", cells.take(cells.budget == BUDGETS[0]).take(np.arange(4)), None, 100)
    with pytest.raises(DataError, match=r"lies below the oracle's 9\.0000, which is of other data"):
        fit_tower("planted", cells, 9.0, 100)
