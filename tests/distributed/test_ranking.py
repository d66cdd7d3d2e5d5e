"""Generative ranking gives the same losses and metrics on 1, 2 and 4 gloo ranks, and resumes where it stopped."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gr.checkpoint import CheckpointFolder
from gr.config.ranking import RankingConfig
from gr.dist import World
from gr.experiment import evaluate, train
from tests.support.ranks import run_ranks
from tests.support.tiny_histories import tiny_ranking_config, write_histories

STEPS, HALF = 8, 4
LOSS = 2e-5
FORMS: dict[str, dict[str, Any]] = {
    "all": {},
    "candidates": {"task": "candidates", "data": {"cut": "uniform", "stochastic_length": {"selector": "weighted"}}},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_histories(folder)
    return folder


def configured(data: Path, run_dir: Path, form: str, sharding: str) -> RankingConfig:
    base, changes = tiny_ranking_config(), FORMS[form]
    return tiny_ranking_config(
        data,
        run_dir,
        planner={"sharding": sharding, "allow_state_per_shard": True},
        task={**base.task.model_dump(), "supervision": changes.get("task", "all")},
        data={**base.data.model_dump(), **changes.get("data", {}), "path": str(data)},
        checkpoint={"every": HALF, "keep_last": 9},
    )


def run(world: World, config: RankingConfig) -> dict[str, Any] | None:
    return train(config, world)


def losses(run_dir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


@pytest.fixture(scope="module", params=FORMS)
def alone(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    assert run_ranks(run, 1, configured(data, run_dir, request.param, "auto"))[0] is not None
    return request.param, run_dir


@pytest.mark.parametrize(
    ("size", "sharding"),
    [(2, "table_wise"), (2, "row_wise"), (2, "column_wise"), (2, "data_parallel"), (4, "row_wise"), (4, "table_wise")],
)
def test_any_plan_on_any_ranks(data: Path, tmp_path: Path, alone: tuple[str, Path], size: int, sharding: str) -> None:
    form, plain = alone
    report = run_ranks(run, size, configured(data, tmp_path / "run", form, sharding))[0]
    expected = losses(plain)
    assert sorted(expected) == list(range(1, STEPS + 1))
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=LOSS)
    assert report["model"] == pytest.approx(json.loads((plain / "report.json").read_text())["model"], abs=1e-3)


@pytest.mark.parametrize("size", [1, 2])
def test_resuming_repeats_the_losses(data: Path, tmp_path: Path, alone: tuple[str, Path], size: int) -> None:
    form, plain = alone
    name = CheckpointFolder(plain / "checkpoints").final(HALF).name
    shutil.copytree(plain / "checkpoints" / name, tmp_path / "run/checkpoints" / name)
    run_ranks(run, size, configured(data, tmp_path / "run", form, "row_wise"))
    expected = {step: loss for step, loss in losses(plain).items() if step > HALF}
    found = losses(tmp_path / "run")
    assert found == expected if size == 1 else found == pytest.approx(expected, abs=LOSS)


def evaluated(world: World, config: RankingConfig, checkpoint: Path) -> dict[str, float]:
    return evaluate(config, checkpoint, world, "test")["model"]


def test_evaluation_is_equal_on_any_ranks(data: Path, alone: tuple[str, Path]) -> None:
    form, plain = alone
    config = configured(data, plain, form, "auto")
    checkpoint = CheckpointFolder(plain / "checkpoints").final(STEPS)
    first, *others = [run_ranks(evaluated, size, config, checkpoint)[0] for size in (1, 2, 4)]
    assert first["like/examples"] > 100
    for other in others:
        assert other == pytest.approx(first, abs=1e-5)
