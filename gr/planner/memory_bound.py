"""A lower bound on the memory that a model takes, on many numbers of ranks at once: what excludes a fit without a plan.

Fitting is not monotone in the number of ranks: with rank_batch_size, more ranks read more ids a step, and the rank that
owns a table receives all of them. So every number of ranks has a bound of its own.

N numbers of ranks, T tables.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf

import numpy as np

from gr.config.inventory import SHARDING_TYPES, AnyShardingType, InventoryConfig, Kernel
from gr.planner.enumerate import COLUMN_TYPES, KERNELS, allowed_types, column_widths, most_blocks, row_blocks
from gr.planner.estimate_tables import Volume, shard_memory, volume
from gr.planner.memory import fixed_memory
from gr.planner.topology import LARGEST_WORLD, Topology, with_ranks


@dataclass(frozen=True)
class _Way:
    """A sharding type and kernel, the tables that may have them, and what limits their shards. narrowest: columns."""

    sharding_type: AnyShardingType
    kernel: Kernel
    index: np.ndarray
    narrowest: np.ndarray
    min_shards: np.ndarray
    max_shards: np.ndarray


class MemoryBound:
    """The least memory that any plan for `inventory` takes on the hardware of `topology`, on any number of ranks."""

    def __init__(self, inventory: InventoryConfig, topology: Topology) -> None:
        self.inventory, self.topology = inventory, topology
        self.ways = list(_ways(inventory, topology))
        # A table that names its ranks needs all of them.
        self.named = max((rank for table in inventory.tables for rank in table.ranks or ()), default=0)

    def use(self, ranks_N: np.ndarray) -> np.ndarray:
        """The least share of the memory that is taken, [N]. Above 1 nothing fits."""
        hbm_N, host_N = self.least(ranks_N)
        left_N = self._left(ranks_N)
        with np.errstate(divide="ignore", invalid="ignore"):
            # 0 / 0: nothing is offloaded to hosts without memory for it.
            host_use_N = np.nan_to_num(host_N / self.topology.host_bytes, nan=0.0, posinf=inf)
            use_N = np.where(left_N > 0, np.maximum(hbm_N / left_N, host_use_N), 1 - left_N / self.topology.hbm_bytes)
        groups = self.inventory.groups
        return np.where((ranks_N // groups > self.named) & (ranks_N % groups == 0), use_N, inf)

    def least(self, ranks_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bytes for tables on the fullest rank, of HBM and on the host, that no plan is below, [N] each."""
        volumes = volume(self.inventory, ranks_N[:, None])
        group_N = np.maximum(ranks_N // self.inventory.groups, 1)
        ranks = group_N[:, None]
        total, shard, host = (np.full((len(ranks_N), len(self.inventory.tables)), inf) for _ in range(3))
        for way in self.ways:
            least = _least(volumes[way.index], way, ranks, np.minimum(ranks, self.topology.ranks_per_host))
            for all_, bytes_ in zip((total, shard, host), least, strict=True):
                all_[:, way.index] = np.minimum(all_[:, way.index], bytes_)
        return np.maximum(total.sum(axis=1) / group_N, shard.max(axis=1, initial=0)), host.max(axis=1, initial=0)

    def _left(self, ranks_N: np.ndarray) -> np.ndarray:
        """Bytes for tables on each rank, [N]; negative where the rest does not fit."""
        inventory, left = self.inventory, dict[tuple[int, int], float]()
        # Without FSDP the rest depends on the batch of a rank alone.
        keys = [(inventory.batch_on(n), n if inventory.dense_parallel == "fsdp" else 0) for n in ranks_N.tolist()]
        for key, ranks in dict(zip(keys, ranks_N.tolist(), strict=True)).items():
            fixed = fixed_memory(inventory, with_ranks(self.topology, ranks))
            left[key] = self.topology.hbm_bytes - sum(fixed.values())
        return np.array([left[key] for key in keys])


def _ways(inventory: InventoryConfig, topology: Topology) -> Iterator[_Way]:
    local = topology.ranks_per_host
    largest = replace(topology, ranks=LARGEST_WORLD // local * local)  # which has every width of a column block
    allowed_T = [allowed_types(table) for table in inventory.tables]
    for sharding_type in SHARDING_TYPES:
        replicated = sharding_type == "data_parallel"
        for kernel in ("dense",) if replicated else KERNELS:
            pairs = enumerate(zip(inventory.tables, allowed_T, strict=True))
            index = [i for i, (t, types) in pairs if sharding_type in types and (replicated or kernel in t.kernels)]
            if not index:
                continue
            tables = [inventory.tables[i] for i in index]
            narrowest = np.array([table.dim for table in tables])
            if sharding_type in COLUMN_TYPES:
                widths = [column_widths(table, sharding_type, largest) for table in tables]
                narrowest = np.array([min((width for width in each if width), default=0) for each in widths])
            least, most = [t.min_shards for t in tables], [t.max_shards or inf for t in tables]
            yield _Way(sharding_type, kernel, np.array(index), narrowest, np.array(least), np.array(most))


def _least(
    v: Volume, way: _Way, ranks: np.ndarray, ranks_per_host: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes that a table takes at least in one way, [N, T]: over all ranks, in a shard, in a shard on the host.

    Infinite where the way needs more or fewer shards than the table may have. Every cost grows with the columns of a
    shard, and their sum with the number of blocks: the narrowest block has the smallest shard, and a single block the
    smallest sum.
    """
    kind = way.sharding_type, way.kernel
    parts = row_blocks(way.sharding_type, ranks, ranks_per_host)
    most = most_blocks(way.sharding_type, ranks, ranks_per_host)
    rows = np.ceil(v.rows / parts) / v.rows
    columns = np.maximum(way.narrowest, v.dim / np.minimum(most, way.max_shards))
    shard = shard_memory(v, *kind, (columns, rows, rows * np.where(parts > 1, 1 - v.hottest, 1.0)))
    one, none = np.ones(len(way.index)), np.zeros(len(way.index))
    whole, empty = (shard_memory(v, *kind, (v.dim, share, share)).hbm for share in (one, none))
    total = whole * ranks if way.sharding_type == "data_parallel" else whole + (parts - 1) * empty
    possible = (parts <= way.max_shards) & (parts * most >= way.min_shards)
    total, hbm, host = (np.where(possible, bytes_, inf) for bytes_ in (total, shard.hbm, shard.host))
    return total, hbm, host
