"""Fits of finished cells: L(N, D), the optima at equal FLOPs, metrics against log FLOPs; all with bootstrap intervals.

Chinchilla's second and third approach (arXiv 2203.15556, section 3): a parabola in log N at each budget, and
L = E + A / N^a + B / D^b by a Huber loss on log L. Where the data has an oracle, E is its loss and is not fitted.
Intervals are 2.5 to 97.5 % of resamples, with replacement, of cells (a cell and a seed is one).

N parameters of the dense part, D tokens, C FLOPs, L nats.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from gr.errors import DataError

HUBER = 1e-3  # of arXiv 2203.15556, appendix D.2
_STARTS = tuple(product((1.0, 5.0), (0.3, 0.8), (2.0, 8.0), (0.3, 0.8)))  # log A, a, log B, b
_FEWEST = 6  # cells of a law of five numbers
METRICS = ("hr@10", "hr@50", "ndcg@10")


@dataclass(frozen=True)
class Cells:
    """Finished cells of one tower, an array each."""

    N: np.ndarray
    D: np.ndarray
    C: np.ndarray
    budget: np.ndarray
    L: np.ndarray
    metrics: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> "Cells":
        columns = {"N": "parameters", "D": "tokens", "C": "flops", "budget": "budget", "L": "loss"}
        arrays: dict[str, Any] = {own: np.array([float(row[name]) for row in rows]) for own, name in columns.items()}
        return cls(**arrays, metrics={name: np.array([row[name] for row in rows]) for name in METRICS})

    def __len__(self) -> int:
        return len(self.L)

    def take(self, chosen: np.ndarray) -> "Cells":
        """chosen: indexes or a mask."""
        arrays: dict[str, Any] = {name: getattr(self, name)[chosen] for name in ("N", "D", "C", "budget", "L")}
        return Cells(**arrays, metrics={name: values[chosen] for name, values in self.metrics.items()})


@dataclass(frozen=True)
class Law:
    """L = E + A / N^a + B / D^b."""

    E: float
    A: float
    a: float
    B: float
    b: float

    def __call__(self, N: np.ndarray, D: np.ndarray) -> np.ndarray:
        return self.E + self.A * N**-self.a + self.B * D**-self.b


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the interval, of the value."""
        return (self.high - self.low) / 2 / abs(self.value)


def fit_law(cells: Cells, floor: float | None, near: Law | None = None) -> Law:
    """floor: E, where it is known. near: a law to start from, in place of a grid of starts."""
    log_L, log_N, log_D = np.log(cells.L), np.log(cells.N), np.log(cells.D)

    def terms(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        of_N, of_D = np.exp(x[0] - x[1] * log_N), np.exp(x[2] - x[3] * log_D)
        return of_N, of_D, (np.exp(x[4]) if floor is None else floor) + of_N + of_D

    def residuals(x: np.ndarray) -> np.ndarray:
        return np.log(terms(x)[2]) - log_L

    def jacobian(x: np.ndarray) -> np.ndarray:
        of_N, of_D, total = terms(x)
        columns = [of_N, -log_N * of_N, of_D, -log_D * of_D]
        if floor is None:
            columns.append(np.full_like(total, np.exp(x[4])))
        return np.stack(columns, axis=1) / total[:, None]

    least = np.log(cells.L.min())
    if near is None:
        starts = [[*start, *([least - 0.1] if floor is None else [])] for start in _STARTS]
    else:
        starts = [[np.log(near.A), near.a, np.log(near.B), near.b, *([np.log(near.E)] if floor is None else [])]]
    highest = [60.0, 5.0, 60.0, 5.0, *([least] if floor is None else [])]
    lowest = [-20.0, 1e-3, -20.0, 1e-3, *([-20.0] if floor is None else [])]
    inside = np.clip(starts, np.array(lowest) + 1e-6, np.array(highest) - 1e-6)
    settings: dict[str, Any] = {"bounds": (lowest, highest), "loss": "huber", "f_scale": HUBER}
    fits = [least_squares(residuals, x, jacobian, **settings) for x in inside]
    log_A, a, log_B, b, *log_E = map(float, min(fits, key=lambda fit: fit.cost).x)
    return Law(math.exp(log_E[0]) if floor is None else floor, math.exp(log_A), a, math.exp(log_B), b)


@dataclass(frozen=True)
class Optimum:
    """The width of least loss at a budget, by a parabola in log N. inside: it lies between the widths that were run."""

    budget: float
    N: float
    loss: float
    inside: bool


def optima(cells: Cells) -> list[Optimum]:
    """The optimum of each budget with three sizes or more; means over seeds."""
    chosen = []
    for budget in np.unique(cells.budget):
        own = cells.take(cells.budget == budget)
        sizes = np.unique(own.N)
        if len(sizes) < 3:
            continue
        means = np.array([own.L[own.N == N].mean() for N in sizes])
        least = int(means.argmin())
        near = slice(max(0, least - 2), least + 3)  # far from the optimum the loss is no parabola
        curve = np.polynomial.Polynomial.fit(np.log(sizes[near]), means[near], 2).convert().coef
        place = -curve[1] / (2 * curve[2]) if len(curve) == 3 and curve[2] > 0 else np.nan
        inside = bool(np.log(sizes[0]) <= place <= np.log(sizes[-1]))
        N = float(np.exp(place)) if inside else float(sizes[least])
        loss = float(np.polynomial.Polynomial(curve)(place)) if inside else float(means[least])
        chosen.append(Optimum(float(budget), N, loss, inside))
    return chosen


def optimum_exponent(cells: Cells) -> float:
    """p of N_opt ~ C^p; NaN with fewer than two optima inside the widths."""
    inside = [each for each in optima(cells) if each.inside]
    if len(inside) < 2:
        return float("nan")
    return _slope([math.log(each.budget) for each in inside], [math.log(each.N) for each in inside])


def slope(cells: Cells, metric: str) -> float:
    """A metric's rise a decade of FLOPs, along the cells of least loss at each budget (means over seeds)."""
    budgets = np.unique(cells.budget)
    if len(budgets) < 2:
        return float("nan")
    return _slope(np.log10(budgets).tolist(), [least_loss(cells, budget, metric) for budget in budgets])


def least_loss(cells: Cells, budget: float, metric: str) -> float:
    """A metric of the size of least loss at a budget, both means over seeds."""
    own = cells.take(cells.budget == budget)
    sizes = np.unique(own.N)
    best = sizes[np.argmin([own.L[own.N == N].mean() for N in sizes])]
    return float(own.metrics[metric][own.N == best].mean())


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    return float(np.polyfit(x, y, 1)[0])


@dataclass(frozen=True)
class Prediction:
    """The largest budget, predicted from the others. errors: predicted minus measured loss of each cell, nats."""

    budget: float
    N: np.ndarray
    measured: np.ndarray
    errors: np.ndarray


def predict_largest(cells: Cells, floor: float | None) -> Prediction | None:
    """None where the other budgets have too few cells, or two budgets are all."""
    largest = cells.budget == cells.budget.max()
    others = cells.take(~largest)
    if len(others) < _FEWEST or len(np.unique(others.budget)) < 2:
        return None
    held_out, law = cells.take(largest), fit_law(others, floor)
    errors = law(held_out.N, held_out.D) - held_out.L
    return Prediction(float(cells.budget.max()), held_out.N, held_out.L, errors)


@dataclass(frozen=True)
class Fit:
    """The fit of one tower. intervals: of a, b, the optimum's exponents, and the metrics' slopes a decade."""

    tower: str
    cells: Cells
    law: Law
    intervals: Mapping[str, Interval]
    optima: Sequence[Optimum]
    prediction: Prediction | None

    def summary(self) -> dict[str, Any]:
        """The fit as JSON has it."""
        held_out = None
        if self.prediction is not None:
            arrays = {name: getattr(self.prediction, name).tolist() for name in ("N", "measured", "errors")}
            held_out = {"budget": self.prediction.budget, **arrays}
        return {
            "tower": self.tower,
            "cells": len(self.cells),
            "law": asdict(self.law),
            "intervals": {name: asdict(interval) for name, interval in self.intervals.items()},
            "optima": [asdict(each) for each in self.optima],
            "held_out": held_out,
        }


def fit_tower(tower: str, cells: Cells, floor: float | None, resamples: int, seed: int = 0) -> Fit:
    """Raises DataError for fewer cells than a law needs, or a loss that lies below the floor."""
    if len(cells) < _FEWEST or len(np.unique(cells.N)) < 2 or len(np.unique(cells.budget)) < 2:
        sizes, budgets = len(np.unique(cells.N)), len(np.unique(cells.budget))
        raise DataError(
            f"{tower}: {len(cells)} finished cells of {sizes} sizes at {budgets} budgets: a law needs {_FEWEST}, of 2 "
            "sizes at 2 budgets; run more of the grid"
        )
    if floor is not None and cells.L.min() <= floor:
        raise DataError(
            f"{tower}: a loss of {cells.L.min():.4f} nats lies below the oracle's {floor:.4f}, which is of other data"
        )
    law = fit_law(cells, floor)
    random = np.random.default_rng(seed)
    drawn = [cells.take(random.integers(0, len(cells), len(cells))) for _ in range(resamples)]
    laws = [fit_law(each, floor, near=law) for each in drawn]
    names = ("a", "b") if floor is not None else ("a", "b", "E")
    intervals = {name: _interval(getattr(law, name), [getattr(each, name) for each in laws]) for name in names}
    intervals["b/(a+b)"] = _interval(law.b / (law.a + law.b), [each.b / (each.a + each.b) for each in laws])
    measures: dict[str, Callable[[Cells], float]] = {"isoFLOP": optimum_exponent}
    measures |= {f"{name} a decade": (lambda each, name=name: slope(each, name)) for name in METRICS}  # type: ignore[misc]
    for name, measure in measures.items():
        intervals[name] = _interval(measure(cells), [measure(each) for each in drawn])
    return Fit(tower, cells, law, intervals, optima(cells), predict_largest(cells, floor))


def _interval(value: float, resampled: Sequence[float]) -> Interval:
    """NaN where more than a tenth of the resamples have no value."""
    values = np.array(resampled)
    if not len(values) or np.isnan(values).mean() > 0.1:
        return Interval(value, float("nan"), float("nan"))
    return Interval(value, *map(float, np.nanpercentile(values, [2.5, 97.5])))
