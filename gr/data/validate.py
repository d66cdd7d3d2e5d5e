"""Checks of the rows of a row group, vectorised over Arrow columns as offsets and values. B rows, T events."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from gr.schema import DataSchema

Packed = tuple[np.ndarray, pa.Array, np.ndarray]  # offsets [B + 1], values [T], null rows [B]


@dataclass(frozen=True)
class Fault:
    """One kind of fault in one column. rows: bool [B]; row: the first of them; problem: a description of that one."""

    column: str
    rows: np.ndarray
    row: int
    problem: str


def expected_types(schema: DataSchema) -> dict[str, tuple[pa.DataType, ...]]:
    """The columns that the schema asks for, with the Arrow types each may have."""
    types: dict[str, tuple[pa.DataType, ...]] = {
        "user_id": (pa.int64(),),
        "item_ids": (pa.list_(pa.int32()), pa.list_(pa.int64())),
    }
    if schema.timestamps:
        types["timestamps"] = (pa.list_(pa.int64()),)
    if schema.actions:
        types["actions"] = (pa.list_(pa.int32()),)
    numbers = [*["ratings"] * schema.ratings, *schema.values]
    return (
        types
        | dict.fromkeys(numbers, (pa.list_(pa.float32()),))
        | dict.fromkeys(schema.event_features, (pa.list_(pa.int32()), pa.list_(pa.int64())))
        | dict.fromkeys(schema.contextual, (pa.int32(), pa.int64()))
        | dict.fromkeys(schema.contextual_numeric, (pa.float32(),))
    )


def packed(column: pa.ChunkedArray) -> Packed:
    """A list column as offsets from 0, the values they point into, and a mask of the rows that are null."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    offsets = array.offsets.to_numpy().astype(np.int64)
    values = array.values.slice(offsets[0], offsets[-1] - offsets[0])
    nulls = array.is_null().to_numpy(zero_copy_only=False)
    return offsets - offsets[0], values, nulls


def check_rows(lists: dict[str, Packed], flat: dict[str, pa.ChunkedArray], schema: DataSchema) -> list[Fault]:
    """The faults of a row group, in no order; empty when all rows are good."""
    faults: list[Fault | None] = []
    items_B = np.diff(lists["item_ids"][0])
    for name, (offsets, values, nulls) in lists.items():
        faults.append(_row_fault(name, nulls, lambda row: "the list is null"))
        if values.null_count:
            missing = values.is_null().to_numpy(zero_copy_only=False)
            faults.append(_event_fault(name, offsets, missing, lambda event: "is null"))
        faults.append(_check_counts(name, np.diff(offsets), items_B, nulls))
    bounds = {"item_ids": (1, schema.item_cardinality), "actions": (0, 1 << len(schema.actions))}
    bounds |= {name: (0, size) for name, size in schema.event_features.items()}
    faults += [_check_ids(name, lists[name], *bounds[name]) for name in lists if name in bounds]
    faults += [_check_finite(name, lists[name]) for name in ("ratings", *schema.values) if name in lists]
    if "timestamps" in lists:
        faults.append(_check_times(lists["timestamps"]))
    for name, column in flat.items():
        faults += _check_flat(name, column, schema.contextual.get(name))
    return [fault for fault in faults if fault is not None]


def _check_counts(name: str, counts_B: np.ndarray, items_B: np.ndarray, nulls_B: np.ndarray) -> Fault | None:
    wrong_B = (counts_B != items_B) & ~nulls_B
    return _row_fault(name, wrong_B, lambda row: f"{counts_B[row]} values for {items_B[row]} items in item_ids")


def _check_ids(name: str, column: Packed, low: int, stop: int) -> Fault | None:
    ids = column[1].fill_null(low).to_numpy(zero_copy_only=False)
    outside = (ids < low) | (ids >= stop)
    noun = "item id " if name == "item_ids" else ""
    return _event_fault(
        name, column[0], outside, lambda event: f"is {noun}{ids[event]}, allowed are {low} to {stop - 1}"
    )


def _check_finite(name: str, column: Packed) -> Fault | None:
    values = column[1].fill_null(0).to_numpy(zero_copy_only=False)
    return _event_fault(name, column[0], ~np.isfinite(values), lambda event: f"is {values[event]}, not a finite number")


def _check_times(column: Packed) -> Fault | None:
    offsets, values, _ = column
    missing = values.is_null().to_numpy(zero_copy_only=False)
    times = values.fill_null(0).to_numpy(zero_copy_only=False)
    back = np.zeros(len(times), dtype=bool)
    back[1:] = (times[1:] < times[:-1]) & ~missing[1:] & ~missing[:-1]
    back[offsets[:-1][np.diff(offsets) > 0]] = False  # the first event of a row
    return _event_fault(
        "timestamps", offsets, back, lambda event: f"is {times[event]}, earlier than {times[event - 1]} before it"
    )


def _check_flat(name: str, column: pa.ChunkedArray, cardinality: int | None) -> list[Fault | None]:
    nulls = column.is_null().to_numpy()
    faults = [_row_fault(name, nulls, lambda row: "is null")]
    values = column.fill_null(0).to_numpy()
    if cardinality is not None:
        outside = (values < 0) | (values >= cardinality)
        faults.append(_row_fault(name, outside, lambda row: f"is {values[row]}, allowed are 0 to {cardinality - 1}"))
    if np.issubdtype(values.dtype, np.floating):
        faults.append(_row_fault(name, ~np.isfinite(values), lambda row: f"is {values[row]}, not a finite number"))
    return faults


def _row_fault(column: str, rows: np.ndarray, problem: Callable[[int], str]) -> Fault | None:
    if not rows.any():
        return None
    row = int(rows.argmax())
    return Fault(column, rows, row, problem(row))


def _event_fault(column: str, offsets: np.ndarray, events: np.ndarray, problem: Callable[[int], str]) -> Fault | None:
    if not events.any():
        return None
    rows = np.zeros(len(offsets) - 1, dtype=bool)
    rows[np.searchsorted(offsets, np.flatnonzero(events), side="right") - 1] = True
    first, row = int(events.argmax()), int(rows.argmax())
    return Fault(column, rows, row, f"element {first - offsets[row]} {problem(first)}")
