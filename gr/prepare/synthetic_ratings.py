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

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gr.errors import ConfigError
from gr.prepare import generate
from gr.prepare.write import Users
from gr.schema import DataSchema, HistoryColumns

_TAKES_PART, _MAX_ALPHA = 0.7, 500
_MINUTE = 60
_DAY_MINUTES = generate.DAY_SECONDS // _MINUTE


@dataclass(frozen=True)
class RatingOptions:
    """Size of the folder. Raises ConfigError on sizes the definition does not allow."""

    users: int = generate.size(2_000, at_least=1)
    items: int = generate.size(10_000, "Item ids 1..items.", at_least=1)
    categories: int = generate.size(128, "Categories of the items.", at_least=1)
    user_categories: int = generate.size(5, "Categories of each user.", at_least=1)
    times: int = generate.size(10, "Days.", at_least=1)
    events: int = generate.size(20, "Events of a user at one time.", at_least=1)
    seed: int = generate.seed()

    def __post_init__(self) -> None:
        if self.user_categories > self.categories:
            raise ConfigError(f"--user-categories {self.user_categories} is more than --categories {self.categories}")
        if self.items < self.categories * self.times:
            raise ConfigError(
                f"--items {self.items} leaves a category without items at first: give at least "
                f"{self.categories * self.times} (categories x times)"
            )
        if self.events > _DAY_MINUTES:
            raise ConfigError(f"--events {self.events} a time is more than a day has minutes: {_DAY_MINUTES} at most")

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
    return generate.write_histories(
        folder,
        _chunks(options),
        options.columns,
        items=options.items,
        name="streaming",
        source=generate.stated("gr prepare streaming", options),
    )


def _chunks(options: RatingOptions) -> Iterator[Users]:
    item_rating = generate.random_stream(options.seed, 0).uniform(1, 5, options.items + 1)
    for number, first in enumerate(range(0, options.users, generate.HISTORY_CHUNK)):
        random = generate.random_stream(options.seed, 1 + number)
        yield _draw(options, random, item_rating, np.arange(first, min(first + generate.HISTORY_CHUNK, options.users)))


def _draw(options: RatingOptions, random: np.random.Generator, item_rating: np.ndarray, user_ids: np.ndarray) -> Users:
    users, K = len(user_ids), options.user_categories
    category_items = options.items // options.categories
    category_BK = np.argsort(random.random((users, options.categories)), axis=1)[:, :K]
    phase_BK = random.uniform(0, 2 * math.pi, (users, K))
    alpha_B = random.integers(1, _MAX_ALPHA + 1, users)
    count_BK, row_B = np.zeros((users, K)), np.arange(users)
    events: list[tuple[np.ndarray, ...]] = []
    for t in range(options.times):
        present = np.flatnonzero(random.random(users) < _TAKES_PART)
        exist = max(1, category_items * (t + 1) // options.times)
        for event in range(options.events):
            weight_BK = alpha_B[:, None] / K + count_BK
            slot_B = generate.urn_slots(random, weight_BK, weight_BK.sum(1), K)
            item_B = category_BK[row_B, slot_B] * category_items + random.integers(0, exist, users) + 1
            taste_B = 3 + 2 * np.cos(math.pi * t / 4 + phase_BK[row_B, slot_B])
            count_BK[present, slot_B[present]] += 1
            rating_B = (item_rating[item_B] + taste_B) / 2
            second = generate.START_SECOND + t * generate.DAY_SECONDS + event * _MINUTE
            events.append((present, item_B[present], rating_B[present], np.full(len(present), second)))
    user, item, rating, time = (np.concatenate(parts) for parts in zip(*events, strict=True))
    order = np.argsort(user, kind="stable")
    item, rating = item[order], rating[order].astype(np.float32)
    return Users(
        user_ids=user_ids,
        offsets=np.concatenate([[0], np.cumsum(np.bincount(user, minlength=users))]),
        item_ids=item,
        timestamps=time[order],
        ratings=rating,
        columns={
            "actions": (rating > 3).astype(np.int32) | (rating > 4).astype(np.int32) << 1,
            "item_category_id": (item - 1) // category_items + 1,
            "user": user_ids + 1,
        },
    )
