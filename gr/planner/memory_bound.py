"""A lower bound on the memory that a model takes, on many numbers of ranks at once: what excludes a fit without a plan.

Fitting is not monotone in the number of ranks: with rank_batch_size, more ranks read more ids a step, and the rank that
owns a table receives all of them. So every number of ranks has a bound of its own.

N numbers of ranks, T tables.
"""

import numpy as np

from gr.config.inventory import SHARDING_TYPES, AnyShardingType, InventoryConfig, Kernel, TableConfig
from gr.planner.enumerate import COLUMN_TYPES, KERNELS, allowed_types, column_widths, most_blocks, row_blocks
from gr.planner.estimate_tables import Volume, shard_memory, volume
from gr.planner.memory import fixed_memory
from gr.planner.topology import Topology, with_ranks


def least_use(inventory: InventoryConfig, topology: Topology, ranks_N: np.ndarray) -> np.ndarray:
    """The least share of the memory that any plan takes, on the hardware of `topology`, [N]. Above 1 none fits."""
    hbm_N, host_N = least_memory(inventory, topology, ranks_N)
    left_N = _left(inventory, topology, ranks_N)
    with np.errstate(divide="ignore", invalid="ignore"):
        # 0 / 0: nothing is offloaded to hosts without memory for it.
        host_use_N = np.nan_to_num(host_N / topology.host_bytes, nan=0.0, posinf=np.inf)
        use_N = np.where(left_N > 0, np.maximum(hbm_N / left_N, host_use_N), 1 - left_N / topology.hbm_bytes)
    named = max((rank for table in inventory.tables for rank in table.ranks or ()), default=0)
    return np.where(ranks_N > named, use_N, np.inf)


def least_memory(inventory: InventoryConfig, topology: Topology, ranks_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes for tables on the fullest rank, of HBM and on the host, that no plan is below, [N] each."""
    total_NT, shard_NT, host_NT = _least(inventory, topology, ranks_N)
    return np.maximum(total_NT.sum(axis=1) / ranks_N, shard_NT.max(axis=1)), host_NT.max(axis=1)


def _left(inventory: InventoryConfig, topology: Topology, ranks_N: np.ndarray) -> np.ndarray:
    """Bytes for tables on each rank, [N]; negative where the rest does not fit."""
    left: dict[tuple[int, int], float] = {}
    # Without FSDP the rest depends on the batch of a rank alone.
    keys = [(inventory.batch_on(n), n if inventory.dense_parallel == "fsdp" else 0) for n in ranks_N.tolist()]
    for key, ranks in dict(zip(keys, ranks_N.tolist(), strict=True)).items():
        left[key] = topology.hbm_bytes - sum(fixed_memory(inventory, with_ranks(topology, ranks)).values())
    return np.array([left[key] for key in keys])


def _least(
    inventory: InventoryConfig, topology: Topology, ranks_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes [N, T] that each table takes at least: over all ranks, on the rank of a shard, on the host of a shard."""
    ranks = ranks_N[:, None]
    volumes, tables = volume(inventory, ranks), inventory.tables
    total, shard, host = (np.full((len(ranks_N), len(tables)), np.inf) for _ in range(3))
    for sharding_type in SHARDING_TYPES:
        kernels: tuple[Kernel, ...] = ("dense",) if sharding_type == "data_parallel" else KERNELS
        for kernel in kernels:
            index = [
                i
                for i, table in enumerate(tables)
                if sharding_type in allowed_types(table)
                and (kernel in table.kernels or sharding_type == "data_parallel")
            ]
            if index:
                chosen = [tables[i] for i in index]
                least = _least_of_type(volumes[np.array(index)], chosen, (sharding_type, kernel), ranks, topology)
                for all_, bytes_ in zip((total, shard, host), least, strict=True):
                    all_[:, index] = np.minimum(all_[:, index], bytes_)
    return total, shard, host


def _least_of_type(
    v: Volume,
    tables: list[TableConfig],
    way: tuple[AnyShardingType, Kernel],
    ranks: np.ndarray,
    topology: Topology,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As _least, of tables that are all sharded in one way; infinite where this needs more or fewer shards.

    Every cost grows with the columns of a shard, and their sum with the number of blocks: the narrowest block has the
    smallest shard, and a single block the smallest sum.
    """
    sharding_type, _ = way
    local = np.minimum(ranks, topology.ranks_per_host)
    most_shards = np.array([table.max_shards or np.inf for table in tables])
    parts, most = row_blocks(sharding_type, ranks, local), most_blocks(sharding_type, ranks, local)
    rows = np.ceil(v.rows / parts) / v.rows
    narrowest = v.dim
    if sharding_type in COLUMN_TYPES:
        largest = with_ranks(topology, int(ranks.max() // topology.ranks_per_host + 1) * topology.ranks_per_host)
        widths = [column_widths(table, sharding_type, largest) for table in tables]
        narrowest = np.array([min((w for w in each if w), default=0) for each in widths])
    columns = np.maximum(narrowest, v.dim / np.minimum(most, most_shards))
    ids = rows * np.where(parts > 1, 1 - v.hottest, 1.0)
    shard = shard_memory(v, *way, (columns, rows, ids))
    one, none = np.ones(len(tables)), np.zeros(len(tables))
    whole, empty = (shard_memory(v, *way, (v.dim, share, share)).hbm for share in (one, none))
    total = whole * ranks if sharding_type == "data_parallel" else whole + (parts - 1) * empty
    possible = (parts <= most_shards) & (parts * most >= np.array([table.min_shards for table in tables]))
    total, hbm, host = (np.where(possible, bytes_, np.inf) for bytes_ in (total, shard.hbm, shard.host))
    return total, hbm, host
