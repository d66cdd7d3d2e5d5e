"""Enumerates the ways to shard every table of an inventory, each with its cost on a topology."""

from collections.abc import Iterator
from dataclasses import dataclass
from zlib import crc32

import numpy as np

from gr.config.dlrm import ROW_MULTIPLE
from gr.config.inventory import SHARDING_TYPES, AnyShardingType, InventoryConfig, Kernel, TableConfig
from gr.errors import PlanError
from gr.planner.candidates import Options, Scope
from gr.planner.estimate_tables import CollectiveCosts, Counts, ShardCosts, Traffic, shard_costs, traffic
from gr.planner.groups import one_group
from gr.planner.placement import column_blocks
from gr.planner.topology import Topology

KERNELS: tuple[Kernel, ...] = ("dense", "fused", "fused_uvm", "fused_uvm_caching")
# Narrower column blocks leave most lanes of a warp idle. Where nothing but columns may be cut, fbgemm's ROW_MULTIPLE
# is the minimum.
MIN_COLUMNS = 8
WIDTHS = 64  # about as many widths of column blocks are tried for a table, at most
COLUMN_TYPES = {"column_wise", "table_column_wise", "grid_shard"}

SCOPES: dict[AnyShardingType, Scope] = {
    "data_parallel": Scope.ALL,
    "table_wise": Scope.RANK,
    "column_wise": Scope.RANK,
    "row_wise": Scope.ALL,
    "table_row_wise": Scope.HOST,
    "table_column_wise": Scope.HOST_RANKS,
    "grid_shard": Scope.HOST,
}


@dataclass(frozen=True)
class _Cut:
    """One sharding type, kernel and width of column blocks, for the tables that may have it."""

    sharding_type: AnyShardingType
    kernel: Kernel
    width: int | None
    tables: list[int]


def row_parts(sharding_type: AnyShardingType, topology: Topology) -> int:
    """The number of row blocks that `sharding_type` cuts a table (or a column block of it) into."""
    return row_blocks(sharding_type, topology.ranks, topology.ranks_per_host)


def row_blocks(sharding_type: AnyShardingType, ranks: Counts, ranks_per_host: Counts) -> Counts:
    """row_parts() of one number of ranks, or of an array of them."""
    if sharding_type == "row_wise":
        return ranks
    return ranks_per_host if SCOPES[sharding_type] is Scope.HOST else ranks // ranks


def hottest_part(table: TableConfig, parts: int) -> int:
    """The index of the row block with the most read row: an arbitrary full block, the same for equal tables."""
    return crc32(table.name.encode()) % (table.rows // -(-table.rows // parts))


def search_space(inventory: InventoryConfig, topology: Topology) -> Options:
    """Every allowed option on the ranks of a group. Raises PlanError for a table whose constraints leave none."""
    tables, (own, group) = inventory.tables, one_group(inventory, topology)
    cuts = list(_cuts(own, group))
    if missing := _without_cut(cuts, tables):
        raise PlanError(_no_option(own, tables[missing[0]], group))
    sharded = replicated = (traffic(own, group), group)
    if inventory.groups > 1:  # the gradients of a replicated table are those of all ranks
        replicated = (traffic(inventory, topology), topology)
    columns = [
        _columns(cut, *(replicated if cut.sharding_type == "data_parallel" else sharded), own, group.ranks)
        for cut in cuts
    ]
    merged = {name: np.concatenate([part[name] for part in columns]) for name in columns[0]}
    order = np.argsort(merged["table_O"], kind="stable")
    return Options(
        **{name: values[order] for name, values in merged.items()},
        group_seconds_S=np.array([_group_seconds(name, group) for name in SHARDING_TYPES]),
        allowed_TR=_allowed(tables, group.ranks),
    )


def without_option(inventory: InventoryConfig, topology: Topology) -> list[int]:
    """The tables whose constraints leave no option."""
    return _without_cut(list(_cuts(*one_group(inventory, topology))), inventory.tables)


def _without_cut(cuts: list[_Cut], tables: tuple[TableConfig, ...]) -> list[int]:
    covered = {table for cut in cuts for table in cut.tables}
    return [table for table in range(len(tables)) if table not in covered]


def _group_seconds(sharding_type: AnyShardingType, topology: Topology) -> float:
    return 0.0 if sharding_type == "data_parallel" else CollectiveCosts(topology).group_seconds()


def _cuts(inventory: InventoryConfig, topology: Topology) -> Iterator[_Cut]:
    members: dict[tuple[AnyShardingType, Kernel, int | None], list[int]] = {}
    for index, table in enumerate(inventory.tables):
        for sharding_type in allowed_types(table):
            if not _may_span(table, sharding_type, topology) or _leaves_empty(table, sharding_type, topology):
                continue
            for width in column_widths(table, sharding_type, topology):
                if inventory.comm_dtype.fault(table.kind, sharding_type, width or table.dim):
                    continue
                blocks = len(column_blocks(table.dim, width))
                shards = 1 if sharding_type == "data_parallel" else blocks * row_parts(sharding_type, topology)
                if not table.min_shards <= shards <= (table.max_shards or shards):
                    continue
                kernels: tuple[Kernel, ...] = ("dense",) if sharding_type == "data_parallel" else table.kernels
                for kernel in kernels:
                    members.setdefault((sharding_type, kernel, width), []).append(index)
    for (sharding_type, kernel, width), indices in members.items():
        yield _Cut(sharding_type, kernel, width, indices)


def _in_hbm(table: TableConfig) -> bool:
    """True where a table may be replicated: a replica is wholly in the memory of its rank, its states too."""
    return bool({"fused", "dense"} & set(table.kernels)) and table.has_plain_states


def allowed_types(table: TableConfig) -> tuple[AnyShardingType, ...]:
    """The sharding types that the solver may use: the valid ones, within the table's constraint."""
    valid = table.valid_sharding_types()
    if not _in_hbm(table):
        valid = tuple(name for name in valid if name != "data_parallel")
    if table.sharding_types is not None:
        return tuple(name for name in valid if name in table.sharding_types)
    # table_column_wise is column_wise with less freedom, at the same cost.
    return tuple(name for name in valid if name != "table_column_wise")


def _may_span(table: TableConfig, sharding_type: AnyShardingType, topology: Topology) -> bool:
    if table.ranks is None:
        return True
    return _most_blocks(table, sharding_type, topology) > 0


def _most_blocks(table: TableConfig, sharding_type: AnyShardingType, topology: Topology) -> int:
    """The most column blocks that fit the ranks a table may be on; 0 where it cannot be on them at all."""
    if table.ranks is None:
        return most_blocks(sharding_type, topology.ranks, topology.ranks_per_host)
    allowed = set(table.ranks)
    on_host = np.bincount([rank // topology.ranks_per_host for rank in allowed], minlength=topology.hosts)
    match SCOPES[sharding_type]:
        case Scope.ALL:
            return int(len(allowed) == topology.ranks)
        case Scope.HOST:
            return int((on_host == topology.ranks_per_host).sum())
        case Scope.HOST_RANKS:
            return int(on_host.max())
        case _:
            return len(allowed)


def most_blocks(sharding_type: AnyShardingType, ranks: Counts, ranks_per_host: Counts) -> Counts:
    """The most column blocks that fit: a rank holds one shard of a table."""
    one = ranks // ranks  # of the shape of ranks
    if sharding_type not in COLUMN_TYPES:
        return one
    most = {Scope.HOST: ranks // ranks_per_host, Scope.HOST_RANKS: ranks_per_host, Scope.RANK: ranks}
    return most.get(SCOPES[sharding_type], one)


def _leaves_empty(table: TableConfig, sharding_type: AnyShardingType, topology: Topology) -> bool:
    """True where a row shard would have no rows, which fbgemm's fused CPU kernels of pooled tables do not support."""
    if topology.device != "cpu" or "fused" not in table.kernels:
        return False
    parts = row_parts(sharding_type, topology)
    return parts > 1 and -(-table.rows // -(-table.rows // parts)) < parts


def column_widths(table: TableConfig, sharding_type: AnyShardingType, topology: Topology) -> list[int | None]:
    """Widths of column blocks worth trying; None for types that do not cut columns."""
    if sharding_type not in COLUMN_TYPES:
        return [None]
    most = _most_blocks(table, sharding_type, topology)
    forced = table.sharding_types is not None and set(table.sharding_types) <= COLUMN_TYPES
    narrowest = ROW_MULTIPLE if forced else MIN_COLUMNS
    if table.kind == "sequence":
        # One EmbeddingCollection sends column blocks of one width only, so a single width is offered.
        counts = range(max(2, table.min_shards), min(most, table.dim // narrowest) + 1)
        even: list[int | None] = [table.dim // n for n in counts if table.dim % (n * ROW_MULTIPLE) == 0]
        return even[:1] or ([table.dim] if forced else [])
    step = max(ROW_MULTIPLE, table.dim // WIDTHS // ROW_MULTIPLE * ROW_MULTIPLE)
    tried = {*range(narrowest, table.dim, step), *(table.dim // n for n in range(2, 9) if table.dim % n == 0)}
    widths: list[int | None] = [
        width
        for width in sorted(tried)
        if width % ROW_MULTIPLE == 0
        and width >= narrowest
        and -(-table.dim // width) <= most
        # A grid has no narrower last block: its one odd shard is the one with the most read row.
        and (sharding_type != "grid_shard" or table.dim % width == 0)
    ]
    # A single block is table_wise in all but name, and needs no collectives of its own among tables that are cut.
    if sharding_type == "column_wise" and not (forced and widths):
        widths.append(table.dim)
    return widths


def _columns(
    cut: _Cut, traffic_T: Traffic, topology: Topology, inventory: InventoryConfig, ranks: int
) -> dict[str, np.ndarray]:
    """The arrays of Options for one cut: an option for each of its tables. ranks: of a group."""
    index, count = np.array(cut.tables), len(cut.tables)
    t, parts, scope = traffic_T[index], row_parts(cut.sharding_type, topology), SCOPES[cut.sharding_type]
    width = t.dim if cut.width is None else np.full(count, cut.width)
    blocks, left = np.divmod(t.dim, width)
    last = np.where(left > 0, left, width)
    blocks = blocks + (left > 0)
    hottest = t.hottest if parts > 1 else np.zeros(count)
    rows = np.ceil(t.rows / parts) / t.rows

    def cost(columns: np.ndarray, row_share: np.ndarray, id_share: np.ndarray) -> ShardCosts:
        shares = (columns, row_share, id_share)
        return shard_costs(t, topology, inventory.comm_dtype, cut.sharding_type, cut.kernel, shares)

    # The odd shard is the one with the most read row or, among column blocks, the last.
    odd = cost(last, rows, rows * (1 - hottest) + hottest)
    even = cost(width, rows, rows * (1 - hottest))
    odd_shard = np.array([hottest_part(inventory.tables[i], parts) for i in cut.tables]) if parts > 1 else blocks - 1
    none, whole = np.zeros(count), np.ones(count)
    fixed, all_ = cost(width, none, none), cost(width, whole, whole)
    fixed_last, all_last = cost(last, none, none), cost(last, whole, whole)

    def total(name: str) -> np.ndarray:
        if cut.sharding_type == "data_parallel":
            return getattr(all_, name) * ranks
        column = (parts - 1) * getattr(fixed, name) + getattr(all_, name)
        column_last = (parts - 1) * getattr(fixed_last, name) + getattr(all_last, name)
        return (blocks - 1) * column + column_last

    values = {
        "table_O": index,
        "sharding_type_O": SHARDING_TYPES.index(cut.sharding_type),
        "kernel_O": KERNELS.index(cut.kernel),
        "column_width_O": cut.width or 0,
        "shards_O": ranks if scope is Scope.ALL else blocks * parts,
        "scope_O": int(scope),
        "seconds_O": even.seconds,
        "hbm_O": even.hbm,
        "host_O": even.host,
        "total_seconds_O": total("seconds"),
        "total_hbm_O": total("hbm"),
        "extra_seconds_O": odd.seconds - even.seconds,
        "extra_hbm_O": odd.hbm - even.hbm,
        "extra_shard_O": odd_shard,
    }
    return {name: np.broadcast_to(value, (count,)) for name, value in values.items()}


def _allowed(tables: tuple[TableConfig, ...], ranks: int) -> np.ndarray | None:
    if all(table.ranks is None for table in tables):
        return None
    allowed = np.ones((len(tables), ranks), dtype=bool)
    for row, table in zip(allowed, tables, strict=True):
        if table.ranks is not None:
            row[:] = False
            row[[rank for rank in table.ranks if rank < ranks]] = True
    return allowed


def _no_option(inventory: InventoryConfig, table: TableConfig, topology: Topology) -> str:
    limits = {
        "sharding_types": table.sharding_types,
        "ranks": table.ranks,
        "min_shards": table.min_shards if table.min_shards > 1 else None,
        "max_shards": table.max_shards,
    }
    constraints = ", ".join(f"{name}={value}" for name, value in limits.items() if value is not None)
    if empty := [name for name in allowed_types(table) if _leaves_empty(table, name, topology)]:
        parts = row_parts(empty[0], topology)
        height = -(-table.rows // parts)
        without = parts - -(-table.rows // height)
        return (
            f"table {table.name}: {empty[0]} cuts {table.rows} rows into blocks of {height}, which leaves {without} of "
            f"{parts} ranks without a row, and fbgemm's CPU kernels need one; use fewer ranks, or let this "
            f"table have another sharding type (planner.tables.{table.name}=auto, or sharding_types in an inventory)"
        )
    ways = [(name, width) for name in allowed_types(table) for width in column_widths(table, name, topology)]
    faults = [inventory.comm_dtype.fault(table.kind, name, width or table.dim) for name, width in ways]
    if faults and all(faults):
        return f"table {table.name}: {faults[0]}"
    return (
        f"table {table.name}: no way to shard {table.rows} x {table.dim} ({table.kind}) over {topology.ranks} ranks "
        f"of {topology.ranks_per_host} a host satisfies {constraints}; relax one of them"
    )
