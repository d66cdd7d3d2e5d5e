"""The random choice of an example's events: where its history ends, and which events of a long one stay.

A draw is a hash of (seed, example, place), so it is the same at every world size and after resuming. B examples, T
events of all of them.
"""

from dataclasses import dataclass

import numpy as np

from gr.config.histories import StochasticLength


@dataclass(frozen=True)
class Draws:
    """Random numbers for examples. number_B: int64, the places of the examples in the training order; none repeats."""

    seed: int
    number_B: np.ndarray

    def uniform(self, purpose: int, number: np.ndarray, place: np.ndarray | int = 0) -> np.ndarray:
        """Uniform draws in (0, 1), float64, one for each number. Uses of the same number differ in purpose or place."""
        with np.errstate(over="ignore"):
            key = np.uint64(self.seed) ^ _mix(np.full(1, purpose, dtype=np.uint64))
            words = _mix(_mix(number.astype(np.uint64) + key) + np.asarray(place).astype(np.uint64))
        return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


CUT, KEEP_ALL, PICK, COMPARE, DROP, LIST = range(6)


def random_ends(count_B: np.ndarray, draws: Draws) -> np.ndarray:
    """Uniform draws from 1..count_B, int64 [B], 0 where count_B is 0: each of n events ends an example at rate 1/n."""
    return np.ceil(draws.uniform(CUT, draws.number_B) * count_B).astype(np.int64)


def stochastic_length(
    length_B: np.ndarray, ages_T: np.ndarray, config: StochasticLength, max_length: int, draws: Draws
) -> np.ndarray:
    """A mask of the events that stay, bool [T] (arXiv 2402.17152, Eq. 4 and App. D).

    An example of n events keeps all of them if n <= N^(alpha/2), N = max_length, and else at rate N^alpha / n^2;
    otherwise it keeps N^(alpha/2) of them, rounded down. ages_T: f_i = t_n - t_i, in any unit, oldest event first. The
    selector greedy keeps the youngest, random any, weighted draws without replacement at rates 1 - f_i / sum_j f_j.
    """
    longest = max_length ** (config.alpha / 2)
    with np.errstate(divide="ignore"):
        whole_B = draws.uniform(KEEP_ALL, draws.number_B) < longest**2 / length_B.astype(np.float64) ** 2
    cut_B = (length_B > longest) & ~whole_B
    example_T = np.repeat(np.arange(len(length_B)), length_B)
    starts_B = np.cumsum(length_B) - length_B
    place_T = np.arange(len(example_T)) - starts_B[example_T]
    if config.selector == "greedy":
        preference_T = place_T.astype(np.float64)
    else:
        preference_T = draws.uniform(PICK, draws.number_B[example_T], place_T)
    if config.selector == "weighted":
        total_B = np.bincount(example_T, weights=ages_T, minlength=len(length_B))
        weight_T = 1 - ages_T / np.maximum(total_B, np.finfo(float).tiny)[example_T]
        # The largest of log(u) / w are a draw without replacement at rates w (Efraimidis and Spirakis, 2006).
        with np.errstate(divide="ignore"):
            preference_T = np.log(preference_T) / weight_T
    order = np.lexsort((-preference_T, example_T))
    keep_T = np.ones(len(example_T), dtype=bool)
    keep_T[order] = place_T < int(longest)  # the i-th of `order` has rank place_T[i] in its example
    return keep_T | ~cut_B[example_T]


def _mix(x: np.ndarray) -> np.ndarray:
    """The hash splitmix64 (Steele, Lea and Flood, OOPSLA 2014), in arithmetic modulo 2^64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
