"""Dataset: a folder of user histories, read row group by row group. Every row is checked as it is read.

B rows (users), T events of those rows, packed row after row, oldest first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gr.data.columns import Column, ColumnType, read_column
from gr.data.parquet import Parts, decoding, read_footer
from gr.data.validate import Fault, check_rows, checked_column, expected_types
from gr.data.vocabulary import check_vocabularies
from gr.errors import DataError
from gr.logging import get_logger, log_once
from gr.schema import ITEMS_FILE, LARGEST_DENSE, UNCOUNTED_EVENTS, USER_COLUMN, DataSchema

log = get_logger(__name__)


@dataclass(frozen=True)
class Histories:
    """The users of one row group.

    offsets: int64 [B + 1] into the packed columns. columns: packed arrays [T] by name (numbers float32, ids int32 or
    int64 as on disk; timestamps int64, in seconds whatever their unit there), and [B] for user_id and contextual
    columns.
    """

    offsets: np.ndarray
    columns: dict[str, np.ndarray]

    @property
    def lengths_B(self) -> np.ndarray:
        return np.diff(self.offsets)


class Dataset:
    """A data folder: schema, row groups known from footers, and rows read on demand. Safe to read from threads."""

    def __init__(self, path: Path, schema: DataSchema, parts: Parts) -> None:
        self.path, self.schema, self.rows = path, schema, schema.users
        self.row_groups, self.row_counts = parts.row_groups, parts.row_counts
        self._parts = parts
        self._bad_rows: dict[int, int] = {}

    @classmethod
    def open(cls, path: Path | str) -> "Dataset":
        """Reads schema.json and the footers of the parts.

        Raises DataError, naming file and column, for a missing folder, schema or part, a file that is not Parquet or
        was cut off, a missing column, a type that cannot be read, users without an id, or another number of rows or
        events than the schema says, as far as footers tell.
        """
        dataset = cls.of_any_size(path)
        for problem in chain(dataset.wrong_totals(), dataset._users_without_id()):
            raise DataError(problem)
        return dataset

    @classmethod
    def of_any_size(cls, path: Path | str) -> "Dataset":
        """Opens it as `open` does, but does not check the numbers of rows and events, and that users have ids."""
        path = Path(path)
        schema = DataSchema.load(path)
        return cls(path, schema, Parts.open(path, expected_types(schema)))

    def wrong_totals(self) -> Iterator[str]:
        """The contradictions of footers to schema.json: other numbers of rows or events.

        A footer counts the elements of lists, and one for each list that is empty or null.
        """
        yield from self._parts.wrong_rows(self.path, "users", self.schema.users)
        most = sum(chunk.num_values for _, chunk in self._parts.statistics("item_ids"))
        least = max(0, most - sum(self.row_counts))
        if not least <= self.schema.events <= most:
            yield f"{self.path}: the parts hold {least} to {most} events, schema.json says events={self.schema.events}"

    def _users_without_id(self) -> Iterator[str]:
        for group, chunk in self._parts.statistics("user_id"):
            if chunk.is_stats_set and chunk.statistics.has_null_count and (nulls := chunk.statistics.null_count):
                yield f"{group}: {nulls} rows have a null user_id: give each user an id"

    @property
    def bad_rows(self) -> int:
        """Distinct bad rows emptied so far by on_bad_row="skip"."""
        return sum(list(self._bad_rows.values()))  # reading threads may add to it meanwhile

    def read_row_group(
        self, index: int, columns: Sequence[str] | None = None, on_bad_row: Literal["fail", "skip"] = "fail"
    ) -> Histories:
        """Decodes and checks one row group.

        columns: names besides item_ids to read; None: timestamps, where the data has them. A bad row (null list, null
        element, a value that no cast keeps, item id outside [1, cardinality), other number of timestamps than items,
        time going back) raises DataError with file, row group, row, column and value; with on_bad_row="skip" it becomes
        an empty history and is counted.
        """
        histories, faults = self.checked_row_group(index, columns)
        if faults and on_bad_row == "fail":
            fault = min(faults, key=lambda fault: fault.row)
            raise DataError(
                f"{self.row_groups[index]}, row {fault.row}, column {fault.column}: {fault.problem}; correct the row, "
                "or set data.on_bad_row=skip to count such rows and train on none of them"
            )
        return histories

    def checked_row_group(self, index: int, columns: Sequence[str] | None = None) -> tuple[Histories, list[Fault]]:
        """One row group whose bad rows are empty histories, and what is wrong with them. columns: of read_row_group."""
        columns = ["timestamps"] * self.schema.timestamps if columns is None else columns
        names, types = list(dict.fromkeys(["item_ids", *columns])), expected_types(self.schema)
        if unknown := [name for name in names if name not in types]:
            raise DataError(f"{self.row_groups[index].file}: has no column {unknown[0]}; it has {', '.join(types)}")
        _, table = self._parts.read(index, names)
        read = {name: read_column(table.column(name), types[name]) for name in names}
        faults = check_rows(read, self.schema)
        return self._histories(index, read, faults), faults

    def user_ids(self) -> np.ndarray:
        """The user of every row, int64 [rows]."""
        groups = (self._parts.read(index, [USER_COLUMN]) for index in range(len(self.row_groups)))
        ids = [checked_column(group, table, USER_COLUMN, ColumnType("id")).filled for group, table in groups]
        return np.concatenate([np.empty(0, dtype=np.int64), *ids])

    def rows_of(self, user_ids_N: np.ndarray) -> np.ndarray:
        """Rows of these users, int64, in file order; those of users that are not here are left out."""
        return np.flatnonzero(np.isin(self.user_ids(), user_ids_N))

    def corpus(self) -> tuple[np.ndarray, np.ndarray]:
        """Candidate item ids and their counts, by read_corpus."""
        return read_corpus(self.path, self.schema)

    def _histories(self, index: int, read: dict[str, Column], faults: list[Fault]) -> Histories:
        columns: dict[str, np.ndarray] = {}
        bad = np.zeros(self.row_groups[index].rows, dtype=bool)
        for fault in faults:
            bad[fault.rows] = True
        for name, column in read.items():
            array = column.filled
            if column.offsets is not None and bad.any():
                array = array[np.repeat(~bad, np.diff(column.offsets))]
            columns[name] = array
        if "timestamps" in columns and self.schema.time_unit == "ms":
            columns["timestamps"] = columns["timestamps"] // 1000
        if faults:
            self._bad_rows[index] = int(bad.sum())
        offsets = read["item_ids"].offsets
        assert offsets is not None, "a list column"
        lengths = np.where(bad, 0, np.diff(offsets))
        return Histories(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), columns)


def check_alike(schema: DataSchema, folder: Path, other: DataSchema, path: Path, fields: Sequence[str]) -> None:
    """Raises DataError where a model of data of `schema` cannot read that of `other`. fields: of schema.json."""
    check_vocabularies(schema.input_vocabularies, folder, other.input_vocabularies, path)
    for name in fields:
        mine, others = getattr(schema, name), getattr(other, name)
        if mine != others:
            shown = f": {mine} and {others}" if isinstance(mine, int) else ""
            raise DataError(f"{folder} and {path} differ in {name}{shown} (schema.json): prepare both alike")


def read_corpus(folder: Path, schema: DataSchema) -> tuple[np.ndarray, np.ndarray]:
    """Candidate item ids, int64 ascending, and their counts, int64, from items.parquet.

    Raises DataError if the file is missing or damaged, or ids are not ascending, unique and in [1, cardinality).
    """
    file = folder / ITEMS_FILE
    if not file.exists():
        raise DataError(f"{file}: no such file; docs/data.md says how to write it")
    names = read_footer(file).schema.to_arrow_schema().names
    for column in ("item_id", "count"):
        if column not in names:
            raise DataError(f"{file}: has no column {column}; it has {', '.join(names)}")
    with decoding(file):
        table = pq.read_table(file, columns=["item_id", "count"], page_checksum_verification=True)
    ids, counts = (_corpus_column(file, table, name) for name in ("item_id", "count"))
    wrong = (ids < 1) | (ids >= schema.item_cardinality) | np.append(False, np.diff(ids) <= 0)
    if wrong.any() or len(ids) != schema.items:
        row = int(wrong.argmax()) if wrong.any() else len(ids)
        value = f"item_id={ids[row]}" if wrong.any() else "end of file"
        raise DataError(
            f"{file}: row {row}: {value}; wanted {schema.items} ascending ids, all below {schema.item_cardinality}"
        )
    if (counts < 0).any():
        row = int((counts < 0).argmax())
        raise DataError(f"{file}: row {row}: count={counts[row]}; an item occurs 0 times or more")
    least, total = max(0, schema.events - UNCOUNTED_EVENTS * schema.users), int(counts.sum())
    if not least <= total <= schema.events:
        log_once(
            log,
            f"{file}: counts add up to {total}, events without each user's newest two to {least} or somewhat more: "
            "popularity is wrong, see `gr data check`",
        )
    return ids, counts


def _corpus_column(file: Path, table: pa.Table, name: str) -> np.ndarray:
    """A column of items.parquet, int64. Raises DataError for values that are null or no integers."""
    return checked_column(file, table, name, ColumnType("id")).filled.astype(np.int64, copy=False)


def read_item_features(folder: Path, schema: DataSchema) -> dict[str, np.ndarray]:
    """The ids of each of schema.event_features by item, int32 or int64 [item_cardinality], from items.parquet.

    An item that is not in it has 0. Raises DataError where a feature is no column of it, or has ids that are null or
    outside [0, cardinality).
    """
    if not schema.event_features:
        return {}
    if schema.item_cardinality > LARGEST_DENSE:
        raise DataError(
            f"model.features: {folder} has raw item ids, by which no features are kept; leave model.features empty"
        )
    items_C, _ = read_corpus(folder, schema)
    file = folder / ITEMS_FILE
    names = read_footer(file).schema.to_arrow_schema().names
    if absent := [name for name in schema.event_features if name not in names]:
        raise DataError(
            f"model.features: {file} has no column {absent[0]}; it has {', '.join(names)}. Name features of items, as "
            "`gr prepare events --item-features` writes them"
        )
    with decoding(file):
        table = pq.read_table(file, columns=list(schema.event_features), page_checksum_verification=True)
        columns = {name: _corpus_column(file, table, name) for name in schema.event_features}
    features = {}
    for name, size in schema.event_features.items():
        if (wrong := (columns[name] < 0) | (columns[name] >= size)).any():
            row = int(wrong.argmax())
            raise DataError(f"{file}: row {row}, column {name}: is {columns[name][row]}, allowed are 0 to {size - 1}")
        dtype = np.int32 if size <= np.iinfo(np.int32).max else np.int64
        features[name] = np.zeros(schema.item_cardinality, dtype=dtype)
        features[name][items_C] = columns[name]
    return features
