"""Text files of ratings -> users with their events in time order.

B users, T events.
"""

import re
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv

from gr.errors import DataError
from gr.prepare.lines import BadRows, Fault, parse_lines, text_blocks
from gr.prepare.source import SourceFile
from gr.prepare.write import Users

STABLE_ORDER = "by timestamp within each user; ties in the order of lines in {file} (stable sort)"
_SEPARATOR = b"\x01"  # Arrow takes one byte, which no file contains


@dataclass(frozen=True)
class Format:
    """Lines of user, item, rating, time. header: lines to skip. ids: Arrow type of user and item."""

    separator: str
    header: int
    ids: pa.DataType

    @cached_property
    def line(self) -> re.Pattern[bytes]:
        """Pattern of a good line, used only to find the line that is not."""
        separator, number = re.escape(self.separator).encode(), rb"-?\d+(\.\d+)?"
        name = rb"[1-9]\d*" if pa.types.is_integer(self.ids) else rb"[^%s\r\n]+" % separator
        return re.compile(separator.join([name, name, number, number]))

    def fault(self, line: bytes) -> Fault | None:
        if self.line.fullmatch(line):
            return None
        fields = self.separator.join(("user", "item", "rating", "time"))
        return Fault("line", f"{line.decode('utf-8', 'replace')!r} is not {fields}")


def read_ratings(file: SourceFile, form: Format) -> pa.Table:
    """Columns user, item (form.ids), rating float32, time int64 (whole seconds), in file order: 20 bytes an event.

    Raises DataError naming file and line for a line that has not four fields, has a field of another kind, or an
    integer id below 1; and for a file without events.
    """
    texts = text_blocks(file, header=form.header)
    blocks = list(parse_lines(file, texts, partial(_parse, form), form.fault, BadRows(), first=1 + form.header))
    if not blocks:
        raise DataError(f"{file}: has no events")
    return pa.concat_tables(blocks)


def _parse(form: Format, text: bytes) -> pa.Table:
    types = {"user": form.ids, "item": form.ids, "rating": pa.float32(), "time": pa.float64()}
    table = csv.read_csv(
        pa.BufferReader(text.replace(form.separator.encode(), _SEPARATOR)),
        csv.ReadOptions(column_names=list(types), block_size=len(text) + 1, use_threads=False, encoding="utf8"),
        csv.ParseOptions(delimiter=_SEPARATOR.decode(), quote_char=False, ignore_empty_lines=False),
        csv.ConvertOptions(column_types=types, null_values=[], strings_can_be_null=False),
    )
    time, rating = table.column("time").to_numpy(), table.column("rating").to_numpy()
    good = np.isfinite(time) & (time == np.floor(time)) & np.isfinite(rating)
    for name in ("user", "item"):
        good &= table.column(name).null_count == 0
        if pa.types.is_integer(form.ids):
            good &= table.column(name).to_numpy() >= 1
    if not good.all():
        raise ValueError("a value is missing, not finite or whole, or an id is below 1")
    return table.set_column(3, "time", pa.array(time.astype(np.int64)))


def group_users(users_T: np.ndarray, items_T: np.ndarray, times_T: np.ndarray, ratings_T: np.ndarray) -> Users:
    """Users in ascending order of id, each user's events by time; ties stay in file order."""
    order = np.lexsort((times_T, users_T))  # a stable sort
    user_ids, counts = np.unique(users_T, return_counts=True)
    return Users(
        user_ids=user_ids.astype(np.int64),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        item_ids=items_T[order],
        timestamps=times_T[order],
        ratings=ratings_T[order],
    )
