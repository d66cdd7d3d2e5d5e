"""Predictions and vectors: what evaluation computes, in a log's own ids, the same files on 1, 2 and 4 ranks."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import gr
from gr.checkpoint import resolve
from gr.config import RunConfig
from gr.data.collate_ranking import RankingCollate
from gr.data.dataset import Dataset
from gr.data.history_batches import UserBatches
from gr.data.loader import ResumableLoader
from gr.data.tabular import TabularDataset
from gr.data.tabular_pass import TabularPass
from gr.dist import World
from gr.errors import DataError
from gr.experiment import embed, predict, recommend, train
from gr.models.saved_click import SavedClick
from gr.models.saved_ranking import SavedRanking
from gr.models.saved_retrieval import SavedRetrieval
from gr.recipes.base import Request
from tests.support.own_log import prepared, random_log
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_config
from tests.support.tiny_histories import tiny_ranking_config
from tests.support.tiny_tabular import tiny_click_config

SIZES = (1, 2, 4)
COLUMNS: dict[str, Any] = {"user": "user", "item": "item", "time": "when", "time_unit": "s"}
LOG = random_log().sort_values("when", kind="stable").reset_index(drop=True)
COUNTRIES = pd.DataFrame({"user": [f"user {each:02}" for each in range(57)]}).assign(
    country=lambda table: table.index % 4, age=lambda table: table.index / 8
)


def trained(world: World, config: RunConfig) -> None:
    train(config, world)


def predicted(world: World, config: RunConfig, file: Path, out: Path) -> dict[str, int]:
    return predict(config, resolve(config.run_dir), world, file, out)


def refused(world: World, config: RunConfig, file: Path, out: Path) -> str:
    with pytest.raises(DataError) as error:
        predicted(world, config, file, out)
    return str(error.value)


def same_on_any_number_of_ranks(config: RunConfig, rows: pd.DataFrame, folder: Path) -> pa.Table:
    """The predictions, whose other columns are those of the rows."""
    rows.to_parquet(folder / "rows.parquet", index=False, row_group_size=7)
    tables = []
    for size in SIZES:
        out = folder / f"{size}.parquet"
        counts = run_ranks(predicted, size, config, folder / "rows.parquet", out)
        assert all(each == counts[0] for each in counts) and counts[0]["rows"] == len(rows)
        tables.append(pq.read_table(out))
    scores = [name for name in tables[0].column_names if name.startswith("score")]
    given = pq.read_table(folder / "rows.parquet")
    for table in tables:
        assert table.column_names == [*given.column_names, *scores] and table.drop(scores).equals(given)
        for name in scores:
            mine, first = (each[name].to_numpy(zero_copy_only=False) for each in (table, tables[0]))
            assert np.allclose(mine, first, atol=1e-6, rtol=0, equal_nan=True)
    return tables[0]


@pytest.fixture(scope="module")
def click(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("click")
    options = {"label": "like", "values": ("watched",), "features": ("shop",), "user_features": COUNTRIES}
    data = prepared(folder / "data", LOG, **COLUMNS, **options)
    config = tiny_click_config(data, folder / "run", trainer={"steps": 3}, evaluation={"path": str(data)})
    run_ranks(trained, 1, config)
    return config


def test_click_predictions_are_the_logits_of_evaluation(click: RunConfig, tmp_path: Path) -> None:
    rows = LOG.merge(COUNTRIES, on="user").sort_values("when", kind="stable")
    table = same_on_any_number_of_ranks(click, rows, tmp_path)
    saved = gr.load(click.run_dir)
    assert isinstance(saved, SavedClick)
    data = TabularDataset.open(click.evaluation.path)
    expected = []
    with ResumableLoader(TabularPass(data, global_batch_size=64, rank=0, world_size=1, drop_last=False)) as loader:
        for batch in loader:
            with torch.no_grad():
                expected.append(saved.model(batch.dense_BN, batch.sparse).sigmoid().numpy())
    assert np.allclose(table["score"].to_numpy(), np.concatenate(expected), atol=1e-6, rtol=0)
    assert np.allclose(saved.score(rows), table["score"].to_numpy(), atol=1e-6, rtol=0)
    assert len(saved.score(rows[:0])) == 0
    assert np.allclose(saved.score(pa.Table.from_pandas(rows[:7])), table["score"].to_numpy()[:7], atol=1e-6, rtol=0)


@pytest.mark.parametrize("count", [0, 1, 3, 101])
def test_any_number_of_rows(click: RunConfig, tmp_path: Path, count: int) -> None:
    """Also none, fewer than ranks, and values that training did not see; with categories as pandas writes them."""
    rows = LOG.merge(COUNTRIES, on="user")[:count].astype({"item": "category"})
    rows.loc[rows.index[:1], ["user", "shop"]] = ["a stranger", None]
    table = same_on_any_number_of_ranks(click, rows, tmp_path)
    scores = table["score"].to_numpy()
    assert len(scores) == count and (scores > 0).all() and (scores < 1).all()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"shop": None}, "rows.parquet, rows from 0: has no column shop; it has user"),
        ({"watched": "x"}, "string, wanted numbers"),
        ({"watched": np.inf}, "column watched: is inf, not a finite number"),
        ({"country": "x"}, "string cannot be looked up, these are whole numbers"),
        ({"item": 5}, "item: values of type int64 cannot be looked up, these are text"),
        ({"score": 1.0}, "the input has a column score already; rename it"),
    ],
)
def test_rows_that_are_refused(click: RunConfig, tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    rows = LOG.merge(COUNTRIES, on="user")[:9].assign(**change)
    rows = rows.drop(columns=[name for name, value in change.items() if value is None])
    pq.write_table(pa.Table.from_pandas(rows, preserve_index=False), tmp_path / "rows.parquet")
    (said,) = run_ranks(refused, 1, click, tmp_path / "rows.parquet", tmp_path / "out.parquet")
    assert fault in said and "\n" not in said, said
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]


def test_the_row_of_a_refusal_is_that_of_the_file(click: RunConfig, tmp_path: Path) -> None:
    """Row 75 is the 12th of the third batch of 32."""
    rows = LOG.merge(COUNTRIES, on="user")[:120].reset_index(drop=True)
    rows.loc[75, "watched"] = np.inf
    rows.to_parquet(tmp_path / "rows.parquet", index=False, row_group_size=50)
    (said,) = run_ranks(refused, 1, click, tmp_path / "rows.parquet", tmp_path / "out.parquet")
    assert said.startswith(f"{tmp_path / 'rows.parquet'}, rows from 64: row 11, column watched: is inf")


def test_a_column_twice_is_refused(click: RunConfig, tmp_path: Path) -> None:
    table = pa.Table.from_pandas(LOG.merge(COUNTRIES, on="user")[:9], preserve_index=False)
    pq.write_table(table.append_column("item", table.column("item")), tmp_path / "rows.parquet")
    (said,) = run_ranks(refused, 1, click, tmp_path / "rows.parquet", tmp_path / "out.parquet")
    assert said == f"{tmp_path / 'rows.parquet'}: has more than one column item; rename all but one"


@pytest.fixture(scope="module", params=["all", "candidates"])
def ranking(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path, Any]:
    """Trained with events held out; histories without each user's newest event; and those events, as rows."""
    folder = tmp_path_factory.mktemp("ranking")
    options = {"actions": ("like", "share"), "values": ("watched",), "features": ("shop",), "user_features": COUNTRIES}
    data = prepared(folder / "data", LOG, **COLUMNS, **options)
    newest = LOG.groupby("user").tail(1).sort_values("user")
    past = prepared(folder / "past", LOG.drop(newest.index), **COLUMNS, **options, vocabulary=data)
    task = {**tiny_ranking_config().task.model_dump(), "supervision": request.param}
    config = tiny_ranking_config(data, folder / "run", trainer={"steps": 3}, task=task)
    run_ranks(trained, 1, config)
    rows = newest.rename(columns={"user": "user_id", "item": "item_id", "when": "timestamp"})
    return config, past, rows[["user_id", "item_id", "timestamp", "shop"]]


def at(config: RunConfig, path: Path) -> RunConfig:
    evaluation = config.evaluation.model_copy(update={"path": str(path)})  # type: ignore[attr-defined]
    return config.model_copy(update={"evaluation": evaluation})


def test_ranking_predictions_are_those_of_evaluation(ranking: tuple[RunConfig, Path, Any], tmp_path: Path) -> None:
    """Of each user's newest event, from the history before it."""
    config, past, rows = ranking
    table = same_on_any_number_of_ranks(at(config, past), rows, tmp_path)
    saved = gr.load(config.run_dir)
    assert isinstance(saved, SavedRanking)
    data = Dataset.open(config.data.path)
    collate = RankingCollate(data.schema, config.data, config.task)
    batches = UserBatches(
        data,
        config.data,
        lambda each: collate.newest(each, newest=1, before=0),
        columns=collate.columns,
        global_batch_size=16,
        rank=0,
        world_size=1,
    )
    with torch.no_grad():
        outputs_BC = torch.cat([saved.model(batch) for batch in batches]).numpy()
    assert len(outputs_BC) == len(rows) == 57, "users are in ascending order in both"
    names = ["score_like", "score_share", "score_watched"]
    expected = [1 / (1 + np.exp(-outputs_BC[:, 0])), 1 / (1 + np.exp(-outputs_BC[:, 1])), outputs_BC[:, 2]]
    for name, values in zip(names, expected, strict=True):
        assert np.allclose(table[name].to_numpy(), values, atol=1e-5, rtol=0), name
    assert len(saved.score(rows[:0], past)["like"]) == 0
    scored = saved.score(rows, past)
    for name, values in zip(("like", "share", "watched"), expected, strict=True):
        assert np.allclose(scored[name], values, atol=1e-5, rtol=0)


def test_users_and_items_that_are_not_known(ranking: tuple[RunConfig, Path, Any], tmp_path: Path) -> None:
    config, past, rows = ranking
    rows = rows[:5].drop(columns="timestamp").reset_index(drop=True)
    rows.loc[0, "item_id"], rows.loc[1, "user_id"], rows.loc[2, ["user_id", "shop"]] = "new", "new", [None, "new"]
    table = same_on_any_number_of_ranks(at(config, past), rows, tmp_path)
    assert table["score_like"].is_null().to_pylist() == [True, False, False, False, False]
    (counts,) = run_ranks(predicted, 1, at(config, past), tmp_path / "rows.parquet", tmp_path / "again.parquet")
    assert counts == {"rows": 5, "unknown_users": 2, "unknown_items": 1}
    for few in (0, 1):
        assert len(same_on_any_number_of_ranks(at(config, past), rows[3 : 3 + few], tmp_path)) == few
    saved = gr.load(config.run_dir)
    assert isinstance(saved, SavedRanking)
    assert np.isnan(saved.score(rows, past)["like"]).tolist() == [True, False, False, False, False]


def test_times_of_candidates(ranking: tuple[RunConfig, Path, Any], tmp_path: Path) -> None:
    """Dates are the numbers that they stand for, a missing one is the newest event's, and none is before that."""
    config, past, rows = ranking
    saved = gr.load(config.run_dir)
    assert isinstance(saved, SavedRanking)
    expected = saved.score(rows, past)["like"]
    dates = pd.to_datetime(rows.timestamp, unit="s").dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo")
    assert np.array_equal(saved.score(rows.assign(timestamp=dates), past)["like"], expected)
    missing, without = (
        saved.score(each, past)["like"]
        for each in (rows.assign(timestamp=pd.array([None] * 57, dtype="Int64")), rows.drop(columns="timestamp"))
    )
    assert np.array_equal(missing, without)
    with pytest.raises(DataError, match=r"row 3, column timestamp: 5 s is before the user's newest event"):
        saved.score(rows.assign(timestamp=np.where(np.arange(57) == 3, 5, rows.timestamp)), past)
    with pytest.raises(DataError, match="wanted integers or datetimes"):
        saved.score(rows.assign(timestamp="x"), past)
    other = prepared(
        tmp_path / "other", LOG, **COLUMNS, actions=("like", "share"), values=("watched",), features=("shop",)
    )
    with pytest.raises(DataError, match=r"differ in contextual|other vocabularies of country"):
        saved.score(rows, other)


def embedded(world: World, config: RunConfig, folder: Path) -> dict[str, int]:
    return embed(config, resolve(config.run_dir), world, folder)


def recommended(world: World, config: RunConfig, out: Path) -> dict[str, int]:
    return recommend(config, resolve(config.run_dir), world, out, Request(k=43))


def test_vectors_score_as_recommend_does(tmp_path: Path) -> None:
    data = prepared(tmp_path / "data", LOG, **COLUMNS)
    config = tiny_config(data, tmp_path / "run", trainer={"steps": 3}, evaluation={"filter_seen": "none"})
    run_ranks(trained, 1, config)
    vectors = []
    for size in SIZES:
        counts = run_ranks(embedded, size, config, tmp_path / f"{size}")
        assert counts == [{"items": 43, "users": 57}] * size
        assert sorted(path.name for path in (tmp_path / f"{size}").iterdir()) == ["items.parquet", "users.parquet"]
        tables = [pq.read_table(tmp_path / f"{size}" / f"{name}.parquet") for name in ("items", "users")]
        vectors.append([dict(zip(*each.to_pydict().values(), strict=True)) for each in tables])
    for items, users in vectors[1:]:
        for mine, first in ((items, vectors[0][0]), (users, vectors[0][1])):
            assert list(mine) == list(first) and np.allclose([*mine.values()], [*first.values()], atol=1e-5, rtol=0)
    run_ranks(recommended, 1, config, tmp_path / "top.parquet")
    items, users = vectors[0]
    rows = pq.read_table(tmp_path / "top.parquet").to_pylist()
    assert len(rows) == 43 * 57
    dots = [np.dot(items[row["item_id"]], users[row["user_id"]]) for row in rows]
    assert np.allclose(dots, [row["score"] for row in rows], atol=1e-4, rtol=0)
    saved = gr.load(config.run_dir)
    assert isinstance(saved, SavedRetrieval)
    own = saved.embed_items()
    assert own.ids.to_pylist() == list(items) and np.allclose(own.vectors_KD, [*items.values()], atol=1e-5)
    histories = [LOG[LOG.user == user]["item"].tolist() for user in users]
    assert np.allclose(saved.embed_users(histories), [*users.values()], atol=1e-5)
    assert np.allclose(
        saved.score(histories[:2], ["item 05", "item 01"])[1, 0],
        np.dot(items["item 05"], [*users.values()][1]),
        atol=1e-4,
    )
