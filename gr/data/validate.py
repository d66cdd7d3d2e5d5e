"""Checks of rows, vectorised over Arrow columns as offsets and values. B rows, T events."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from gr.data.columns import PER_SECOND, Column, ColumnType, problem, read_column
from gr.errors import DataError
from gr.schema import DataSchema

# The year 10000: beyond it, times are in another unit than schema.json says.
LAST_SECOND = 253_402_300_800
_SMALLER_UNIT = {"s": "ms", "ms": "us"}


@dataclass(frozen=True)
class Fault:
    """One kind of fault in one column. rows: bool [B]; row: the first of them; problem: a description of that one."""

    column: str
    kind: str
    rows: np.ndarray
    row: int
    problem: str


def expected_types(schema: DataSchema) -> dict[str, ColumnType]:
    """The columns that the schema asks for, and what each holds."""
    types = {"user_id": ColumnType("id"), "item_ids": ColumnType("id", True)}
    if schema.timestamps:
        types["timestamps"] = ColumnType("time", True, schema.time_unit)
    if schema.actions:
        types["actions"] = ColumnType("id", True)
    numbers = [*["ratings"] * schema.ratings, *schema.values]
    return (
        types
        | dict.fromkeys(numbers, ColumnType("number", True))
        | dict.fromkeys(schema.event_features, ColumnType("id", True))
        | dict.fromkeys(schema.contextual, ColumnType("id"))
        | dict.fromkeys(schema.contextual_numeric, ColumnType("number"))
    )


def check_rows(columns: Mapping[str, Column], schema: DataSchema) -> list[Fault]:
    """The faults of a row group, in no order; empty when all rows are good. columns: item_ids, and others."""
    items_B, types = np.diff(_offsets(columns["item_ids"])), expected_types(schema)
    bounds = {"item_ids": (1, schema.item_cardinality), "actions": (0, 1 << len(schema.actions))}
    bounds |= {name: (0, size) for name, size in {**schema.event_features, **schema.contextual}.items()}
    faults: list[Fault | None] = []
    for name, column in columns.items():
        faults += value_faults(name, column, types[name])
        if column.offsets is not None:
            faults.append(_check_counts(name, column, items_B))
        if name in bounds:
            faults.append(_check_ids(name, column, *bounds[name]))
        if name == "timestamps":
            faults += _check_times(column, schema.time_unit)
    return [fault for fault in faults if fault is not None]


def value_faults(name: str, column: Column, column_type: ColumnType, *, nulls: bool = True) -> list[Fault | None]:
    """The faults that any column may have: values that a cast lost, numbers that are not finite, and nulls."""
    faults = []
    if column.lost is not None:
        faults.append(event_fault(name, "loses its value", column, column.lost, problem(column, column_type)))
    if nulls:
        noun = "is null" if column.offsets is None else "the list is null"
        faults.append(row_fault(name, "is null", column.nulls, lambda row: noun))
        if column.offsets is not None and column.values.null_count:
            faults.append(event_fault(name, "has null elements", column, column.missing(), lambda event: "is null"))
    if column_type.kind == "number":
        values = column.filled
        infinite = ~np.isfinite(values)
        faults.append(
            event_fault(name, "is not finite", column, infinite, lambda i: f"is {values[i]}, not a finite number")
        )
    return faults


def require_columns(place: object, table: pa.Table, names: Iterable[str]) -> None:
    """Raises DataError where a table lacks one of these columns. place: its file, for the message."""
    for name in names:
        if name not in table.column_names:
            raise DataError(f"{place}: has no column {name}; it has {', '.join(table.column_names)}")


def checked_column(place: object, table: pa.Table, name: str, column_type: ColumnType, *, nulls: bool = True) -> Column:
    """A column that is there. Raises DataError for its type and its value_faults. place: of require_columns."""
    if not column_type.reads(kind := table.schema.field(name).type):
        raise DataError(f"{place}: column {name} has type {kind}, wanted {column_type}")
    column = read_column(table.column(name), column_type)
    for fault in value_faults(name, column, column_type, nulls=nulls):
        if fault is not None:
            raise DataError(f"{place}: row {fault.row}, column {name}: {fault.problem}")
    return column


def _offsets(column: Column) -> np.ndarray:
    assert column.offsets is not None, "a list column"
    return column.offsets


def _check_counts(name: str, column: Column, items_B: np.ndarray) -> Fault | None:
    counts_B = np.diff(_offsets(column))
    wrong_B = (counts_B != items_B) & ~column.nulls
    return row_fault(
        name, "has another length", wrong_B, lambda row: f"{counts_B[row]} values for {items_B[row]} items in item_ids"
    )


def _check_ids(name: str, column: Column, low: int, stop: int) -> Fault | None:
    nulls = low and column.values.null_count
    ids = column.values.fill_null(low).to_numpy(zero_copy_only=False) if nulls else column.filled
    if not len(ids) or low <= ids.min() <= ids.max() < stop:
        return None
    outside = (ids < low) | (ids >= stop)
    noun = "item id " if name == "item_ids" else ""
    return event_fault(
        name, "is out of range", column, outside, lambda i: f"is {noun}{ids[i]}, allowed are {low} to {stop - 1}"
    )


def _check_times(column: Column, unit: str) -> list[Fault | None]:
    offsets, missing = _offsets(column), column.values.is_null().to_numpy(zero_copy_only=False)
    times = column.filled
    back = np.zeros(len(times), dtype=bool)
    back[1:] = (times[1:] < times[:-1]) & ~missing[1:] & ~missing[:-1]
    back[offsets[:-1][np.diff(offsets) > 0]] = False  # the first event of a row
    late = times >= LAST_SECOND * PER_SECOND[unit]
    remedy = f"beyond the year 9999 in {unit}, the time_unit of schema.json: is it {_SMALLER_UNIT[unit]}?"
    return [
        event_fault(
            "timestamps",
            "goes back",
            column,
            back,
            lambda event: f"is {times[event]}, earlier than {times[event - 1]} before it",
        ),
        event_fault("timestamps", "is too late", column, late, lambda event: f"is {times[event]}, {remedy}"),
    ]


def row_fault(column: str, kind: str, rows: np.ndarray, describe: Callable[[int], str]) -> Fault | None:
    """The fault of the rows that are true in `rows`, bool [B]; None where there is none."""
    if not rows.any():
        return None
    row = int(rows.argmax())
    return Fault(column, kind, rows, row, describe(row))


def event_fault(
    name: str, kind: str, column: Column, events: np.ndarray, describe: Callable[[int], str]
) -> Fault | None:
    """The fault of the values that are true in `events`, bool [T]; of a column without lists, [B]."""
    if column.offsets is None:
        return row_fault(name, kind, events, describe)
    if not events.any():
        return None
    offsets = column.offsets
    rows = np.zeros(len(offsets) - 1, dtype=bool)
    rows[np.searchsorted(offsets, np.flatnonzero(events), side="right") - 1] = True
    first, row = int(events.argmax()), int(rows.argmax())
    return Fault(name, kind, rows, row, f"element {first - offsets[row]} {describe(first)}")
