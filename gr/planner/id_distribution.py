"""Distinct rows that a step reads, when ids follow Zipf's law: row i of E is drawn with p_i = i^-s / H(E, s).

All functions are vectorised over tables (numpy broadcasting) and hold for tables of any size: sums over rows are exact
over the hottest ones and integrals in log(row) over the rest.
"""

import numpy as np
from numpy.typing import ArrayLike

from gr.config.inventory import STEEPEST

HEAD = 48  # rows summed one by one
PANELS = 16  # intervals of the tail, equal in log(row)
CACHE_FRACTION = 0.2  # share of the rows that is cached, in the definition of cacheability
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(8)
_HEAD_ROWS = np.arange(1.0, HEAD + 1)


def distinct_ids(rows: ArrayLike, draws: ArrayLike, skew: ArrayLike) -> np.ndarray:
    """Expected distinct rows among `draws` draws: sum_i 1 - (1 - p_i)^draws. Below one draw: `draws`.

    Within 1e-3 of the exact sum for rows up to 1e10, draws up to 1e9 and skews up to 4.
    """
    E, n, s = np.broadcast_arrays(np.asarray(rows, float), np.asarray(draws, float), np.asarray(skew, float))
    E1, n1, s1 = E[..., None], np.maximum(n, 1.0)[..., None], s[..., None]
    share = hottest_share(E, s)[..., None]

    def read(row: np.ndarray) -> np.ndarray:
        """Probability that a row is read at all."""
        with np.errstate(divide="ignore"):  # a table of one row: log(0), and it is read for certain
            return -np.expm1(n1 * np.log1p(-share * row**-s1))

    head = np.where(_HEAD_ROWS <= E1, read(_HEAD_ROWS), 0.0).sum(axis=-1)
    # sum_{HEAD < i <= E} f(i) = integral of f from HEAD + 1/2 to E + 1/2, with x = exp(u) and dx = x du.
    first = np.log(HEAD + 0.5)
    panel = np.maximum(np.log(E1 + 0.5) - first, 0.0) / PANELS
    place = (np.arange(PANELS)[:, None] + (_NODES + 1.0) / 2.0).ravel()
    row = np.exp(first + panel * place)
    tail = (read(row) * row * np.tile(_WEIGHTS, PANELS) * panel / 2.0).sum(axis=-1)
    return np.where(n < 1.0, n, np.minimum(head + tail, np.minimum(E, np.maximum(n, 1.0))))


def distinct_rows(rows: np.ndarray, drawn: np.ndarray, of_step: np.ndarray, skew: np.ndarray) -> np.ndarray:
    """Expected distinct rows that a step reads: of `drawn` ids of examples, and of `of_step` others, which are the same
    on all ranks, differ from one another and lie evenly over the table.
    """
    of_step = np.minimum(of_step, rows)
    return of_step + (1 - of_step / rows) * distinct_ids(rows, drawn, skew)


def hottest_share(rows: ArrayLike, skew: ArrayLike) -> np.ndarray:
    """p_1: the share of draws that the most read row gets."""
    return 1.0 / harmonic(rows, skew)


def miss_rate(rows: ArrayLike, skew: ArrayLike, cache_fraction: ArrayLike, cacheability: ArrayLike) -> np.ndarray:
    """The share of draws that miss a cache of the hottest `cache_fraction` of the rows.

    Where cacheability is not NaN, the skew is the one with which a cache of CACHE_FRACTION misses that share.
    """
    E, s, fraction, stated = np.broadcast_arrays(rows, skew, cache_fraction, np.asarray(cacheability, float))
    if (known := ~np.isnan(stated)).any():
        s = np.array(s, dtype=float)
        s[known] = _skew_of(E[known], stated[known])
    return _missed(E, s, fraction)


def harmonic(rows: ArrayLike, skew: ArrayLike) -> np.ndarray:
    """H(E, s) = sum_{i=1..E} i^-s, by the Euler-Maclaurin formula from HEAD on."""
    E, s = np.broadcast_arrays(np.asarray(rows, float), np.asarray(skew, float))
    E1, s1 = E[..., None], s[..., None]
    head = np.where(_HEAD_ROWS <= E1, _HEAD_ROWS**-s1, 0.0).sum(axis=-1)
    last, end = float(HEAD), np.maximum(E, HEAD)
    length = np.log(end / last)
    exponent = (1.0 - s) * length
    flat = np.abs(exponent) < 1e-9  # s = 1: the integral is the logarithm
    growth = np.where(flat, 1.0, np.expm1(exponent) / np.where(flat, 1.0, exponent))
    tail = last ** (1.0 - s) * length * growth + (end**-s - last**-s) / 2.0
    tail += s / 12.0 * (last ** (-s - 1.0) - end ** (-s - 1.0))
    return head + tail


def _missed(rows: np.ndarray, skew: np.ndarray, fraction: np.ndarray | float) -> np.ndarray:
    total = harmonic(rows, skew)
    return np.maximum(1.0 - harmonic(np.ceil(rows * fraction), skew) / total, 0.0)


def _skew_of(rows: np.ndarray, cacheability: np.ndarray) -> np.ndarray:
    """The skew with which a cache of CACHE_FRACTION misses `cacheability`, by bisection: misses fall with the skew."""
    low, high = np.zeros(rows.shape), np.full(rows.shape, STEEPEST)
    for _ in range(40):
        middle = (low + high) / 2.0
        above = _missed(rows, middle, CACHE_FRACTION) > cacheability
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return high
