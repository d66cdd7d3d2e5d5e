"""Recommendations: the hit rate of evaluation to the last digit, and the same file on 1, 2 and 4 ranks."""

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from gr.checkpoint import resolve
from gr.config import RetrievalConfig
from gr.data.dataset import Dataset
from gr.data.history_batches import evaluation_batches
from gr.dist import World
from gr.errors import ConfigError
from gr.experiment import evaluate, recommend, train
from gr.models.saved import load
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_config, write_tiny


def trained(world: World, config: RetrievalConfig) -> None:
    train(config, world)


def recommended(world: World, config: RetrievalConfig, out: Path, k: int, holdout: int) -> dict[str, int]:
    return recommend(config, resolve(config.run_dir), world, out, k=k, holdout=holdout)


def refused(world: World, config: RetrievalConfig, out: Path, k: int, holdout: int) -> str:
    with pytest.raises(ConfigError) as error:
        recommend(config, resolve(config.run_dir), world, out, k=k, holdout=holdout)
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
    model, _, _ = load(config.run_dir)
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
                users=True,
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
