"""Ranking batches against a slow definition in Python lists."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.batch import ITEM_FEATURE, RankingBatch
from gr.config.ranking import RankingConfig
from gr.data.collate import Counts, Rows
from gr.data.collate_ranking import RankingCollate
from gr.data.dataset import Dataset, Histories
from gr.data.stochastic_length import Draws
from gr.errors import ConfigError
from tests.support.tiny_histories import tiny_ranking_config, write_histories

CANDIDATES = {"supervision": "candidates"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("data")
    write_histories(folder, users=40)
    return Dataset.open(folder)


def read(dataset: Dataset) -> Histories:
    return dataset.read_row_group(0, RankingCollate(dataset.schema, CONFIG.data, CONFIG.task).columns)


CONFIG = tiny_ranking_config()


def collated(dataset: Dataset, config: RankingConfig, users: list[int]) -> tuple[RankingBatch, Counts]:
    collate = RankingCollate(dataset.schema, config.data, config.task)
    rows = Rows([read(dataset)], np.zeros(len(users), dtype=np.int64), np.array(users), True)
    return collate(rows, Draws(1, np.arange(len(users))), 24)


def expected(dataset: Dataset, users: list[int], stop: int, length: int) -> dict[str, list]:
    """The newest `length` events before each user's newest `stop`."""
    found: dict[str, list] = {"item_ids": [], "actions": [], "watched": [], "timestamps": [], "category": []}
    rows = read(dataset)
    for user in users:
        low, high = rows.offsets[user], max(rows.offsets[user + 1] - stop, rows.offsets[user])
        for name, values in found.items():
            values += rows.columns[name][max(low, high - length) : high].tolist()
    return found


@settings(max_examples=40)
@given(st.lists(st.integers(0, 39), min_size=1, max_size=6), st.integers(1, 12), st.integers(0, 5))
def test_windows_hold_the_newest(dataset: Dataset, users: list[int], max_length: int, holdout: int) -> None:
    data = {**CONFIG.data.model_dump(), "max_length": max_length, "train_holdout": holdout, "candidates": 1}
    config = tiny_ranking_config(data=data, evaluation={"newest": 1, "path": "elsewhere", "global_batch_size": 16})
    batch, counts = collated(dataset, config, users)
    wanted = expected(dataset, users, holdout, max_length)
    assert batch.features[ITEM_FEATURE].values().tolist() == wanted["item_ids"]
    assert batch.features["category"].values().tolist() == wanted["category"]
    assert batch.actions_T.tolist() == wanted["actions"]
    assert batch.timestamps_T is not None and batch.timestamps_T.tolist() == wanted["timestamps"]
    assert batch.labels_TC[:, 0].tolist() == [actions & 1 for actions in wanted["actions"]]
    assert batch.labels_TC[:, 1].tolist() == [actions >> 1 for actions in wanted["actions"]]
    np.testing.assert_allclose(batch.labels_TC[:, 2], np.array(wanted["watched"], dtype=np.float32))
    assert batch.scored_B.tolist() == batch.features[ITEM_FEATURE].lengths().tolist()
    assert batch.features["country"].lengths().tolist() == (batch.scored_B > 0).int().tolist()
    assert counts.tokens == batch.scored == len(wanted["item_ids"]) and batch.first_example == 24


def test_milliseconds_become_seconds(dataset: Dataset) -> None:
    assert dataset.schema.time_unit == "ms"
    times = read(dataset).columns["timestamps"]
    assert 1_000_000 <= times.min() and times.max() < 2_000_000


@pytest.mark.parametrize("alpha", [1.1, 1.6])
def test_candidates_stay_whatever_stochastic_length_leaves_out(dataset: Dataset, alpha: float) -> None:
    data = {**CONFIG.data.model_dump(), "stochastic_length": {"alpha": alpha, "selector": "random"}}
    task = {**CONFIG.task.model_dump(), **CANDIDATES}
    users = list(range(40))
    batch, counts = collated(dataset, tiny_ranking_config(data=data, task=task), users)
    whole, _ = collated(dataset, tiny_ranking_config(task=task), users)
    assert counts.subsampled_tokens > 0
    assert batch.scored_B.tolist() == whole.scored_B.tolist()
    mine, theirs = batch.targets(), whole.targets()
    assert (mine[0] == theirs[0]).all() and (mine[1] == theirs[1]).all()
    kept = batch.features[ITEM_FEATURE].lengths() - batch.scored_B
    assert (kept <= 13).all() and set(kept.tolist()) <= {*range(14)}


def test_a_uniform_cut_ends_anywhere(dataset: Dataset) -> None:
    lengths = np.diff(read(dataset).offsets) - 4
    user = int(lengths.argmax())
    data = {**CONFIG.data.model_dump(), "cut": "uniform"}
    batch, _ = collated(dataset, tiny_ranking_config(data=data), [user] * 300)
    assert set(batch.scored_B.tolist()) == set(range(1, min(16, lengths[user]) + 1))


def test_evaluation_predicts_the_newest(dataset: Dataset) -> None:
    collate = RankingCollate(dataset.schema, CONFIG.data, CONFIG.task)
    users = list(range(40))
    rows = Rows([read(dataset)], np.zeros(40, dtype=np.int64), np.array(users), True)
    for before in (0, 2):
        batch, _ = collate.newest(rows, newest=2, before=before)
        wanted = expected(dataset, users, before, 2)
        assert batch.targets()[0][:, 0].tolist() == [actions & 1 for actions in wanted["actions"]]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            {"kind": "bce", "action": "liked"},
            "tasks.0.action=liked: tiny-histories has no such action; it has like, share",
        ),
        ({"kind": "bce", "action": "watched"}, "has no such action"),
    ],
)
def test_unknown_labels(dataset: Dataset, task: dict, message: str) -> None:
    config = tiny_ranking_config(task={"kind": "ranking", "tasks": [task]})
    with pytest.raises(ConfigError, match=message):
        RankingCollate(dataset.schema, config.data, config.task)
    config = tiny_ranking_config(
        task={"kind": "ranking", "tasks": [{"kind": "bce", "action": "like"}, {"kind": "mse", "value": "x"}]}
    )
    with pytest.raises(ConfigError, match=r"task.tasks.1.value=x: tiny-histories has no such value; it has watched"):
        RankingCollate(dataset.schema, config.data, config.task)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("actions", 4, "column actions: element 0 is 4, allowed are 0 to 3"),
        ("watched", np.nan, "column watched: element 0 is nan, not a finite number"),
        ("category", 43, "column category: element 0 is 43, allowed are 0 to 42"),
        ("country", 45, "column country: is 45, allowed are 0 to 44"),
        ("age", np.inf, "column age: is inf, not a finite number"),
    ],
)
def test_bad_values_are_named(tmp_path: Path, column: str, value: float, message: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from gr.errors import DataError

    write_histories(tmp_path, users=20)
    part = tmp_path / "part-00000.parquet"
    table = pq.read_table(part)
    row = next(i for i, items in enumerate(table.column("item_ids").to_pylist()) if items)
    values = table.column(column).to_pylist()
    if isinstance(values[row], list):
        values[row][0] = value
    else:
        values[row] = value
    place = table.column_names.index(column)
    pq.write_table(table.set_column(place, column, pa.array(values, table.schema.field(column).type)), part)
    dataset = Dataset.open(tmp_path)
    with pytest.raises(DataError, match=f"row {row}, {message}"):
        read(dataset)
    skipped = dataset.read_row_group(0, dataset.schema.event_columns + dataset.schema.user_columns, on_bad_row="skip")
    assert skipped.lengths_B[row] == 0 and dataset.bad_rows == 1
