"""Columns of a part as gr reads them, from the types that pandas, polars, Spark and DuckDB write.

B rows, T values over all rows. A value that a cast would change is lost: it is null in the result, and named. Two casts
round, as docs/data.md says: numbers to float32, and datetimes down to the unit of timestamps in schema.json.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import pyarrow as pa

Kind = Literal["id", "number", "label", "time"]
# Types of a part that need no cast. The first is the one to which others are cast.
_OWN: dict[Kind, tuple[pa.DataType, ...]] = {
    "id": (pa.int64(), pa.int32()),
    "number": (pa.float32(),),
    "label": (pa.float64(), pa.float32(), pa.int8()),  # cast before it is compared with 0 and 1: float32 would round
    "time": (pa.int64(),),
}
_NUMERIC = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal, pa.types.is_null)
_LISTS = (
    *(pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list),
    *(pa.types.is_list_view, pa.types.is_large_list_view),
)
PER_SECOND = {"s": 1, "ms": 1000, "us": 10**6, "ns": 10**9}
_INT64 = np.iinfo(np.int64)


@dataclass(frozen=True)
class ColumnType:
    """The contents of a column: a value a row, or a list of them. time_unit: of integers that are times."""

    kind: Kind
    is_list: bool = False
    time_unit: Literal["s", "ms"] = "s"

    def reads(self, stored: pa.DataType) -> bool:
        """Whether a part may have the column in this type; which values it may have is seen as they are read."""
        if is_list(stored) != self.is_list:
            return False
        value = stored.value_type if self.is_list else stored
        is_time = self.kind == "time" and (pa.types.is_timestamp(value) or pa.types.is_date(value))
        return is_time or any(is_numeric(value) for is_numeric in _NUMERIC)

    def __str__(self) -> str:
        noun = {"id": "integers", "number": "numbers", "label": "0 or 1", "time": "integers or datetimes"}[self.kind]
        return f"a list of {noun}" if self.is_list else noun


@dataclass(frozen=True)
class Column:
    """A column of a row group.

    rows: as they are in the file, [B]. offsets: int64 [B + 1] from 0 into the values of a list column, else None.
    stored: the values of all rows, [T], or [B] without lists. values: the same after the cast. lost: bool, those that
    the cast lost, None where it lost none.
    """

    rows: pa.Array
    offsets: np.ndarray | None
    stored: pa.Array
    values: pa.Array
    lost: np.ndarray | None

    @cached_property
    def nulls(self) -> np.ndarray:
        """The rows that are null, bool [B]."""
        return _is_null(self.rows)

    @cached_property
    def filled(self) -> np.ndarray:
        """The values, 0 where they are null."""
        return _filled(self.values)

    def missing(self) -> np.ndarray:
        """The values that were null in the file, bool."""
        nulls = _is_null(self.values)
        return nulls if self.lost is None else nulls & ~self.lost


def read_column(column: pa.ChunkedArray, column_type: ColumnType) -> Column:
    """The column in the types that gr computes with. column_type.reads(column.type) holds."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    if not column_type.is_list:
        return Column(array, None, array, *_cast(array, column_type))
    offsets, stored = flattened(array)
    return Column(array, offsets, stored, *_cast(stored, column_type))


def problem(column: Column, column_type: ColumnType) -> Callable[[int], str]:
    """Describes a lost value by its place."""
    limit = "beyond float32" if column_type.kind == "number" else "not a whole number within int64"
    return lambda place: f"is {column.stored[place].as_py()}, {limit}"


def _cast(values: pa.Array, column_type: ColumnType) -> tuple[pa.Array, np.ndarray | None]:
    if values.type in _OWN[column_type.kind]:
        return values, None
    target = _OWN[column_type.kind][0]
    if pa.types.is_null(values.type):
        return pa.nulls(len(values), target), None
    if pa.types.is_boolean(values.type):
        return values.cast(pa.int8()).cast(target), None
    if pa.types.is_timestamp(values.type) or pa.types.is_date(values.type):
        numbers, lost = _times(values, column_type.time_unit)
    elif target != pa.int64():
        # float16, decimals: numpy has no decimals, and not every release of Arrow fills nulls in float16.
        plain = values if pa.types.is_integer(values.type) else values.cast(pa.float64())
        numbers = _filled(plain)
        with np.errstate(over="ignore"):
            cast = numbers.astype(target.to_pandas_dtype())
        numbers, lost = cast, np.isfinite(numbers) & ~np.isfinite(cast)
    elif pa.types.is_decimal(values.type):
        numbers, lost = _decimals(values)
    else:
        numbers = _filled(values.cast(pa.float64()) if pa.types.is_floating(values.type) else values)
        lost = _not_int64(numbers)
    kept = np.where(lost, 0, numbers).astype(target.to_pandas_dtype())
    return pa.array(kept, mask=_is_null(values) | lost), lost if lost.any() else None


def is_list(stored: pa.DataType) -> bool:
    return any(is_kind(stored) for is_kind in _LISTS)


def flattened(array: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Lists as offsets from 0, int64 [B + 1], and the values they point into."""
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        offsets = array.offsets.to_numpy().astype(np.int64)
        return offsets - offsets[0], array.values.slice(offsets[0], offsets[-1] - offsets[0])
    # Fixed-size lists, and views. Arrow 26 casts a large view of [[1, 2], [3]] to the list [[1, 2], []].
    lengths = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), array.flatten()


def _not_int64(numbers: np.ndarray) -> np.ndarray:
    if numbers.dtype.kind == "i":
        return np.zeros(len(numbers), dtype=bool)
    if numbers.dtype.kind == "u":
        return numbers > _INT64.max
    # Compared as float64, where the largest int64 is 2^63, which no int64 is.
    return ~((numbers >= _INT64.min) & (numbers < 2.0**63) & (numbers == np.floor(numbers)))


def _decimals(values: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    try:
        return _filled(values.cast(pa.int64())), np.zeros(len(values), dtype=bool)
    except pa.ArrowInvalid:  # it does not say where
        exact = [0 if value is None else value for value in values.to_pylist()]
        lost = np.array([value != int(value) or not _INT64.min <= value <= _INT64.max for value in exact])
        kept = [0 if bad else int(value) for value, bad in zip(exact, lost, strict=True)]
        return np.array(kept, dtype=np.int64), lost


def _times(values: pa.Array, time_unit: Literal["s", "ms"]) -> tuple[np.ndarray, np.ndarray]:
    """Whole units since 1970 in UTC, of datetimes; those without a time zone are in UTC."""
    if pa.types.is_date(values.type):
        values = values.cast(pa.timestamp("s" if pa.types.is_date32(values.type) else "ms"))
    ticks, kept = PER_SECOND[values.type.unit], PER_SECOND[time_unit]
    stored = _filled(values.cast(pa.int64()))
    if ticks >= kept:
        return stored // (ticks // kept), np.zeros(len(stored), dtype=bool)
    factor = kept // ticks
    lost = (stored > _INT64.max // factor) | (stored < _INT64.min // factor)
    return np.where(lost, 0, stored) * factor, lost


def _filled(values: pa.Array) -> np.ndarray:
    return (values.fill_null(0) if values.null_count else values).to_numpy(zero_copy_only=False)


def _is_null(array: pa.Array) -> np.ndarray:
    return array.is_null().to_numpy(zero_copy_only=False)
