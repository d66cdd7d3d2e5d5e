"""The contents of a data folder, and every fault that reading it would meet: one pass over its row groups.

B rows of a row group, T events of them, E items. Memory: a row group, 16 bytes for each item of a folder of histories,
one byte for each row of the tables of a tabular folder, and the user ids of `_USERS_AT_ONCE` users.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gr.data.dataset import Dataset, Histories
from gr.data.parquet import RowGroup
from gr.data.tabular import TabularDataset
from gr.data.validate import LAST_SECOND, Fault
from gr.data.vocabulary import Vocabulary
from gr.errors import DataError
from gr.files import parse_json
from gr.schema import LARGEST_DENSE, SCHEMA_FILE, UNCOUNTED_EVENTS, SparseColumn

SHORT = 3  # events from which a user has a test target, a validation target and an event before them
_USERS_AT_ONCE = 1 << 24
_DAY = 86400


@dataclass
class Faults:
    """Faults by column and kind: how many rows (of items.parquet: items) have them, and the first."""

    by_kind: dict[tuple[str, str], tuple[int, str]] = field(default_factory=dict)

    def add(self, column: str, kind: str, rows: int, first: str) -> None:
        """first: its place and what is wrong there; of two, the earlier call's stays."""
        before, place = self.by_kind.get((column, kind), (0, first))
        self.by_kind[column, kind] = before + rows, place

    def add_rows(self, group: RowGroup, faults: list[Fault]) -> None:
        for fault in faults:
            place = f"{group.file.name}, row group {group.index}, row {fault.row}"
            self.add(fault.column, fault.kind, int(fault.rows.sum()), f"{place}: {fault.problem}")

    @property
    def lines(self) -> list[str]:
        """One for each kind, the most frequent first."""
        ordered = sorted(self.by_kind.items(), key=lambda item: -item[1][0])
        return [f"{rows:,} x {column} {kind}; first: {first}" for (column, kind), (rows, first) in ordered]


@dataclass
class Check:
    """The contents of a folder. facts: (name, text), to be shown in this order.

    For pictures, None where there is none: lengths_N counts users by their number of events, events_E events by item,
    days events by day since 1970.
    """

    title: str
    facts: list[tuple[str, str]]
    faults: Faults
    lengths_N: np.ndarray | None = None
    events_E: np.ndarray | None = None
    days: dict[int, int] | None = None


def check_folder(folder: Path | str) -> Check:
    """Reads all of a folder. Raises DataError where it cannot be opened."""
    if is_tabular(Path(folder)):
        return _check_tabular(TabularDataset.of_any_size(folder))
    return _check_histories(Dataset.of_any_size(folder))


def is_tabular(folder: Path) -> bool:
    """Whether its schema.json describes a tabular folder; False where that cannot be read."""
    try:
        fields = parse_json((folder / SCHEMA_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # DataSchema.load will say what is wrong with it
    return isinstance(fields, dict) and fields.get("kind") == "tabular"


class _Histories:
    """Sums over the row groups of a folder of histories. users: ids of the rows that have one, of each row group."""

    def __init__(self, cardinality: int) -> None:
        self.users: list[np.ndarray] = []
        self.lengths_N = np.zeros(1, dtype=np.int64)
        self.events_E, self.counted_E = (np.zeros(cardinality, dtype=np.int64) for _ in range(2))
        self.days: dict[int, int] = {}
        self.first, self.last = LAST_SECOND, -LAST_SECOND
        self.repeats = self.ties = 0

    def add(self, group: Histories) -> None:
        lengths_B, items_T = group.lengths_B, group.columns["item_ids"]
        lengths_N = np.bincount(lengths_B, minlength=len(self.lengths_N))
        lengths_N[: len(self.lengths_N)] += self.lengths_N
        self.lengths_N = lengths_N
        self.events_E += np.bincount(items_T, minlength=len(self.events_E))
        from_end_T = np.repeat(group.offsets[1:], lengths_B) - np.arange(len(items_T))
        self.counted_E += np.bincount(items_T[from_end_T > UNCOUNTED_EVENTS], minlength=len(self.events_E))
        follows_T = np.ones(len(items_T), dtype=bool)
        follows_T[group.offsets[:-1][lengths_B > 0]] = False
        self.repeats += _equal_to_before(items_T, follows_T)
        if (times_T := group.columns.get("timestamps")) is not None and len(times_T):
            self.ties += _equal_to_before(times_T, follows_T)
            self.first, self.last = min(self.first, int(times_T.min())), max(self.last, int(times_T.max()))
            for day, count in zip(*np.unique(times_T // _DAY, return_counts=True), strict=True):
                self.days[int(day)] = self.days.get(int(day), 0) + int(count)


def _equal_to_before(values_T: np.ndarray, follows_T: np.ndarray) -> int:
    """Values equal to the one before them, of those that follow one of the same user."""
    return int(((values_T[1:] == values_T[:-1]) & follows_T[1:]).sum())


def _wrong_totals(data: Dataset | TabularDataset) -> Faults:
    faults = Faults()
    for problem in data.wrong_totals():
        faults.add("schema.json", "does not fit the parts", 1, problem)
    return faults


def _check_histories(data: Dataset) -> Check:
    if data.schema.item_cardinality > LARGEST_DENSE:
        raise DataError(
            f"{data.path}: has raw item ids, by which events are not counted; a run checks the rows as it reads them"
        )
    faults = _wrong_totals(data)
    _check_vocabularies(data, faults)
    schema, sums = data.schema, _Histories(data.schema.item_cardinality)
    names, shares = [*schema.event_columns[1:], *schema.user_columns], -(-sum(data.row_counts) // _USERS_AT_ONCE)
    for index, group in _groups(data.row_groups):
        try:
            histories, wrong = data.checked_row_group(index, ["user_id", *names])
        except DataError as error:
            faults.add("row", "cannot be read", group.rows, str(error))
            continue
        faults.add_rows(group, wrong)
        sums.add(histories)
        sums.users.append(_share(histories, wrong, 0, shares))
    events = int(sums.events_E.sum())
    if not faults.by_kind and events != schema.events:
        problem = f"events={schema.events}, the parts hold {events}"
        faults.add("schema.json", "does not fit the parts", 1, problem)
    for share in range(shares):
        _check_users(sums.users if share == 0 else _users(data, share, shares), faults)
    never, users = _check_corpus(data, sums, faults), sum(data.row_counts)
    short = _of(int(sums.lengths_N[:SHORT].sum()), users)
    return Check(
        f"{data.path}: user histories, {schema.name}",
        [
            ("size", f"{users:,} users, {events:,} events, {schema.items:,} items"),
            ("time", _time_span(sums) if schema.timestamps else "no timestamps"),
            ("lengths", _lengths(sums.lengths_N)),
            ("short", f"{short} of the users have fewer than {SHORT} events"),
            ("items", f"{_skew(sums.events_E)}; {never:,} of {schema.items:,} never seen"),
            ("repeats", f"{_of(sums.repeats, events)} of the events have the item of the event before"),
            *(
                [("ties", f"{_of(sums.ties, events)} of the events have the time of the event before")]
                * schema.timestamps
            ),
            *([("further", ", ".join(extra))] if (extra := [name for name in names if name != "timestamps"]) else []),
        ],
        faults,
        sums.lengths_N,
        sums.events_E,
        sums.days if schema.timestamps else None,
    )


def _groups(row_groups: list[RowGroup]) -> Iterator[tuple[int, RowGroup]]:
    """The number of each row group among all, and the row group."""
    yield from enumerate(tqdm(row_groups, desc="check", unit="row group", disable=None))


def _share(histories: Histories, faults: list[Fault], share: int, shares: int) -> np.ndarray:
    """User ids of a share of all ids, of the rows that have one."""
    known_B = np.ones(len(histories.lengths_B), dtype=bool)
    for fault in faults:
        if fault.column == "user_id":
            known_B[fault.rows] = False
    ids_B = histories.columns["user_id"][known_B]
    return ids_B[ids_B % shares == share]


def _users(data: Dataset, share: int, shares: int) -> list[np.ndarray]:
    """A share of the user ids of row groups that can be read: those that cannot are counted by the first pass."""
    ids = []
    for index, _ in _groups(data.row_groups):
        with suppress(DataError):
            ids.append(_share(*data.checked_row_group(index, ["user_id"]), share, shares))
    return ids


def _check_users(ids: list[np.ndarray], faults: Faults) -> None:
    users, rows = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *ids]), return_counts=True)
    if (several := rows > 1).any():
        first = int(several.argmax())
        shown = f"user {users[first]} has {rows[first]} rows"
        faults.add("user_id", "is in several rows", int(rows[several].sum()), shown)


def _check_corpus(data: Dataset, sums: _Histories, faults: Faults) -> int:
    """Compares items.parquet with the events. Returns how many of its items no event has.

    Counts are compared where all rows are good: the events of a bad row are not known.
    """
    try:
        ids, counts = data.corpus()
    except DataError as error:
        faults.add("items.parquet", "cannot be used", 1, str(error))
        return 0
    strangers = sums.events_E.copy()
    strangers[ids] = 0
    if (outside := np.flatnonzero(strangers)).size:
        first = f"item {outside[0]} has {strangers[outside[0]]:,} events"
        faults.add("items.parquet", "lacks items of the parts", len(outside), first)
    wrong = counts != sums.counted_E[ids]
    if wrong.any() and not faults.by_kind:
        row = int(wrong.argmax())
        shown = f"item {ids[row]} has count={counts[row]}, the parts have {sums.counted_E[ids[row]]}"
        note = f" without each user's newest {UNCOUNTED_EVENTS}"
        faults.add("items.parquet", "counts other events", int(wrong.sum()), shown + note)
    return int((sums.events_E[ids] == 0).sum())


def _check_tabular(data: TabularDataset) -> Check:
    schema, faults = data.schema, _wrong_totals(data)
    _check_vocabularies(data, faults)
    dense = {name: _Dense() for name in schema.dense}
    sparse = {column.name: _Sparse(column) for column in schema.sparse}
    clicks = rows = 0
    for index, group in _groups(data.row_groups):
        try:
            columns = data.read_columns(index)
        except DataError as error:
            faults.add("row", "cannot be read", group.rows, str(error))
            continue
        faults.add_rows(group, data.faults(columns))
        rows += group.rows
        clicks += int((columns[schema.labels[0]].filled == 1).sum())
        for name, numbers in dense.items():
            numbers.add(columns[name].filled, columns[name].nulls)
        for name, ids in sparse.items():
            ids.add(columns[name].filled, int(columns[name].nulls.sum()))
    return Check(
        f"{data.path}: tabular, {schema.name}",
        [
            ("size", f"{sum(data.row_counts):,} rows, {len(dense)} dense and {len(sparse)} sparse columns"),
            ("label", f"{schema.labels[0]} is 1 in {_of(clicks, rows)} of the rows"),
            *((name, numbers.text(rows)) for name, numbers in dense.items()),
            *((name, ids.text(rows)) for name, ids in sparse.items()),
        ],
        faults,
    )


def _check_vocabularies(data: Dataset | TabularDataset, faults: Faults) -> None:
    for name in data.schema.vocabularies:
        try:
            Vocabulary.open(data.path, data.schema, name)
        except DataError as error:
            faults.add(f"vocabulary of {name}", "cannot be used", 1, str(error))


class _Dense:
    def __init__(self) -> None:
        self.low, self.high, self.sum, self.nulls = np.inf, -np.inf, 0.0, 0

    def add(self, values_B: np.ndarray, nulls_B: np.ndarray) -> None:
        there = values_B[~nulls_B & np.isfinite(values_B)]
        self.nulls += int(nulls_B.sum())
        self.low, self.high = min(self.low, there.min(initial=np.inf)), max(self.high, there.max(initial=-np.inf))
        self.sum += float(there.sum(dtype=np.float64))

    def text(self, rows: int) -> str:
        if self.nulls == rows:
            return "null in all rows"
        mean = self.sum / (rows - self.nulls)
        return f"{self.low:.4g} to {self.high:.4g}, mean {mean:.4g}, null in {_percent(self.nulls, rows)}"


class _Sparse:
    def __init__(self, column: SparseColumn) -> None:
        self.column, self.raw = column, column.cardinality > LARGEST_DENSE
        self.seen = np.zeros(0 if self.raw else column.cardinality, dtype=bool)
        self.zeros = self.nulls = 0

    def add(self, ids: np.ndarray, nulls: int) -> None:
        if not self.raw:
            self.seen[ids[(ids >= 0) & (ids < self.column.cardinality)]] = True
        self.nulls += nulls
        self.zeros += int((ids == 0).sum()) - nulls * (self.column.hots == 1)

    def text(self, rows: int) -> str:
        ids = rows * self.column.hots
        used = "raw ids" if self.raw else f"{self.seen.sum():,} of {self.column.cardinality:,} ids"
        return f"{used}, id 0 in {_percent(self.zeros, ids)}, null in {_percent(self.nulls, rows)}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.1f} %"


def _of(part: int, whole: int) -> str:
    return f"{part:,} ({_percent(part, whole)})"


def _time_span(sums: _Histories) -> str:
    if sums.first > sums.last:
        return "no events"
    return " to ".join(_date(seconds) for seconds in (sums.first, sums.last)) + " UTC"


def _date(seconds: int) -> str:
    earliest = -62_135_596_800  # the year 1: datetime knows none before it
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d}" if seconds >= earliest else f"{seconds} s"


def _lengths(lengths_N: np.ndarray) -> str:
    users, length_N = np.cumsum(lengths_N), np.arange(len(lengths_N))
    median, p99 = (int(np.searchsorted(users, share * users[-1])) for share in (0.5, 0.99))
    there = np.flatnonzero(lengths_N)
    if not len(there):
        return "no users"
    mean = float((length_N * lengths_N).sum() / users[-1])
    return f"min {there[0]:,}, median {median:,}, mean {mean:,.1f}, p99 {p99:,}, max {there[-1]:,} events a user"


def _skew(events_E: np.ndarray) -> str:
    """The share of the most frequent 1 % of the items that are seen, and Gini's coefficient of those."""
    seen = np.sort(events_E[events_E > 0])
    if not len(seen):
        return "no events"
    top = int(seen[-max(1, len(seen) // 100) :].sum())
    place = np.arange(1, len(seen) + 1)
    gini = 2 * float((place * seen).sum()) / (len(seen) * float(seen.sum())) - (len(seen) + 1) / len(seen)
    return f"the top 1 % have {_percent(top, int(seen.sum()))} of events, Gini {gini:.2f}"
