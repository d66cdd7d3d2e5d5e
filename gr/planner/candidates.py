"""The search space of the solver: every way to shard every table, with its cost, as arrays. Knows no cost model.

T tables, O options (sorted by table), R ranks.
"""

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np


class Scope(IntEnum):
    """The ranks that the shards of an option may take."""

    RANK = 0  # any ranks, one shard on each
    HOST = 1  # any hosts, one group of shards on each, one shard of a group on each rank of its host
    ALL = 2  # every rank, one shard on each
    HOST_RANKS = 3  # ranks of one host, one shard on each


@dataclass(frozen=True)
class Options:
    """Arrays with one entry an option. All shards of an option but one are alike; seconds_O and the bytes are theirs.

    extra_seconds_O, extra_hbm_O: what shard number extra_shard_O takes beyond the others, because it has the most read
    row; negative where it is the last column block, and narrower. With scope HOST, that shard of every host.
    total_seconds_O, total_hbm_O: exact sums over the shards. They may be below the sum of the entries above, because
    the last rows of a table may not fill their shard.
    group_seconds_S: latencies that every rank pays for using a sharding type at all, by index into SHARDING_TYPES.
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

    def minimum_T(self, values_O: np.ndarray) -> np.ndarray:
        """The smallest value among the options of each table."""
        return np.minimum.reduceat(values_O, self._starts_T)


@dataclass(frozen=True)
class Capacity:
    """Memory for tables on each of `ranks` ranks, on hosts of `ranks_per_host`."""

    ranks: int
    ranks_per_host: int
    hbm_bytes: float
    host_bytes: float


@dataclass(frozen=True)
class Solution:
    """An assignment of tables to ranks.

    option_T: the option of each table. ranks_T: the ranks of its shards. cost: seconds of the costliest rank.
    bound_seconds: no solution costs less.
    """

    option_T: np.ndarray
    ranks_T: list[np.ndarray]
    cost: float
    bound_seconds: float
