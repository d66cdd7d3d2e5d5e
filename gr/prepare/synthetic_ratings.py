"""Rated histories that drift with time, after the streaming data of DLRM-v3 (meta-recsys/generative-recommenders,
dlrm_v3/streaming_synthetic_data.py). The process, not its numbers; all of it from one seed.

1.  Items are ids 1..items, in `categories` categories of consecutive ids. At time t of T the first (t + 1) / T of each
    category exist.
2.  A user has `user_categories` of them, and alpha, uniform in 1..500.
3.  At each time a user takes part with probability 0.7, for `events` events a minute apart. Each draws the user's
    category c with probability (alpha / k + n_c) / (alpha + n), n_c of the n events before being of it, and a uniform
    item of c that exists.
4.  The rating is the mean of the item's own, uniform in [1, 5], and of the user's for the category at that time,
    3 + 2 cos(pi t / 4 + phase), the phase uniform for each user and category.
5.  Actions: `like`, of a rating above 3, and `love`, above 4. Times are days.

B users of a chunk, K categories of a user.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gr.errors import ConfigError
from gr.prepare.synthetic import random_stream
from gr.prepare.write import ROWS_PER_GROUP, FolderWriter, Users
from gr.schema import DataSchema, HistoryColumns

_CHUNK = 8 * ROWS_PER_GROUP
_TAKES_PART, _MAX_ALPHA = 0.7, 500
_START, _DAY, _MINUTE = 978_307_200, 86_400, 60  # 2001-01-01


@dataclass(frozen=True)
class RatingOptions:
    users: int = 2_000
    items: int = 10_000
    categories: int = 128
    user_categories: int = 5
    times: int = 10
    events: int = 20
    seed: int = 1

    def __post_init__(self) -> None:
        if self.user_categories > self.categories:
            raise ConfigError(f"--user-categories {self.user_categories} is more than --categories {self.categories}")
        if self.items < self.categories * self.times:
            raise ConfigError(
                f"--items {self.items} leaves a category without items at first: give at least "
                f"{self.categories * self.times} (categories x times)"
            )
        if self.events * _MINUTE > _DAY:
            raise ConfigError(
                f"--events {self.events} a time is more than a day has minutes: {_DAY // _MINUTE} at most"
            )

    @property
    def columns(self) -> HistoryColumns:
        return HistoryColumns(
            timestamps=True,
            ratings=True,
            actions=["like", "love"],
            event_features={"item_category_id": self.categories + 1},
            contextual={"user": self.users + 1},
        )


def write_ratings(options: RatingOptions, folder: Path) -> DataSchema:
    """Write a data folder of user histories."""
    item_rating = random_stream(options.seed, 0).uniform(1, 5, options.items + 1)
    writer = FolderWriter(folder, options.columns, item_cardinality=options.items + 1)
    with tqdm(total=options.users, unit="user", desc="streaming", disable=None) as bar:
        for users in _chunks(options, item_rating):
            writer.write(users)
            bar.update(len(users.user_ids))
    return writer.close(
        name="streaming",
        order="as generated, oldest first",
        source=f"gr prepare streaming {json.dumps(asdict(options))}",
        corpus=np.arange(1, options.items + 1),
    )


def _chunks(options: RatingOptions, item_rating: np.ndarray) -> Iterator[Users]:
    for number, first in enumerate(range(0, options.users, _CHUNK)):
        yield _draw(options, item_rating, first, min(_CHUNK, options.users - first), number)


def _draw(options: RatingOptions, item_rating: np.ndarray, first: int, users: int, number: int) -> Users:
    random = random_stream(options.seed, 1 + number)
    K, size = options.user_categories, options.items // options.categories
    mine_BK = np.argsort(random.random((users, options.categories)), axis=1)[:, :K]
    phase_BK = random.uniform(0, 2 * math.pi, (users, K))
    alpha_B = random.integers(1, _MAX_ALPHA + 1, users)
    count_BK, rows = np.zeros((users, K)), np.arange(users)
    drawn: list[tuple[np.ndarray, ...]] = []
    for t in range(options.times):
        here_B = random.random(users) < _TAKES_PART
        exist = max(1, size * (t + 1) // options.times)
        for event in range(options.events):
            weight_BK = alpha_B[:, None] / K + count_BK
            place_B = (random.random(users) * weight_BK.sum(1))[:, None]
            slot_B = np.minimum((weight_BK.cumsum(1) < place_B).sum(1), K - 1)
            item_B = mine_BK[rows, slot_B] * size + random.integers(0, exist, users) + 1
            taste_B = 3 + 2 * np.cos(math.pi * t / 4 + phase_BK[rows, slot_B])
            count_BK[rows[here_B], slot_B[here_B]] += 1
            rating_B = (item_rating[item_B] + taste_B) / 2
            now = _START + t * _DAY + event * _MINUTE
            drawn.append((rows[here_B], item_B[here_B], rating_B[here_B], np.full(int(here_B.sum()), now)))
    user, item, rating, time = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    order = np.argsort(user, kind="stable")
    item, rating = item[order], rating[order].astype(np.float32)
    return Users(
        user_ids=np.arange(first, first + users),
        offsets=np.concatenate([[0], np.cumsum(np.bincount(user, minlength=users))]),
        item_ids=item,
        timestamps=time[order],
        ratings=rating,
        columns={
            "actions": (rating > 3).astype(np.int32) | (rating > 4).astype(np.int32) << 1,
            "item_category_id": (item - 1) // size + 1,
            "user": np.arange(first, first + users) + 1,
        },
    )
