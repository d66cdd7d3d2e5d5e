"""The rows of a log with codes for their texts: read once, sorted in parts that fit in memory, back to DuckDB.

A join of texts with their ids and a sort of all events took DuckDB half the time of a log. B rows, U users.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from gr.errors import DataError
from gr.prepare.coding.native import Codes, new_codes, order_of
from gr.prepare.write import plain_array, plain_block, plain_values

BLOCK = 1 << 17  # rows of a block
_PART = 1 << 20  # rows that are sorted at a time, but for a user who has more
_MOST_PARTS = 256  # files that are open at once
Block = dict[str, np.ndarray]


@dataclass(frozen=True)
class CodedRows:
    """Rows in a file, in the order of the log. codes: of each column that has codes for its values.

    events_V: int64, the rows of each code of the column user.
    """

    path: Path
    codes: dict[str, Codes]
    events_V: np.ndarray


class _Writer:
    """Writes blocks to a file as they come; no file where none comes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: pa.ipc.RecordBatchStreamWriter | None = None
        self._file: pa.OSFile | None = None

    def write(self, block: Block) -> None:
        batch = _batch(block)
        if self._stream is None:
            self._file = pa.OSFile(str(self.path), "wb")
            self._stream = pa.ipc.new_stream(self._file, batch.schema)
        self._stream.write_batch(batch)

    def close(self) -> None:
        if self._stream is not None and self._file is not None:
            self._stream.close()
            self._file.close()


def code_rows(con: duckdb.DuckDBPyConnection, columns: Mapping[str, str], coded: list[str], folder: Path) -> CodedRows:
    """Reads the view `log`. columns: SQL by name; those of `coded`, user among them, are text or int64, and become
    int32 codes (-1 for null), all others are numbers.
    """
    selected = ", ".join(f"{sql} AS {name}" for name, sql in columns.items())
    reader = con.sql(f"SELECT {selected} FROM log").to_arrow_reader(BLOCK)
    codes = {name: new_codes(reader.schema.field(name).type) for name in coded}
    writer, events_V = _Writer(folder / "coded.rows"), np.zeros(1, dtype=np.int64)
    for batch in filter(len, reader):
        block = {
            name: codes[name].encode(column) if name in codes else plain_values(column)
            for name, column in zip(batch.schema.names, batch.columns, strict=True)
        }
        if (codes_now := int(block["user"].max()) + 1) > len(events_V):
            events_V = np.append(events_V, np.zeros(max(codes_now - len(events_V), len(events_V)), dtype=np.int64))
        np.add.at(events_V, block["user"], 1)
        writer.write(block)
    writer.close()
    if not writer.path.exists():
        raise DataError("no event is left; relax the filters")
    return CodedRows(writer.path, codes, events_V)


@dataclass(frozen=True)
class RowChoice:
    """What of coded rows is kept. ids: int32, of each code of a column and at last 0, the id of null.

    known: columns whose rows without an id are left out. raw: columns whose codes are kept too, as raw_<name>. Rows
    whose column `inside` is 0 are left out, and so is that column.
    """

    ids: Mapping[str, np.ndarray]
    known: list[str]
    raw: list[str]

    def of(self, block: Block) -> Block:
        """A block with ids for codes."""
        chosen = {f"raw_{name}": block[name] for name in self.raw}
        chosen |= {name: self.ids[name].take(values) if name in self.ids else values for name, values in block.items()}
        kept = [chosen[name] > 0 for name in self.known]
        if "inside" in chosen:
            kept.append(chosen.pop("inside") > 0)
        if kept and not (kept_B := np.logical_and.reduce(kept)).all():
            chosen = {name: values[kept_B] for name, values in chosen.items()}
        return chosen


def sorted_rows(rows: CodedRows, choice: RowChoice) -> pa.RecordBatchReader:
    """The rows by user, time (where there is one) and place."""
    id_V = choice.ids["user"]
    events_U = np.zeros(int(id_V.max()) + 1, dtype=np.int64)
    np.add.at(events_U, id_V[:-1], rows.events_V[: len(id_V) - 1])
    before_U = np.cumsum(events_U) - events_U
    part_U = (before_U // max(_PART, -(-int(events_U.sum()) // _MOST_PARTS))).astype(np.uint16)
    parts = [_Writer(rows.path.with_name(f"{part}.rows")) for part in range(int(part_U[-1]) + 1)]
    none: Block = {}
    for block in map(choice.of, _blocks(rows.path)):
        none = none or {name: values[:0] for name, values in block.items()}
        part_B = part_U[block["user"]]
        order_B = np.argsort(part_B, kind="stable")
        stops = np.searchsorted(part_B[order_B], np.arange(len(parts) + 1))
        for part, start, stop in zip(parts, stops[:-1], stops[1:], strict=True):
            if stop > start:
                part.write({name: values.take(order_B[start:stop]) for name, values in block.items()})
    rows.path.unlink()
    for part in parts:
        part.close()
    return pa.RecordBatchReader.from_batches(
        _batch(none).schema, (_batch(_sorted(p.path)) for p in parts if p.path.exists())
    )


def _sorted(path: Path) -> Block:
    """The rows of a part, which is then removed."""
    blocks = list(_blocks(path))
    path.unlink()
    block = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    user_B = block["user"]
    first = int(user_B.min())
    order_B = order_of(user_B - first, block.get("time"), int(user_B.max()) - first + 1)
    return {name: values.take(order_B) for name, values in block.items()}


def _blocks(path: Path) -> Iterator[Block]:
    with pa.OSFile(str(path)) as file:
        for batch in pa.ipc.open_stream(file):
            yield plain_block(batch)


def _batch(block: Block) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([plain_array(values) for values in block.values()], names=list(block))
