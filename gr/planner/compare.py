"""The difference of two plans: the tables that move, their bytes, the change of step time."""

from collections.abc import Iterator
from dataclasses import dataclass

from gr.config.inventory import TableConfig
from gr.planner.estimate import estimate
from gr.planner.estimate_tables import table_bytes
from gr.planner.placement import Placement, Plan, Shard, shards
from gr.planner.planfile import differences


@dataclass(frozen=True)
class Change:
    """One table that is placed differently, has grown, or is only in one plan.

    moved_bytes: weights and states that change rank.
    """

    table: str
    before: Placement | None
    after: Placement | None
    moved_bytes: int


@dataclass(frozen=True)
class Comparison:
    """The difference of two plans. A new table moves no bytes: it is filled.

    others: ("model" or "topology", before, after) for each of the two that differs.
    """

    others: tuple[tuple[str, str, str], ...]
    changes: tuple[Change, ...]
    step_seconds: tuple[float, float]
    hbm_bytes: tuple[float, float]  # on the fullest rank

    @property
    def moved_bytes(self) -> int:
        return sum(change.moved_bytes for change in self.changes)

    @property
    def new(self) -> int:
        """Tables that only the later plan has."""
        return sum(change.before is None for change in self.changes)

    @property
    def gone(self) -> int:
        """Tables that only the earlier plan has."""
        return sum(change.after is None for change in self.changes)

    @property
    def moved(self) -> int:
        """Tables that both have, and that change place."""
        return len(self.changes) - self.new - self.gone


def compare(before: Plan, after: Plan) -> Comparison:
    """The changes from `before` to `after`; tables are matched by name."""
    left, right = estimate(before), estimate(after)
    return Comparison(
        others=tuple(differences(before, after.inventory, after.topology)),
        changes=tuple(_changes(before, after)),
        step_seconds=(left.step_seconds, right.step_seconds),
        hbm_bytes=(float(left.total_memory_R.max()), float(right.total_memory_R.max())),
    )


def _changes(before: Plan, after: Plan) -> Iterator[Change]:
    old = {placement.table: placement for placement in before.placements}
    new = {placement.table: placement for placement in after.placements}
    tables_old = {table.name: table for table in before.inventory.tables}
    tables_new = {table.name: table for table in after.inventory.tables}
    for name in {**old, **new}:
        was, now = old.get(name), new.get(name)
        if was is None or now is None:
            yield Change(name, was, now, 0)
        elif (bytes_ := _moved(tables_old[name], was, tables_new[name], now)) or was != now:
            yield Change(name, was, now, bytes_)


def _moved(old: TableConfig, was: Placement, new: TableConfig, now: Placement) -> int:
    """Bytes of the new shards that were not on their rank before."""
    held: dict[int, list[Shard]] = {}
    for shard in shards(old, was):
        held.setdefault(shard.rank, []).append(shard)
    moved = 0
    for shard in shards(new, now):
        cells = shard.rows * shard.columns
        unmoved = sum(_overlap(shard, other) for other in held.get(shard.rank, []))
        if cells > unmoved:
            moved += round(sum(table_bytes(new, shard)) * (cells - unmoved) / cells)
    return moved


def _overlap(a: Shard, b: Shard) -> int:
    rows = min(a.row + a.rows, b.row + b.rows) - max(a.row, b.row)
    columns = min(a.column + a.columns, b.column + b.columns) - max(a.column, b.column)
    return max(rows, 0) * max(columns, 0)
