"""Rated events -> users with their events in time order.

B users, T events.
"""

import numpy as np

from gr.logging import get_logger
from gr.prepare.source import SourceFile
from gr.prepare.write import Users, repeated_events

log = get_logger(__name__)
STABLE_ORDER = "by timestamp within each user; ties in the order of lines in {file} (stable sort)"


def group_users(
    file: SourceFile, users_T: np.ndarray, items_T: np.ndarray, times_T: np.ndarray, ratings_T: np.ndarray
) -> tuple[Users, str]:
    """Users in ascending order of id, each user's events by time, ties in file order; and the field `source`, which
    counts the events that were there already.
    """
    order = np.lexsort((times_T, users_T))  # a stable sort
    user_ids, counts = np.unique(users_T, return_counts=True)
    users = Users(
        user_ids=user_ids.astype(np.int64),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        item_ids=items_T[order],
        timestamps=times_T[order],
        ratings=ratings_T[order],
    )
    repeated = repeated_events(users_T[order], times_T[order], items_T[order])
    if not repeated:
        return users, str(file)
    note = f"{repeated} events repeat the user, item and time of another, and are kept"
    log.warning("%s: %s", file, note)
    return users, f"{file}; {note}"
