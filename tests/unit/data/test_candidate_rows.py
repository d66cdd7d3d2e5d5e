"""Rows of a user and a candidate: the history of each, and the candidate as its newest event."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from gr.config.ranking import RankingConfig
from gr.data.candidate_rows import CandidateRows
from gr.data.collate_ranking import RankingCollate
from gr.data.dataset import Dataset
from gr.data.vocabulary import Vocabulary
from gr.errors import DataError
from tests.support.history_folder import histories_by_user
from tests.support.tiny_histories import tiny_ranking_config, write_histories


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,300 users in three row groups, some without events."""
    folder = tmp_path_factory.mktemp("data") / "data"
    write_histories(folder, users=1300, longest=5)
    return folder


def candidate_rows(folder: Path, config: RankingConfig) -> CandidateRows:
    data = Dataset.open(folder)
    own = {name: Vocabulary(name) for name in ("item_id", "category")}
    return CandidateRows(data, RankingCollate(data.schema, config.data, config.task), Vocabulary("user_id"), own)


def test_histories_and_candidates(folder: Path) -> None:
    """In any order of users, a user more than once, and those that are not there."""
    users = [1399, 100, 1399, 7, None, 700, 101]
    items = [3, 4, 5, 6, 7, 40, 41]
    rows = candidate_rows(folder, tiny_ranking_config(folder))
    table = pa.table(
        {"user_id": pa.array(users, pa.int64()), "item_id": items, "category": [1, 2, 3, 42, 43, -1, None]}
    )
    batch, known_B = rows.batch(table)
    assert known_B.tolist() == [True] * 6 + [False] and (rows.unknown_users, rows.unknown_items) == (2, 1)
    histories, none = histories_by_user(folder), {"item_ids": [], "timestamps": [], "category": [], "country": 0}
    start = 0
    item_T, category_T = batch.features["item_id"].values(), batch.features["category"].values()
    assert batch.timestamps_T is not None and batch.scored_B.tolist() == [1] * 7
    for place, (user, item, category) in enumerate(zip(users, [*items[:6], 0], [1, 2, 3, 42, 0, 0, 0], strict=True)):
        past = histories.get(user, none)  # type: ignore[call-overload]
        stop = start + len(past["item_ids"]) + 1
        assert item_T[start:stop].tolist() == [*past["item_ids"], item]
        assert category_T[start:stop].tolist() == [*past["category"], category]
        times = batch.timestamps_T[start:stop].tolist()
        assert times == [*past["timestamps"], max(past["timestamps"], default=0)]
        assert batch.features["country"].values()[place] == past["country"]
        assert batch.actions_T[stop - 1] == 0, "it is to be predicted"
        start = stop
    assert start == len(item_T)
    batch, known_B = rows.batch(table[:0])
    assert len(known_B) == 0 and batch.scored == 0


def test_a_long_history_keeps_its_newest_events(folder: Path) -> None:
    config = tiny_ranking_config(folder, data={"max_length": 4, "candidates": 1})
    user, past = next((user, past) for user, past in histories_by_user(folder).items() if len(past["item_ids"]) == 5)
    batch, _ = candidate_rows(folder, config).batch(pa.table({"user_id": [user], "item_id": [9], "category": [1]}))
    assert batch.features["item_id"].values().tolist() == [*past["item_ids"][-3:], 9]


def test_memory_is_that_of_some_row_groups(folder: Path) -> None:
    rows = candidate_rows(folder, tiny_ranking_config(folder))
    expected = {}
    for users in np.array_split(np.random.default_rng(0).permutation(np.arange(100, 1400)), 50):
        rows.batch(pa.table({"user_id": users, "item_id": np.ones_like(users), "category": np.ones_like(users)}))
        expected |= dict.fromkeys(users)
    assert len(expected) == 1300 and len(rows._groups) <= 8 and not rows.unknown_users


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"user_id": ["a"]}, "user_id: values of type string cannot be looked up"),
        ({"category": ["a"]}, "category: values of type string cannot be looked up"),
        ({"timestamp": [5]}, "row 0, column timestamp: 0 s is before the user's newest event"),
        ({"timestamp": [253_402_300_800_000]}, "row 0, column timestamp: is beyond the year 9999"),
        ({"timestamp": [1.5]}, "row 0, column timestamp: is 1.5, not a whole number within int64"),
    ],
)
def test_rows_that_are_refused(folder: Path, change: dict[str, list], fault: str) -> None:
    user = next(user for user, past in histories_by_user(folder).items() if past["item_ids"])
    columns = {"user_id": [user], "item_id": [1], "category": [1]}
    with pytest.raises(DataError) as error:
        candidate_rows(folder, tiny_ranking_config(folder)).batch(pa.table(columns | change))
    assert fault in str(error.value) and "\n" not in str(error.value)
    del columns["category"]
    with pytest.raises(DataError, match="the input: has no column category; it has user_id, item_id"):
        candidate_rows(folder, tiny_ranking_config(folder)).batch(pa.table(columns))
