"""Chosen features, shared tables, and tables of another dtype and optimizer: the same losses on 1 and 2 gloo ranks."""

import json
from pathlib import Path

import pytest

from gr.config import RunConfig
from gr.dist import World
from gr.experiment import train
from gr.schema import SparseColumn
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_config, write_groups
from tests.support.tiny_histories import tiny_ranking_config, write_twins
from tests.support.tiny_tabular import COLUMNS, tiny_click_config, write_tiny_tabular

STEPS = 6


def ranking(folder: Path, run_dir: Path, sharding: str) -> RunConfig:
    tables = {
        "favourite": {"table": "category"},
        "last_item": {"table": "item_id"},
        "category": {"dtype": "fp16", "optimizer": {"kind": "rowwise_adagrad", "lr": 0.02}},
    }
    return tiny_ranking_config(
        folder, run_dir, trainer={"steps": STEPS}, embeddings={"tables": tables}, planner={"sharding": sharding}
    )


def click(folder: Path, run_dir: Path, sharding: str) -> RunConfig:
    tables = {"c2": {"table": "c4"}, "c1": {"dtype": "fp16"}, "c4": {"optimizer": {"kind": "sgd", "lr": 0.1}}}
    return tiny_click_config(
        folder,
        run_dir,
        model={"features": ["i1", "i3", "c1", "c2", "c4"]},
        trainer={"steps": STEPS},
        embeddings={"tables": tables},
        planner={"sharding": sharding},
    )


def retrieval(folder: Path, run_dir: Path, sharding: str) -> RunConfig:
    return tiny_config(
        folder,
        run_dir,
        model={"features": ["group"]},
        trainer={"steps": STEPS},
        embeddings={"tables": {"group": {"optimizer": {"kind": "sgd", "lr": 0.1}}}},
        planner={"sharding": sharding},
    )


def write_rows(folder: Path) -> None:
    write_tiny_tabular(folder, columns=(*COLUMNS, SparseColumn(name="c4", cardinality=64)))


KINDS = {"ranking": (ranking, write_twins), "click": (click, write_rows), "retrieval": (retrieval, write_groups)}


def run(world: World, config: RunConfig) -> None:
    train(config, world)


def losses(run_dir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["row_wise", "table_wise", "data_parallel"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_any_plan_on_two_ranks(tmp_path: Path, kind: str, sharding: str) -> None:
    configure, write = KINDS[kind]
    write(tmp_path / "data")
    for ranks, chosen in ((1, "auto"), (2, sharding)):
        run_ranks(run, ranks, configure(tmp_path / "data", tmp_path / f"run-{ranks}", chosen))
    alone = losses(tmp_path / "run-1")
    assert sorted(alone) == list(range(1, STEPS + 1))
    assert losses(tmp_path / "run-2") == pytest.approx(alone, abs=1e-4)
