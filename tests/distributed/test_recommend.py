"""Recommendations: the hit rate of evaluation to the last digit, and the same file on 1, 2 and 4 ranks."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from gr.checkpoint import resolve
from gr.config import RetrievalConfig
from gr.data.dataset import Dataset
from gr.data.history_batches import evaluation_batches
from gr.dist import World
from gr.errors import ConfigError, DataError
from gr.experiment import evaluate, recommend, train
from gr.models.saved import load
from gr.recipes.base import Request
from tests.support.own_log import prepared, random_log
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_config, write_tiny


def trained(world: World, config: RetrievalConfig) -> None:
    train(config, world)


def recommended(world: World, config: RetrievalConfig, out: Path, *request: Any) -> dict[str, int]:
    return recommend(config, resolve(config.run_dir), world, out, Request(*request))


def refused(world: World, config: RetrievalConfig, out: Path, *request: Any) -> str:
    with pytest.raises((ConfigError, DataError)) as error:
        recommended(world, config, out, *request)
    return str(error.value)


def evaluated(world: World, config: RetrievalConfig) -> dict[str, float]:
    return evaluate(config, resolve(config.run_dir), world, "test")["model"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RetrievalConfig:
    folder = tmp_path_factory.mktemp("recommend")
    config = tiny_config(write_tiny(folder / "data", users=97), folder / "run", trainer={"steps": 6})
    run_ranks(trained, 1, config)
    return config


def test_the_hit_rate_is_evaluation_s(config: RetrievalConfig, tmp_path: Path) -> None:
    (counts,) = run_ranks(recommended, 1, config, tmp_path / "top.parquet", 10, 1)
    rows = pq.read_table(tmp_path / "top.parquet")
    data = Dataset.open(config.data.path)
    newest: dict[int, int] = {}
    for index in range(len(data.row_groups)):
        group = data.read_row_group(index, ["user_id"])
        for user, start, stop in zip(group.columns["user_id"], group.offsets, group.offsets[1:], strict=False):
            if stop - start > 1:
                newest[int(user)] = int(group.columns["item_ids"][stop - 1])
    pairs = set(zip(rows.column("user_id").to_pylist(), rows.column("item_id").to_pylist(), strict=True))
    (metrics,) = run_ranks(evaluated, 1, config)
    assert counts["users"] == len(newest) and counts["users"] + counts["without_history"] == 97
    assert sum(pair in pairs for pair in newest.items()) / len(newest) == metrics["hr@10"]


def test_the_same_file_on_any_number_of_ranks(config: RetrievalConfig, tmp_path: Path) -> None:
    tables = []
    for ranks in (1, 2, 4):
        counts = run_ranks(recommended, ranks, config, tmp_path / f"{ranks}.parquet", 7, 0)
        assert all(each == counts[0] for each in counts)
        tables.append(pq.read_table(tmp_path / f"{ranks}.parquet"))
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"{n}.parquet" for n in (1, 2, 4) if n <= ranks]
    first = tables[0]
    assert first.column("place").to_pylist() == [*range(1, 8)] * (len(first) // 7)
    for table in tables[1:]:
        for name in ("user_id", "item_id", "place"):
            assert table.column(name).equals(first.column(name)), name
        assert np.allclose(table.column("score").to_numpy(), first.column("score").to_numpy(), atol=1e-5, rtol=0)


def test_scores_are_the_similarity_over_its_temperature(config: RetrievalConfig, tmp_path: Path) -> None:
    run_ranks(recommended, 1, config, tmp_path / "top.parquet", 60, 0)
    rows = pq.read_table(tmp_path / "top.parquet")
    user, first = rows.column("user_id")[0].as_py(), rows.slice(0, 40)
    assert config.task.l2_norm and set(first.column("user_id").to_pylist()) >= {user}
    model = load(config.run_dir).model
    batch = next(
        iter(
            evaluation_batches(
                Dataset.open(config.data.path),
                config.data,
                target_from_end=0,
                global_batch_size=1,
                filter_seen="none",
                rank=0,
                world_size=1,
            )
        )
    )
    assert batch.user_B is not None and int(batch.user_B[0]) == user
    mine = rows.filter(pc.equal(rows.column("user_id"), user))
    with torch.no_grad():
        items = model.item_vectors(torch.tensor(mine.column("item_id").to_pylist()))
        cosine = torch.nn.functional.cosine_similarity(model.queries(batch), items)
    expected = (cosine / config.task.temperature).numpy()
    assert np.allclose(mine.column("score").to_numpy(), expected, atol=1e-4, rtol=0)


def test_a_disk_that_is_full_leaves_no_file(
    config: RetrievalConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fault,) = run_ranks(refused, 1, config, Path("/dev/full/top.parquet"), 10, 0)
    assert fault.startswith("out=/dev/full/top.parquet: cannot be written: Not a directory")
    out = tmp_path / "folder"
    out.mkdir()  # the joined file cannot take this name
    faults = run_ranks(refused, 2, config, out, 10, 0)
    assert faults[0] == faults[1] and faults[0].startswith(f"out={out}: cannot be written: Is a directory")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_seen_items_are_not_recommended(config: RetrievalConfig, tmp_path: Path) -> None:
    run_ranks(recommended, 2, config, tmp_path / "top.parquet", 60, 0)
    rows = pq.read_table(tmp_path / "top.parquet")
    pairs = set(zip(rows.column("user_id").to_pylist(), rows.column("item_id").to_pylist(), strict=True))
    data = Dataset.open(config.data.path)
    seen = set()
    for index in range(len(data.row_groups)):
        group = data.read_row_group(index, ["user_id"])
        users = group.columns["user_id"].repeat(group.lengths_B)
        seen |= set(zip(users.tolist(), group.columns["item_ids"].tolist(), strict=True))
    assert pairs.isdisjoint(seen)
    assert len(pairs) + len(seen) == 97 * 60, "every item is either seen or recommended, where k is the corpus"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> RetrievalConfig:
    """Trained on a log whose users and items are text."""
    folder = tmp_path_factory.mktemp("own")
    data = prepared(folder / "data", random_log(), user="user", item="item", time="when", time_unit="s")
    config = tiny_config(data, folder / "run", trainer={"steps": 3}, evaluation={"filter_seen": "none"})
    run_ranks(trained, 1, config)
    return config


def listed(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_own_ids_of_listed_users_and_items_on_any_number_of_ranks(own: RetrievalConfig, tmp_path: Path) -> None:
    limits = {f"user {user:02}": 1 + user % 4 for user in range(0, 57, 5)} | {"nobody": 3}
    users = listed(tmp_path / "users", user_id=[*limits], k=[*limits.values()])
    allowed = [f"item {item:02}" for item in range(20, 31)]
    items = listed(tmp_path / "items", item_id=pa.array([*allowed, "nothing"]).dictionary_encode())
    tables = []
    for ranks in (1, 2, 4):
        counts = run_ranks(recommended, ranks, own, tmp_path / f"{ranks}.parquet", 2, 0, users, items)
        assert all(
            each == dict(rows=sum(limits.values()) - 3, users=12, without_history=0, unknown_users=1, unknown_items=1)
            for each in counts
        )
        tables.append(pq.read_table(tmp_path / f"{ranks}.parquet"))
    rows = tables[0].to_pydict()
    assert {user: rows["user_id"].count(user) for user in rows["user_id"]} | {"nobody": 3} == limits, "k of the file"
    assert set(rows["item_id"]) <= set(allowed)
    for table in tables[1:]:
        assert table.drop("score").equals(tables[0].drop("score"))
        assert np.allclose(table["score"].to_numpy(), tables[0]["score"].to_numpy(), atol=1e-5, rtol=0)


def test_the_popular_items_for_users_without_a_history(own: RetrievalConfig, tmp_path: Path) -> None:
    """By what training counted, without a score, where they are asked for; the same on any number of ranks."""
    users = listed(tmp_path / "users", user_id=["user 07", "nobody", "user 08"], k=[2, 9, 1])
    log = random_log().drop_duplicates(["user", "item", "when"]).sort_values(["user", "when"], kind="stable")
    fitted = log.groupby("user").head(-2)  # as items.parquet counts
    counts = fitted["item"].value_counts()
    popular = sorted(counts.index, key=lambda item: (-counts[item], item))[:3]
    rows = []
    for ranks in (1, 2, 4):
        out = tmp_path / f"{ranks}.parquet"
        run_ranks(
            recommended,
            ranks,
            own,
            out,
            3,
            0,
            listed(tmp_path / "u", user_id=["nobody", "user 07"]),
            None,
            "popularity",
        )
        rows.append([row for row in pq.read_table(out).to_pylist() if row["user_id"] == "nobody"])
    assert rows[0] == rows[1] == rows[2]
    assert [(row["item_id"], row["score"], row["place"]) for row in rows[0]] == [
        (item, None, place) for place, item in enumerate(popular, 1)
    ]
    run_ranks(recommended, 1, own, tmp_path / "nothing.parquet", 3, 0, users)
    assert set(pq.read_table(tmp_path / "nothing.parquet")["user_id"].to_pylist()) == {"user 07", "user 08"}


def test_a_loaded_model_recommends_the_same(own: RetrievalConfig, tmp_path: Path) -> None:
    user = "user 07"
    users = listed(tmp_path / "users", user_id=[user])
    run_ranks(recommended, 1, own, tmp_path / "top.parquet", 5, 0, users)
    rows = pq.read_table(tmp_path / "top.parquet")
    history = random_log().query("user == @user").sort_values("when", kind="stable")["item"].tolist()
    (best,) = load(own.run_dir).recommend([history], 5, filter_seen="none")
    assert [each.item for each in best] == rows["item_id"].to_pylist()
    assert np.allclose([each.score for each in best], rows["score"].to_numpy(), atol=1e-5)


def test_users_of_a_folder_without_vocabularies(config: RetrievalConfig, tmp_path: Path) -> None:
    """Their ids stand for themselves, and 0 is one of them; a null is nobody."""
    users = listed(tmp_path / "users", user_id=pa.array([0, 3, None, 4000], pa.int32()))
    (counts,) = run_ranks(recommended, 1, config, tmp_path / "top.parquet", 2, 0, users)
    assert counts["unknown_users"] == 2 and counts["users"] + counts["without_history"] == 2
    assert set(pq.read_table(tmp_path / "top.parquet")["user_id"].to_pylist()) == {0, 3}


@pytest.mark.parametrize(
    ("users", "items", "fault"),
    [
        ({"id": ["a"]}, None, "has no column user_id; it has id"),
        ({"user_id": [1]}, None, "values of type int64 cannot be looked up, these are text"),
        ({"user_id": ["user 07", "user 07"]}, None, "user_id user 07 is named twice"),
        ({"user_id": ["user 07"], "k": [0]}, None, "column k has values below 1"),
        ({"user_id": ["user 07"], "k": ["x"]}, None, "column k has type string, wanted integers"),
        ({"user_id": ["user 07"], "k": [12]}, {"item_id": ["item 20"]}, "k=12: 1 items may be recommended"),
        (None, {"item_id": ["nothing"]}, "items: names no item of the data"),
    ],
)
def test_lists_that_are_refused(own: RetrievalConfig, tmp_path: Path, users: Any, items: Any, fault: str) -> None:
    files = [
        None if columns is None else listed(tmp_path / name, **columns)
        for name, columns in (("users", users), ("items", items))
    ]
    (said,) = run_ranks(refused, 1, own, tmp_path / "top.parquet", 2, 0, *files)
    assert fault in said and "\n" not in said
    (tmp_path / "text").write_text("no Parquet")
    (said,) = run_ranks(refused, 1, own, tmp_path / "top.parquet", 2, 0, tmp_path / "text")
    assert "text: is no Parquet file; write it as one" in said
    assert not (tmp_path / "top.parquet").exists()
