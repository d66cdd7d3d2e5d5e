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
from csv import Error as CsvError
from csv import reader
from pathlib import Path

import numpy as np

from gr.errors import DataError
from gr.logging import get_logger
from gr.prepare.delimited import LARGEST_ID, MILLISECONDS, Lines, Whole, header_of
from gr.prepare.lines import BadRows, OnBadRow, text_blocks
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
_COLUMNS: dict[str, Whole] = {
    **dict.fromkeys(("user_id", "video_id"), Whole(0, LARGEST_ID)),
    "time_ms": MILLISECONDS,
    **dict.fromkeys((*ACTIONS, "is_rand"), Whole(0, 1)),
    **dict.fromkeys(("play_time_ms", "duration_ms"), Whole(0, 2**31 - 1)),
    "tab": Whole(0, TABS - 1),
}
_LINES = Lines(",", _COLUMNS, {name: name for name in _COLUMNS})
_FIELDS = {"actions": "<i4", "watch_fraction": "<f4", "tab": "<i4", "exposure": "<i4"}
_NUMBER = re.compile(r"-?\d+(\.\d+)?")
_LINE_BYTES = 71  # 23 GB of logs, 323 M lines


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
            for raw in _LINES.blocks(file, bad):
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
        (partitions.repeated, "events repeat the user, time and video of another, and are kept"),
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
        columns = _read_users(file)
        user_ids = np.array(columns["user_id"], dtype=np.int64)
        order = np.argsort(user_ids, kind="stable")
        self._user_ids = user_ids[order]
        if (repeated := self._user_ids[1:] == self._user_ids[:-1]).any():
            raise DataError(f"{file}: user_id {self._user_ids[1:][repeated][0]} has two lines")
        self.largest = int(self._user_ids.max(initial=-1))
        self._ids, self.cardinalities, self.unknown = {}, {}, 0
        for name in USER_FEATURES:
            texts = np.array(columns[name], dtype=object)[order]
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
    return (float(text) if _NUMBER.fullmatch(text) else float("inf")), text


def _read_users(file: SourceFile) -> dict[str, list[str]]:
    """The columns user_id and USER_FEATURES."""
    needed = ("user_id", *USER_FEATURES)
    names = header_of(file, ",", {name: name for name in needed})
    lines = (line for text in text_blocks(file, header=True) for line in text.split(b"\n")[:-1])
    rows = reader((line.decode("latin-1") for line in lines), strict=True)  # only compared: any bytes will do
    columns: dict[str, list[str]] = {name: [] for name in needed}
    try:
        for row in rows:
            if len(row) != len(names):
                raise ValueError(f"has {len(row)} fields, wanted {len(names)}")
            fields = dict(zip(names, row, strict=True))
            if problem := _COLUMNS["user_id"].problem(fields["user_id"].encode()):
                raise ValueError(f"column user_id {problem}")
            for name in needed:
                columns[name].append(fields[name])
    except (CsvError, ValueError) as error:
        raise DataError(f"{file}, line {rows.line_num + 1}: {error}") from None
    if not columns["user_id"]:
        raise DataError(f"{file}: has no users")
    return columns


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
