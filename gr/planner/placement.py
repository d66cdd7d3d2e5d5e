"""A sharding plan: the rank of every shard of every table, for one inventory on one topology."""

from collections.abc import Iterator
from dataclasses import dataclass

from gr.config.inventory import AnyShardingType, InventoryConfig, Kernel, TableConfig
from gr.planner.topology import Topology


@dataclass(frozen=True)
class Placement:
    """The cut of one table and the ranks of its shards.

    ranks: one rank a shard, in the order of `shards`; every rank, in order, for row_wise and data_parallel. Where the
    inventory has groups, they are the ranks of the first: the others are alike.
    column_width: columns of a block under column_wise, table_column_wise and grid_shard; the last may be narrower.
    """

    table: str
    sharding_type: AnyShardingType
    kernel: Kernel
    ranks: tuple[int, ...]
    column_width: int | None = None

    @property
    def shown_type(self) -> AnyShardingType:
        """The sharding type for readers: a table in one shard is table_wise, whichever group it is sent with."""
        whole = len(self.ranks) == 1 and self.sharding_type != "data_parallel"
        return "table_wise" if whole else self.sharding_type


@dataclass(frozen=True)
class Shard:
    """A rectangle of a table on a rank; a data_parallel table has a whole copy on every rank."""

    rank: int
    row: int
    column: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Plan:
    """One placement for every table of the inventory, in its order. bound_seconds: no plan has a lower cost."""

    inventory: InventoryConfig
    topology: Topology
    placements: tuple[Placement, ...]
    bound_seconds: float


def column_blocks(dim: int, width: int | None) -> list[int]:
    """Widths of the column blocks of a table of `dim` columns: `width` each, then the remainder."""
    if width is None:
        return [dim]
    whole, left = divmod(dim, width)
    return [width] * whole + ([left] if left else [])


def shards(table: TableConfig, placement: Placement) -> Iterator[Shard]:
    """The rectangles of `table` in TorchRec's order: column blocks, and in each its row blocks of ceil(E / n) rows."""
    if placement.sharding_type == "data_parallel":
        yield from (Shard(rank, 0, 0, table.rows, table.dim) for rank in placement.ranks)
        return
    blocks = column_blocks(table.dim, placement.column_width)
    row_blocks = len(placement.ranks) // len(blocks)
    height = -(-table.rows // row_blocks)
    ranks = iter(placement.ranks)
    column = 0
    for width in blocks:
        for part in range(row_blocks):
            row = min(part * height, table.rows)
            yield Shard(next(ranks), row, column, min(height, table.rows - row), width)
        column += width
