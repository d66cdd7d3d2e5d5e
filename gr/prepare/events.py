"""Events in file order -> users with their events in time order.

B users, T events.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from gr.prepare.write import Users

STABLE_ORDER = "by timestamp within each user; ties in the order of lines in {file} (stable sort)"


@dataclass
class Events:
    """Columns [T], in file order: users and items int32, times int64 seconds, ratings float32."""

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    ratings: np.ndarray


def collect(blocks: Iterable[pa.RecordBatch]) -> Events:
    """Integer events of a file, in memory: 20 bytes an event."""
    parts: dict[str, list[np.ndarray]] = {"user": [], "item": [], "time": [], "rating": []}
    for block in blocks:
        for name, kept in parts.items():
            array = block.column(name).to_numpy()
            kept.append(array.astype(np.int32) if name in ("user", "item") else array)
    empty = {"user": np.int32, "item": np.int32, "time": np.int64, "rating": np.float32}
    columns = {}
    for name in list(parts):
        kept = parts.pop(name)
        columns[name] = np.concatenate(kept) if kept else np.empty(0, dtype=empty[name])
    return Events(columns["user"], columns["item"], columns["time"], columns["rating"])


def group_users(events: Events) -> Users:
    """Users in ascending order of id, each user's events by time; ties stay in file order."""
    order = np.lexsort((events.times, events.users))  # a stable sort
    user_ids, counts = np.unique(events.users, return_counts=True)
    return Users(
        user_ids=user_ids.astype(np.int64),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        item_ids=events.items[order],
        timestamps=events.times[order],
        ratings=events.ratings[order],
    )
