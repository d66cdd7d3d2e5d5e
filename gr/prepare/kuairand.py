"""KuaiRand-1K and -27K (kuairand.com), as published: the standard logs and the log of random exposure, together.

No event is left out: a user without a line in user_features has id 0 in its columns. An item id is the video id + 1, a
user id the published one. Layout and ranges as the README of github.com/chongminggao/KuaiRand states them; the real
files were not read in this project, only generated ones of that layout. Peak memory of those, with 1,000 users of whom
one has a tenth of the events: 0.6 GB for 4 million, 0.8 GB for 16 million (benchmarks/prepare_histories.py). Beside
it each video takes a few int64; 27K has 32 million videos.

T events of a block.
"""

import re
from collections.abc import Iterator, Mapping
from csv import reader
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv

from gr.errors import DataError
from gr.logging import get_logger
from gr.prepare.lines import BadRows, Fault, OnBadRow, parse_lines, text_blocks
from gr.prepare.partition import partitioned
from gr.prepare.source import Source, SourceFile
from gr.prepare.write import FolderWriter
from gr.schema import DataSchema, HistoryColumns

log = get_logger(__name__)

ACTIONS = ("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view", "is_profile_enter")
_RANGED = ("follow_user_num_range", "fans_user_num_range", "friend_user_num_range", "register_days_range")
_FLAGS = ("is_lowactive_period", "is_live_streamer", "is_video_author")
USER_FEATURES = ("user_active_degree", *_FLAGS, *_RANGED, *(f"onehot_feat{number}" for number in range(18)))
TABS = 15
_STANDARD, _RANDOM = ("log_standard_4_08_to_4_21", "log_standard_4_22_to_5_08"), "log_random_4_22_to_5_08"
_LOGS = {
    "1k": [*(f"{log}_1k" for log in _STANDARD), f"{_RANDOM}_1k"],
    "27k": [*(f"{log}_27k_part{part}" for log in _STANDARD for part in (1, 2)), f"{_RANDOM}_27k"],
}
_COUNTS = ("play_time_ms", "duration_ms")
_RANGES = {
    **dict.fromkeys(("user_id", "video_id"), (0, 2**31 - 4)),
    "time_ms": (1, 2**53),
    **dict.fromkeys(ACTIONS, (0, 1)),
    **dict.fromkeys(_COUNTS, (0, 2**53)),
    "is_rand": (0, 1),
    "tab": (0, TABS - 1),
}
_NEEDED = tuple(_RANGES)
_FIELDS = {"actions": "<i4", "watch_fraction": "<f4", "tab": "<i4", "exposure": "<i4"}
_LINE_BYTES = 71  # 23 GB of logs, 323 M lines
_WHOLE = re.compile(rb"-?\d+")


def prepare_kuairand(size: str, source: Source, folder: Path, on_bad_row: OnBadRow = "fail") -> DataSchema:
    """Write kuairand-1k or -27k into an empty folder. size: 1k or 27k. on_bad_row: skip leaves bad lines out, counted.

    DataError for a missing file, naming it, and for a missing column, a line that is cut off or a value out of its
    range, naming file, line and column.
    """
    files = [source.require(f"{name}.csv") for name in _LOGS[size]]
    users = _UserFeatures(source.require(f"user_features_{size}.csv"))
    bad, endless = BadRows(on_bad_row), 0

    def blocks() -> Iterator[dict[str, np.ndarray]]:
        nonlocal endless
        for file in files:
            for raw in _events(file, bad):
                endless += int((raw["duration_ms"] == 0).sum())
                yield _columns(raw)

    expected = sum(file.size for file in files) // _LINE_BYTES
    with partitioned(blocks(), _FIELDS, beside=folder, expected_events=expected) as partitions:
        if not partitions.events:
            raise DataError(f"{files[0]}: has no events, nor have the other logs")
        declared = HistoryColumns(
            timestamps=True,
            time_unit="ms",
            actions=list(ACTIONS),
            values=["watch_fraction"],
            event_features={"tab": TABS + 1, "exposure": 3},
            contextual={"user": max(partitions.largest_user, users.largest) + 2, **users.cardinalities},
        )
        items = partitions.items
        writer = FolderWriter(folder, declared, item_cardinality=int(items[-1]) + 1)
        partitions.write_users(writer, users.columns)
    notes = [*map(str, files), *bad.note()]
    for count, effect in (
        (endless, "events of videos of no length, watch_fraction 0"),
        (users.unknown, "users without features"),
    ):
        if count:
            log.warning("%s: %d %s", source.path, count, effect)
            notes.append(f"{count} {effect}")
    return writer.close(
        name=f"kuairand-{size}",
        order="by time_ms within each user; ties in the order of the files in `source`, then of their lines (stable)",
        source=f"{'; '.join(notes)}; item id = video_id + 1, exposure 1 standard and 2 random, tab id = tab + 1",
        corpus=items,
    )


class _UserFeatures:
    """user_features: an id for each value of a column, from 1 in the order of values (numbers by size); 0 is empty."""

    def __init__(self, file: SourceFile) -> None:
        table = _read_users(file)
        try:
            user_ids = table.column("user_id").cast(pa.int64()).to_numpy()
        except pa.ArrowInvalid as error:
            raise DataError(f"{file}: column user_id: {error}") from None
        order = np.argsort(user_ids, kind="stable")
        self._user_ids = user_ids[order]
        if (repeated := self._user_ids[1:] == self._user_ids[:-1]).any():
            raise DataError(f"{file}: user_id {self._user_ids[1:][repeated][0]} has two lines")
        self.largest = int(self._user_ids.max(initial=-1))
        self._ids, self.cardinalities, self.unknown = {}, {}, 0
        for name in USER_FEATURES:
            texts = np.array(table.column(name).to_pylist(), dtype=object)[order]
            values = sorted({text for text in texts if text}, key=_by_size)
            number = {"": 0} | {value: place for place, value in enumerate(values, 1)}
            self._ids[name] = np.array([number[text] for text in texts], dtype=np.int64)
            self.cardinalities[name] = len(values) + 1

    def columns(self, users_B: np.ndarray) -> Mapping[str, np.ndarray]:
        """Ids [B] of users [B] by column; counts in `unknown` those without a line."""
        place_B = np.minimum(np.searchsorted(self._user_ids, users_B), len(self._user_ids) - 1)
        known_B = self._user_ids[place_B] == users_B
        self.unknown += int((~known_B).sum())
        return {"user": users_B + 1} | {name: np.where(known_B, ids[place_B], 0) for name, ids in self._ids.items()}


def _by_size(text: str) -> tuple[float, str]:
    try:
        return float(text), text
    except ValueError:
        return float("inf"), text


def _read_users(file: SourceFile) -> pa.Table:
    names = _header(file, ("user_id", *USER_FEATURES))
    convert = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
    try:
        with file.open() as stream:
            table = csv.read_csv(stream, convert_options=convert)
    except pa.ArrowInvalid as error:
        raise DataError(f"{file}: cannot be parsed: {error}") from None
    if not table.num_rows:
        raise DataError(f"{file}: has no users")
    return table


def _header(file: SourceFile, needed: tuple[str, ...]) -> list[str]:
    """Names of the columns. DataError where a needed one is missing."""
    with file.open() as stream:
        names = next(reader([stream.readline().decode("utf-8", "replace").rstrip("\r\n")]), [])
    if missing := [name for name in needed if name not in names]:
        raise DataError(f"{file}, line 1: has no column {', '.join(missing)}; its columns are {', '.join(names)}")
    return names


def _events(file: SourceFile, bad: BadRows) -> Iterator[dict[str, np.ndarray]]:
    """Blocks of the columns _NEEDED, int64 [T], in file order."""
    names = _header(file, _NEEDED)
    texts = text_blocks(file, header=1)
    yield from parse_lines(file, texts, partial(_parse, names), partial(_fault, names), bad, first=2)


def _parse(names: list[str], text: bytes) -> dict[str, np.ndarray]:
    """ValueError where a value is no whole number, or out of its range."""
    table = csv.read_csv(
        pa.BufferReader(text),
        csv.ReadOptions(column_names=names, block_size=len(text) + 1, use_threads=False),
        csv.ParseOptions(ignore_empty_lines=False),
        csv.ConvertOptions(column_types=dict.fromkeys(_NEEDED, pa.int64()), include_columns=list(_NEEDED)),
    )
    raw = {name: table.column(name).to_numpy() for name in _NEEDED if not table.column(name).null_count}
    for name, (low, high) in _RANGES.items():
        if name not in raw or raw[name].min() < low or raw[name].max() > high:
            raise ValueError(f"column {name} lacks a value or has one out of range")
    return raw


def _fault(names: list[str], line: bytes) -> Fault | None:
    fields = line.split(b",")
    if len(fields) != len(names):
        return Fault("(fields)", f"has {len(fields)} fields, wanted {len(names)}")
    for name, (low, high) in _RANGES.items():
        field = fields[names.index(name)].strip()
        if not _WHOLE.fullmatch(field):
            return Fault(name, f"{field.decode('utf-8', 'replace')!r} is not a whole number", name)
        if not low <= int(field) <= high:
            return Fault(name, f"is {int(field)}, allowed are {low} to {high}", name)
    return None


def _columns(raw: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    bits = [raw[name].astype(np.int32) << bit for bit, name in enumerate(ACTIONS)]
    duration, play = raw["duration_ms"], raw["play_time_ms"]
    return {
        "user": raw["user_id"],
        "time": raw["time_ms"],
        "item": raw["video_id"] + 1,
        "actions": np.sum(bits, axis=0, dtype=np.int32),
        "watch_fraction": np.divide(play, duration, out=np.zeros(len(play)), where=duration > 0),
        "tab": raw["tab"] + 1,
        "exposure": raw["is_rand"] + 1,
    }
