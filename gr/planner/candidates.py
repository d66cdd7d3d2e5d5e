"""The search space of the solver: every way to shard every table, with its cost, as arrays. Knows no cost model.

T tables, O options (sorted by table), R ranks.
"""

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np


class Scope(IntEnum):
    """Where the shards of an option go."""

    RANK = 0  # each on a rank of its own, any rank
    HOST = 1  # groups of one shard a rank of a host, on any hosts, a host of its own for each group
    ALL = 2  # one on every rank
    HOST_RANKS = 3  # each on a rank of its own, all on one host


@dataclass(frozen=True)
class Options:
    """One entry an option. Its shards are alike but one: seconds_O and the bytes are those of the many.

    extra_seconds_O, extra_hbm_O: what shard number extra_shard_O takes more than the others: it has the most read row.
    Negative where it is the last of the column blocks, and narrower. Of scope HOST: that shard of every host.
    total_seconds_O, total_hbm_O: exact sums over the shards, which may be less than the shards say: the last rows of a
    table may not fill theirs.
    group_seconds_S: what using a sharding type at all costs every rank, by index into SHARDING_TYPES: latencies.
    allowed_TR: False where a table may not be on a rank; None where every table may be on every rank.
    """

    table_O: np.ndarray  # int, ascending
    sharding_type_O: np.ndarray  # index into SHARDING_TYPES
    kernel_O: np.ndarray  # index into KERNELS
    column_width_O: np.ndarray  # 0 where columns are not cut
    shards_O: np.ndarray
    scope_O: np.ndarray
    seconds_O: np.ndarray
    hbm_O: np.ndarray
    host_O: np.ndarray
    total_seconds_O: np.ndarray
    total_hbm_O: np.ndarray
    extra_seconds_O: np.ndarray
    extra_hbm_O: np.ndarray
    extra_shard_O: np.ndarray
    group_seconds_S: np.ndarray
    allowed_TR: np.ndarray | None = None

    @property
    def tables(self) -> int:
        return int(self.table_O[-1]) + 1

    @cached_property
    def _starts_T(self) -> np.ndarray:
        return np.searchsorted(self.table_O, np.arange(self.tables))

    def least_T(self, values_O: np.ndarray) -> np.ndarray:
        """The least value among the options of each table."""
        return np.minimum.reduceat(values_O, self._starts_T)


@dataclass(frozen=True)
class Capacity:
    """What the tables may take on each of `ranks` ranks, on hosts of `ranks_per_host`."""

    ranks: int
    ranks_per_host: int
    hbm_bytes: float
    host_bytes: float


@dataclass(frozen=True)
class Solution:
    """option_T: the option of each table. ranks_T: the ranks of its shards.

    cost: of the costliest rank, in seconds. bound_seconds: no solution costs less.
    """

    option_T: np.ndarray
    ranks_T: list[np.ndarray]
    cost: float
    bound_seconds: float
