"""Tables over the cards of a serving host, under a cap on the bytes of each card.

The rule is that of Glow's partitioner of sparse networks (pytorch/glow, lib/Partitioner; arXiv 2107.04140): the big
tables first, by size, each to the emptiest card; then the rest, by cost, each to the cheapest card with room. Moves and
swaps of two then lower the dearest card while one does. It knows no torch.

K cards. A unit is what stays together: one table, or all tables of a group, such as those of the user's side.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product

from gr.errors import ServingError
from gr.units import size

BIG = 0.25  # of a card's fair share of all bytes: a unit of that size is placed by size
COLUMNS = 4  # a table is cut between columns of which so many belong together


@dataclass(frozen=True)
class ServedTable:
    """Some columns of a table. bytes: as they are stored. cost: of one batch's lookups, in any one unit.

    row_bytes is fixed + per_column x columns, for rows whose scale is stored beside them. group: tables of one group
    stay on one card; None: alone. first: the first of the table's columns that this is, where it is not `whole`.
    """

    name: str
    rows: int
    columns: int
    fixed_bytes: float
    column_bytes: float
    cost: float
    group: str | None = None
    first: int = 0
    whole: bool = True

    @property
    def bytes(self) -> float:
        return self.rows * (self.fixed_bytes + self.column_bytes * self.columns)

    @property
    def shown(self) -> str:
        return self.name if self.whole else f"{self.name}[{self.first}:{self.first + self.columns}]"


@dataclass(frozen=True)
class Partition:
    """tables_K: of each card, in the order given. *_bound: what no partition's fullest and dearest card is below."""

    tables_K: tuple[tuple[ServedTable, ...], ...]
    bytes_bound: float
    cost_bound: float

    @property
    def bytes_K(self) -> tuple[float, ...]:
        return tuple(sum(table.bytes for table in tables) for tables in self.tables_K)

    @property
    def cost_K(self) -> tuple[float, ...]:
        return tuple(sum(table.cost for table in tables) for tables in self.tables_K)

    @property
    def cost_over_bound(self) -> float:
        """1.0 is the best that any partition of these tables can do."""
        return max(self.cost_K) / self.cost_bound if self.cost_bound else 1.0


@dataclass(frozen=True)
class _Unit:
    tables: tuple[ServedTable, ...]
    bytes: float
    cost: float


def partition(tables: Sequence[ServedTable], cards: int, cap_bytes: float) -> Partition:
    """A card for each table. Equal inputs give equal partitions.

    Raises ServingError that names the table or group that is larger than a card or finds no room, and by how much.
    """
    if cards < 1:
        raise ServingError(f"cards={cards}: tables need at least 1 card")
    units = _units(tables)
    for unit in units:
        if unit.bytes > cap_bytes:
            raise ServingError(
                f"{_named(unit)} needs {size(unit.bytes)}, {size(unit.bytes - cap_bytes)} more than the "
                f"{size(cap_bytes)} that a card has for tables: use a smaller dtype, or cut it by columns"
            )
    total = sum(unit.bytes for unit in units)
    if total > cards * cap_bytes:
        raise ServingError(
            f"the tables need {size(total)}, {size(total - cards * cap_bytes)} more than {cards} card"
            f"{'s' * (cards > 1)} of {size(cap_bytes)} for tables: use {-int(-total // cap_bytes)} or more, or a "
            "smaller dtype"
        )
    placed_K = _by_rule(units, cards, cap_bytes) or _by_size(units, cards, cap_bytes)
    _improve(placed_K, cap_bytes)
    order = {id(table): place for place, table in enumerate(tables)}
    return Partition(
        tuple(
            tuple(sorted((table for unit in placed for table in unit.tables), key=lambda table: order[id(table)]))
            for placed in placed_K
        ),
        max(total / cards, max((unit.bytes for unit in units), default=0.0)),
        max(sum(unit.cost for unit in units) / cards, max((unit.cost for unit in units), default=0.0)),
    )


def cut(tables: Sequence[ServedTable], cap_bytes: float) -> list[ServedTable]:
    """The tables, with those larger than a card cut into the fewest blocks of about equally many columns that fit.

    A block has all rows, so every card reads all ids, and a row's columns are joined again: results stay those of the
    whole table, bit for bit where rows have no scale of their own. Raises ServingError for a table whose narrowest
    block is larger than a card.
    """
    blocks: list[ServedTable] = []
    for table in tables:
        room = int((cap_bytes / table.rows - table.fixed_bytes) // (table.column_bytes * COLUMNS))
        units = -(-table.columns // COLUMNS)
        if room < 1:
            narrowest = replace(table, columns=min(COLUMNS, table.columns))
            raise ServingError(
                f"table {table.name} with {table.rows:,} rows: {narrowest.columns} of its columns alone need "
                f"{size(narrowest.bytes)}, {size(narrowest.bytes - cap_bytes)} more than a card has for tables"
            )
        count = -(-units // room)
        bounds = [min(table.columns, COLUMNS * (units * block // count)) for block in range(count)] + [table.columns]
        blocks += [
            replace(
                table,
                columns=last - first,
                first=table.first + first,
                whole=table.whole and count == 1,
                cost=table.cost * (last - first) / table.columns,
            )
            for first, last in pairwise(bounds)
        ]
    return blocks


def _units(tables: Sequence[ServedTable]) -> list[_Unit]:
    together: dict[tuple[str, object], list[ServedTable]] = {}
    for place, table in enumerate(tables):
        key = ("table", place) if table.group is None else ("group", table.group)
        together.setdefault(key, []).append(table)
    return [
        _Unit(tuple(unit), sum(table.bytes for table in unit), sum(table.cost for table in unit))
        for unit in together.values()
    ]


def _by_rule(units: list[_Unit], cards: int, cap_bytes: float) -> list[list[_Unit]] | None:
    """Big units by size to the emptiest card, the others by cost to the cheapest; None where one finds no room."""
    fair = sum(unit.bytes for unit in units) / cards
    big = [unit for unit in units if unit.bytes >= BIG * fair]
    rest = [unit for unit in units if unit.bytes < BIG * fair]
    placed_K: list[list[_Unit]] = [[] for _ in range(cards)]
    bytes_K, cost_K = [0.0] * cards, [0.0] * cards
    for unit, load_K in [
        *((unit, bytes_K) for unit in sorted(big, key=lambda unit: -unit.bytes)),
        *((unit, cost_K) for unit in sorted(rest, key=lambda unit: -unit.cost)),
    ]:
        roomy = [card for card in range(cards) if bytes_K[card] + unit.bytes <= cap_bytes]
        if not roomy:
            return None
        card = min(roomy, key=lambda card: load_K[card])
        placed_K[card].append(unit)
        bytes_K[card] += unit.bytes
        cost_K[card] += unit.cost
    return placed_K


def _by_size(units: list[_Unit], cards: int, cap_bytes: float) -> list[list[_Unit]]:
    """The largest first, each to the fullest card with room: it packs tightest. Raises ServingError."""
    placed_K: list[list[_Unit]] = [[] for _ in range(cards)]
    free_K = [cap_bytes] * cards
    for unit in sorted(units, key=lambda unit: -unit.bytes):
        roomy = [card for card in range(cards) if free_K[card] >= unit.bytes]
        if not roomy:
            raise ServingError(
                f"{_named(unit)} needs {size(unit.bytes)}, {size(unit.bytes - max(free_K))} more than the emptiest of "
                f"{cards} cards has left: use more cards, or a smaller dtype"
            )
        card = min(roomy, key=lambda card: free_K[card])
        placed_K[card].append(unit)
        free_K[card] -= unit.bytes
    return placed_K


def _improve(placed_K: list[list[_Unit]], cap_bytes: float) -> None:
    """Takes units from the dearest card, or swaps them for others', while its cost falls and no other gets as dear."""
    cost_K = [sum(unit.cost for unit in units) for units in placed_K]
    bytes_K = [sum(unit.bytes for unit in units) for units in placed_K]

    def best_exchange(dearest: int) -> tuple[float, int, _Unit, _Unit | None] | None:
        best: tuple[float, int, _Unit, _Unit | None] | None = None
        for card in range(len(placed_K)):
            if card == dearest:
                continue
            for out, back in product(placed_K[dearest], [None, *placed_K[card]]):
                cost, size = (out.cost, out.bytes) if back is None else (out.cost - back.cost, out.bytes - back.bytes)
                after = max(cost_K[dearest] - cost, cost_K[card] + cost)
                fits = bytes_K[card] + size <= cap_bytes and bytes_K[dearest] - size <= cap_bytes
                if fits and after < cost_K[dearest] * (1 - 1e-9) and (best is None or after < best[0]):
                    best = (after, card, out, back)
        return best

    while True:
        dearest = max(range(len(placed_K)), key=lambda card: cost_K[card])
        exchange = best_exchange(dearest)
        if exchange is None:
            return
        _, card, out, back = exchange
        for unit, source, target in [(out, dearest, card), *([] if back is None else [(back, card, dearest)])]:
            placed_K[source] = [each for each in placed_K[source] if each is not unit]
            placed_K[target].append(unit)
            for load_K, amount in ((cost_K, unit.cost), (bytes_K, unit.bytes)):
                load_K[source] -= amount
                load_K[target] += amount


def _named(unit: _Unit) -> str:
    group = unit.tables[0].group
    if group is None:
        return f"table {unit.tables[0].shown}"
    return f"the group {group} of {len(unit.tables)} tables ({unit.tables[0].shown}, ...)"
