"""A click run on raw 64-bit ids, whose rows change hands, is one run at any number of ranks, and after a resume."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from gr.checkpoint import CheckpointFolder
from gr.checkpoint.apply import apply_deltas
from gr.checkpoint.delta import publish_delta
from gr.checkpoint.metadata import SafeReader
from gr.checkpoint.saved_rows import SavedRows
from gr.checkpoint.streaming import octets
from gr.config.click import ClickConfig
from gr.config.retrieval import RetrievalConfig
from gr.dist import World
from gr.experiment import predict, recommend, train
from gr.recipes.base import Request
from tests.support.ranks import RankError, run_ranks
from tests.support.raw_ids import ITEM, TAGS, raw_click_config, write_raw_clicks, write_raw_histories
from tests.support.tiny import tiny_config

STEPS, HALF = 32, 16
LOSS = 1e-6  # nats; losses are 0.6 to 1.4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("raw")
    write_raw_clicks(path / "train")
    write_raw_clicks(path / "later", rows=96, seed=1, start=1600)
    return path


def configured(folder: Path, name: str) -> ClickConfig:
    return raw_click_config(
        folder / "train",
        folder / name,
        trainer={"steps": STEPS},
        evaluation={"path": str(folder / "later")},
        checkpoint={"every": HALF, "keep_last": 9},
        planner={"tables": {"tags": "table_wise"}, "sharding": "row_wise"},
    )


@pytest.fixture(scope="module")
def one(folder: Path) -> ClickConfig:
    """The run on one rank."""
    config = configured(folder, "one")
    run_ranks(run, 1, config)
    return config


def run(world: World, config: ClickConfig) -> None:
    train(config, world)


def test_full_and_delta_is_full(one: ClickConfig, tmp_path: Path) -> None:
    """Rows changed hands meanwhile, so the map of ids changed too."""
    checkpoints = CheckpointFolder(Path(one.run_dir) / "checkpoints")
    delta, manifest = publish_delta(checkpoints.final(STEPS), HALF, tmp_path / "deltas")
    assert manifest.deleted["item"] > 0 and "tags/ids.seen" in manifest.rows
    apply_deltas(checkpoints.final(HALF), [delta], tmp_path / "full")
    applied, last = SavedRows(tmp_path / "full"), SavedRows(checkpoints.final(STEPS))
    assert applied.tensors.keys() == last.tensors.keys()
    assert all(octets(applied.read(name)).equal(octets(last.read(name))) for name in last.tensors)


def records(config: ClickConfig, kind: str) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if line["kind"] == kind}


def maps(config: ClickConfig) -> dict[str, Tensor]:
    """Raw ids and scores of both tables, as the last checkpoint has them."""
    tensors: dict[str, Tensor] = {}
    for name, ids, score in (("item", ITEM, torch.int32), ("tags", TAGS, torch.float32)):
        sets, ways = int(ids["rows"]) // int(ids["ways"]), int(ids["ways"])
        tensors |= {f"{name}/ids.raw_id": torch.zeros(sets, ways, dtype=torch.int64)}
        tensors |= {f"{name}/ids.score": torch.zeros(sets, ways, dtype=score)}
    tensors["tags/ids.seen"] = torch.zeros(24, 12, dtype=torch.uint8)
    path = CheckpointFolder(Path(config.run_dir) / "checkpoints").final(STEPS)
    dcp.load({"tables": tensors}, storage_reader=SafeReader(path), no_dist=True)
    return tensors


def assert_same_run(config: ClickConfig, one: ClickConfig) -> None:
    losses, expected = records(config, "train"), records(one, "train")
    for step, record in losses.items():
        assert record["loss"] == pytest.approx(expected[step]["loss"], abs=LOSS)
    for step, record in records(config, "ids").items():
        assert {**record, "time": 0} == {**records(one, "ids")[step], "time": 0}
    for name, tensor in maps(one).items():
        assert torch.equal(maps(config)[name], tensor), name


@pytest.mark.slow
def test_four_ranks_are_one(folder: Path, one: ClickConfig) -> None:
    config = configured(folder, "four")
    run_ranks(run, 4, config)
    assert len(records(config, "train")) == STEPS
    assert_same_run(config, one)
    evicted = sum(record["item/evicted"] for record in records(one, "ids").values())
    assert evicted > 128 / 2, "most rows change hands"
    reports = [json.loads((Path(each.run_dir) / "report.json").read_text()) for each in (one, config)]
    assert reports[0]["dynamic_ids"] == reports[1]["dynamic_ids"]
    assert reports[0]["model"] == pytest.approx(reports[1]["model"], abs=1e-5)


@pytest.mark.slow
def test_resumes_on_two_ranks_from_the_map_of_the_saved_step(folder: Path, one: ClickConfig) -> None:
    config = configured(folder, "two")
    first = CheckpointFolder(Path(one.run_dir) / "checkpoints").final(HALF)
    shutil.copytree(first, Path(config.run_dir) / "checkpoints" / first.name)
    run_ranks(run, 2, config)
    assert min(records(config, "train")) == HALF + 1
    assert_same_run(config, one)


@pytest.mark.slow
def test_a_table_grows_by_ways(folder: Path, one: ClickConfig) -> None:
    """On two ranks, from one: ids keep their rows, so the next step has the same loss, and evicts nobody."""
    first = CheckpointFolder(Path(one.run_dir) / "checkpoints").final(HALF)
    config = raw_click_config(
        folder / "train",
        folder / "grown",
        trainer={"steps": HALF + 2},
        checkpoint={"load_from": str(first)},
        planner={"tables": {"tags": "table_wise"}, "sharding": "row_wise"},
        tables={"item": {"ids": {**ITEM, "rows": 192, "ways": 12}}},
    )
    run_ranks(run, 2, config)
    assert records(config, "train")[HALF + 1]["loss"] == pytest.approx(
        records(one, "train")[HALF + 1]["loss"], abs=LOSS
    )
    counts, before = records(config, "ids")[HALF + 1], records(one, "ids")[HALF + 1]
    assert counts["item/hits"] == before["item/hits"] > 0
    assert before["item/evicted"] > counts["item/evicted"] == 0


@pytest.mark.slow
def test_predicts_rows_of_raw_ids(folder: Path, one: ClickConfig) -> None:
    """An id that has no row counts as any other without one; more ranks say the same."""
    rows = pq.read_table(folder / "later" / "part-00000.parquet")
    strange = pa.array([2**62 + place for place in range(len(rows))])
    pq.write_table(rows.set_column(rows.column_names.index("item"), "item", strange), folder / "strange.parquet")
    checkpoint = CheckpointFolder(Path(one.run_dir) / "checkpoints").final(STEPS)
    scores = []
    for ranks in (1, 2):
        run_ranks(_predict, ranks, one, checkpoint, folder / "strange.parquet", folder / f"scores-{ranks}.parquet")
        scores.append(pq.read_table(folder / f"scores-{ranks}.parquet")["score"].to_numpy())
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


@pytest.mark.slow
def test_a_resume_with_other_ways_is_refused(one: ClickConfig) -> None:
    changed = one.model_dump()
    changed["embeddings"]["tables"]["item"]["ids"]["ways"] = 16
    with pytest.raises(RankError, match=r"tables\.item\.ids has kind=dynamic sets=16 .* there, .* sets=8"):
        run_ranks(run, 1, ClickConfig.model_validate(changed))


def _predict(world: World, config: ClickConfig, checkpoint: Path, file: Path, out: Path) -> None:
    predict(config, checkpoint, world, file, out)


@pytest.mark.slow
def test_retrieval_recommends_raw_items(tmp_path: Path) -> None:
    """Of 60 items 42 have a row at once; candidates are given none, and two ranks answer as one does."""
    data, answers, losses = write_raw_histories(tmp_path / "data"), [], []
    for ranks in (1, 2):
        config = tiny_config(
            data,
            tmp_path / f"run-{ranks}",
            trainer={"steps": 6},
            embeddings={"tables": {"item_id": {"ids": {"kind": "dynamic", "rows": 48, "ways": 8}}}},
            evaluation={"baselines": ["popularity"]},
        )
        run_ranks(run, ranks, config)
        checkpoint = CheckpointFolder(Path(config.run_dir) / "checkpoints").final(6)
        run_ranks(_recommend, ranks, config, checkpoint, tmp_path / f"best-{ranks}.parquet")
        answers.append(pq.read_table(tmp_path / f"best-{ranks}.parquet"))
        losses.append([record["loss"] for record in records(config, "train").values()])
        assert records(config, "ids")[6]["item_id/hits"] > 0
    assert losses[0] == pytest.approx(losses[1], rel=LOSS)
    assert answers[0].drop_columns("score").equals(answers[1].drop_columns("score"))
    corpus = pq.read_table(data / "items.parquet")["item_id"].to_pylist()
    assert set(answers[0]["item_id"].to_pylist()) <= set(corpus)


def _recommend(world: World, config: RetrievalConfig, checkpoint: Path, out: Path) -> None:
    recommend(config, checkpoint, world, out, Request(k=3))
