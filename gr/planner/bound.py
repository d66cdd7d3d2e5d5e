"""A lower bound on the cost of any solution, from the linear relaxation of the choice of options.

The relaxation lets shards be cut at will, so every rank carries the mean. It keeps these constraints: each table takes
(a mix of) options, their bytes fit all memories together, a shard that is dearer than the whole cost, less what every
rank has of tables that can only be on all ranks, cannot be part of it, and each sharding type that is used costs its
latencies. Memory is one constraint, so the linear program has one multiplier,
the price of a byte, and is solved by a search over it; any price gives a bound, so none needs to be exact.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np

from gr.planner.candidates import Capacity, Options, Scope

PRICE_STEPS = 30
CEILING_STEPS = 30
FAR_OFF = 1.25  # ratio to the best bound above which a rough bound suffices
TOLERANCE = 1e-4  # relative distance that the bound may stay below the relaxation's optimum


@dataclass(frozen=True)
class Relaxed:
    """A solution of the relaxed problem.

    option_T: the cheapest options at `price` seconds a byte; they fit. seconds: a bound on the cost of a rank.
    """

    option_T: np.ndarray
    price: float
    seconds: float


@dataclass(frozen=True)
class Group:
    """Options of some sharding types.

    latency: seconds that every rank pays for using these types. bound: no solution among the options costs less.
    """

    usable_O: np.ndarray
    latency: float
    bound: float


class Relaxation:
    """The relaxed problem of `options` under `capacity`."""

    def __init__(self, options: Options, capacity: Capacity) -> None:
        self.options, self.capacity = options, capacity
        self.shard_seconds_O = options.seconds_O + np.maximum(options.extra_seconds_O, 0)
        self.fits_O = (options.hbm_O + np.maximum(options.extra_hbm_O, 0) <= capacity.hbm_bytes) & (
            options.host_O <= capacity.host_bytes
        )

    def cheapest(self, usable_O: np.ndarray, price: float) -> tuple[np.ndarray, float] | None:
        """The option with the lowest seconds + price * bytes of each table, and the sum; None if one has none."""
        cost_O = np.where(usable_O, self.options.total_seconds_O + price * self.options.total_hbm_O, np.inf)
        cost_T = self.options.minimum_T(cost_O)
        if not np.isfinite(cost_T).all():
            return None
        index_O = np.where(cost_O == cost_T[self.options.table_O], np.arange(len(cost_O)), len(cost_O))
        return self.options.minimum_T(index_O), float(cost_T.sum())

    def solve(self, usable_O: np.ndarray, *, share: float = 1.0) -> Relaxed | None:
        """The relaxation with `share` of the memory; None where the tables do not fit it."""
        ranks = self.capacity.ranks
        memory = share * self.capacity.hbm_bytes * ranks
        free = self.cheapest(usable_O, 0.0)
        if free is None:
            return None
        option_T, cost = free
        used = self._bytes(option_T)
        if used <= memory:
            return Relaxed(option_T, 0.0, cost / ranks)
        smallest_T = self.options.minimum_T(np.where(usable_O, self.options.total_hbm_O, np.inf))
        if smallest_T.sum() > memory:
            return None
        low, high, bound = 0.0, cost / used, cost / ranks
        fitting: np.ndarray | None = None
        while fitting is None:
            option_T, value = self._at(usable_O, high)
            bound = max(bound, (value - high * memory) / ranks)
            if self._bytes(option_T) <= memory:
                fitting = option_T
            elif high > 1e30:  # equal options: no price separates them
                return None
            else:
                low, high = high, 4 * high
        for _ in range(PRICE_STEPS):
            middle = (low + high) / 2
            option_T, value = self._at(usable_O, middle)
            bound = max(bound, (value - middle * memory) / ranks)
            if self._bytes(option_T) <= memory:
                high, fitting = middle, option_T
            else:
                low = middle
        return Relaxed(fitting, high, bound)

    def _at(self, usable_O: np.ndarray, price: float) -> tuple[np.ndarray, float]:
        choice = self.cheapest(usable_O, price)
        assert choice is not None, "usable options do not depend on the price"
        return choice

    def _bytes(self, option_T: np.ndarray) -> float:
        return float(self.options.total_hbm_O[option_T].sum())

    def bound(self, usable_O: np.ndarray, latency: float) -> float | None:
        """A cost that no solution among the usable options is below, latency included; None where there is none."""

        def holds(cost: float) -> bool:
            relaxed = self.solve(self.below(usable_O, cost - latency))
            return relaxed is not None and relaxed.seconds + latency <= cost

        relaxed = self.solve(usable_O)
        if relaxed is None:
            return None
        low = relaxed.seconds + latency
        if holds(low * (1 + TOLERANCE)):
            return low
        high = 2 * low
        while not holds(high):
            low, high = high, 2 * high
        for _ in range(CEILING_STEPS):
            if high - low <= TOLERANCE * high:
                break
            middle = (low + high) / 2
            low, high = (low, middle) if holds(middle) else (middle, high)
        return low

    def below(self, usable_O: np.ndarray, seconds: float) -> np.ndarray:
        """The options with which no rank need be above `seconds`: a shard lies on top of what every rank has anyway.

        Every rank has a shard of each table that only options of scope ALL are left for. The fewer options are left,
        the more such tables there are.
        """
        left_O, confined_T = usable_O & (self.shard_seconds_O <= seconds), np.zeros(self.options.tables, dtype=bool)
        while True:
            wide_O = self.options.scope_O == Scope.ALL
            only_T = self.options.minimum_T(np.where(left_O & ~wide_O, 0, 1)) == 1
            if (only_T == confined_T).all():
                return left_O
            confined_T = only_T
            least_T = self.options.minimum_T(np.where(left_O & wide_O, self._least_seconds_O, np.inf))
            least_T = np.where(only_T & np.isfinite(least_T), least_T, 0.0)
            others_O = least_T.sum() - least_T[self.options.table_O]
            left_O = left_O & (self.shard_seconds_O + others_O <= seconds)

    @cached_property
    def _least_seconds_O(self) -> np.ndarray:
        """The costs of the rank with the smallest shard: shards are alike but for rows that the last ones may lack."""
        alike_O = self.options.seconds_O * self.options.shards_O + self.options.extra_seconds_O
        return np.maximum(self.options.seconds_O - np.maximum(alike_O - self.options.total_seconds_O, 0), 0)

    @cached_property
    def groups(self) -> list[Group]:
        """Sets of sharding types that could hold the best solution, the lowest bound first; empty where none fits."""
        types = np.unique(self.options.sharding_type_O[self.fits_O])
        latencies = self.options.group_seconds_S[types]
        free, charged = types[latencies == 0], types[latencies > 0]
        rough: list[Group] = []
        for size in range(len(charged) + 1):
            for chosen in combinations(charged, size):
                usable_O = self.fits_O & np.isin(self.options.sharding_type_O, [*free, *chosen])
                latency = float(self.options.group_seconds_S[list(chosen)].sum()) if chosen else 0.0
                if (relaxed := self.solve(usable_O)) is not None:
                    rough.append(Group(usable_O, latency, relaxed.seconds + latency))
        exact: list[Group] = []
        for group in sorted(rough, key=lambda g: g.bound):
            # The rough bound suffices far from the best: such a set is packed only where no better one can be.
            near = not exact or group.bound < FAR_OFF * min(g.bound for g in exact)
            bound = self.bound(group.usable_O, group.latency) if near else group.bound
            assert bound is not None, "the rough bound exists"
            exact.append(Group(group.usable_O, group.latency, bound))
        return sorted(exact, key=lambda g: g.bound)
