"""The click experiment on one rank: initial values, what is refused before anything is written, and the report."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gr.checkpoint import resolve
from gr.dist import World
from gr.errors import CheckpointError, ConfigError, DataError
from gr.experiment import Built, build, evaluate, train
from gr.models import build_model
from gr.parallel.dense import dense_parameters
from gr.recipes.base import open_recipe
from gr.schema import SparseColumn, TabularSchema
from gr.status import read_status
from tests.support.run_folder import reason_alone
from tests.support.tiny_tabular import COLUMNS, tiny_click_config, write_tiny_tabular


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_tiny_tabular(tmp_path / "data")


@pytest.fixture
def test_rows(tmp_path: Path) -> Path:
    return write_tiny_tabular(tmp_path / "test", rows=50, seed=1)


def dense_of(built: Built) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in dense_parameters(built.model).items()}


def test_the_model_is_of_the_schema(data: Path, tmp_path: Path) -> None:
    model = build_model(tiny_click_config(data, tmp_path / "run"), TabularSchema.load(data))
    assert model.features == ["c1", "c2", "c3"]
    assert [config.num_embeddings for config in model.tables.embedding_bag_configs()] == [41, 64, 23]
    assert all(parameter.is_meta for parameter in model.parameters())


def test_the_seed_decides_the_initial_values(data: Path, tmp_path: Path, alone: World) -> None:
    first, again, other = (
        dense_of(build(open_recipe(tiny_click_config(data, tmp_path / "run", seed=seed)), alone)) for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("init", ["normal", "uniform"])
def test_a_built_model_has_the_initial_values_of_its_layers(
    data: Path, tmp_path: Path, alone: World, init: str
) -> None:
    """Normal of variance 2 / (in + out) as published, or within 1/sqrt(in) as torch.nn.Linear."""
    layers = {"bottom": [400, 8], "top": [300, 1], "mlp_init": init}
    weights = dense_of(build(open_recipe(tiny_click_config(data, tmp_path / "run", model=layers)), alone))
    weight = next(w for name, w in weights.items() if w.shape == (8, 400))
    std = (2 / 408) ** 0.5 if init == "normal" else (1 / 400 / 3) ** 0.5
    assert float(weight.std()) == pytest.approx(std, rel=0.05)
    assert (float(weight.abs().max()) <= 400**-0.5) == (init == "uniform")


@pytest.mark.parametrize("world_size", [5, 16])
def test_batches_that_cannot_be_dealt_evenly(data: Path, tmp_path: Path, world_size: int) -> None:
    config = tiny_click_config(data, tmp_path / "run")
    config.check_ranks(8)
    with pytest.raises(ConfigError, match=rf"^trainer.global_batch_size=24 is not divisible by the {world_size} ranks"):
        config.check_ranks(world_size)
    evaluated = tiny_click_config(data, tmp_path / "run", evaluation={"global_batch_size": 9})
    with pytest.raises(ConfigError, match=r"^evaluation.global_batch_size=9 is not divisible by the 8 ranks"):
        evaluated.check_ranks(8)


def test_more_steps_than_the_pass_has_batches(data: Path, tmp_path: Path, alone: World) -> None:
    config = tiny_click_config(data, tmp_path / "run", trainer={"steps": 13})
    with pytest.raises(
        ConfigError, match=r"^trainer.steps=13, but .* has 12 batches of 24 rows for its one pass: set .* or"
    ):
        train(config, alone)
    assert reason_alone(tmp_path / "run")


@pytest.mark.slow
def test_epochs_in_place_of_steps(data: Path, tmp_path: Path, alone: World) -> None:
    """Two epochs are twice the steps of a pass; status.json says how many; stopping and resuming changes nothing."""
    trainer = {"steps": None, "epochs": 2}
    config = tiny_click_config(data, tmp_path / "run", trainer=trainer, checkpoint={"every": 18, "keep_last": 2})
    report = train(config, alone)
    status = read_status(tmp_path / "run")
    assert report is not None and report["step"] == 24
    assert (status.state, status.step, status.steps) == ("done", 24, 24)
    middle = str(tmp_path / "run/checkpoints/step-00000018")
    resumed = tiny_click_config(data, tmp_path / "resumed", trainer=trainer, checkpoint={"load_from": middle})
    assert train(resumed, alone) is not None
    one, other = (losses(tmp_path / name) for name in ("run", "resumed"))
    assert len(one) == 24 and one[18:] == other
    assert sum(one[12:]) < sum(one[:12])


def losses(run_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_a_batch_larger_than_the_data(data: Path, tmp_path: Path, alone: World) -> None:
    config = tiny_click_config(data, tmp_path / "run", trainer={"global_batch_size": 294})
    with pytest.raises(ConfigError, match="293 rows do not fill one batch of 294"):
        train(config, alone)


def _wider(schema: TabularSchema) -> dict[str, object]:
    return {"sparse": [*schema.sparse[:2], SparseColumn(name="c3", cardinality=99)]}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("sparse", _wider),
        ("transform", lambda schema: {"transform": schema.transform.model_copy(update={"name": "torchrec_minshift"})}),
        ("dense", lambda schema: {"dense": ["i2", "i1", "i3"]}),
    ],
)
def test_evaluation_data_that_mean_something_else(
    data: Path, test_rows: Path, tmp_path: Path, alone: World, name: str, change: Callable
) -> None:
    schema = TabularSchema.load(test_rows)
    schema.model_copy(update=change(schema)).save(test_rows)
    config = tiny_click_config(data, tmp_path / "run", evaluation={"path": str(test_rows)})
    with pytest.raises(DataError) as caught:
        train(config, alone)
    said = f"{data} and {test_rows} differ in {name} (schema.json): prepare both with the same columns"
    assert str(caught.value).startswith(said)
    assert reason_alone(tmp_path / "run")


def test_a_run_without_data_to_evaluate_on(data: Path, tmp_path: Path, alone: World) -> None:
    """The rows left over are told, and there are prequential metrics of each step."""
    config = tiny_click_config(data, tmp_path / "run", trainer={"steps": 3}, evaluation={"window": 24})
    report = train(config, alone)
    assert report is not None
    assert (report["model"], report["data"], report["step"]) == ({}, None, 3)
    assert report["training_data"] == {"dropped_examples": 293 % 24}
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["examples"] for line in lines if line["kind"] == "prequential"] == [24, 24, 24]
    with pytest.raises(ConfigError, match=r"^evaluation.path is unset: name the data folder to evaluate on"):
        evaluate(config, resolve(tmp_path / "run"), alone, "test")


def test_the_report_is_of_the_last_checkpoint(data: Path, test_rows: Path, tmp_path: Path, alone: World) -> None:
    """Also where an earlier one scored better on the data it is reported on; evaluate agrees with the report."""
    config = tiny_click_config(
        data,
        tmp_path / "run",
        evaluation={"path": str(test_rows), "every": 2},
        optimizer={"kind": "adamw", "lr": 0.3},
        seed=2,
        checkpoint={"keep_last": 1},
    )
    report = train(config, alone)
    assert report is not None
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["auc"] for line in lines if line["kind"] == "validation"}
    assert sorted(scores) == [0, 2, 4, 6, 8, 10, 12]
    assert report["step"] == 12 and scores[12] < max(scores.values())
    assert scores[12] == report["model"]["auc"]
    assert evaluate(config, resolve(tmp_path / "run"), alone, "test")["model"] == report["model"]


def test_evaluation_leaves_the_model_as_it_was(data: Path, test_rows: Path, tmp_path: Path, alone: World) -> None:
    built = build(open_recipe(tiny_click_config(data, tmp_path / "run", evaluation={"path": str(test_rows)})), alone)
    before = {name: weight.clone() for name, weight in dense_of(built).items()}
    built.model.train()
    first, second = (built.recipe.evaluate(built.model, alone, "test").metrics for _ in range(2))
    assert first == second and first["examples"] == 50
    assert built.model.training
    assert all(torch.equal(weight, before[name]) for name, weight in dense_of(built).items())


def test_shuffled_rows_are_another_order_and_resume(data: Path, tmp_path: Path, alone: World) -> None:
    """And file order is another pass: a checkpoint of the one is refused by the other."""

    def config(name: str, steps: int, shuffle: bool):
        run_dir = tmp_path / name
        return tiny_click_config(data, run_dir, data={"shuffle": shuffle}, trainer={"steps": steps})

    def losses(name: str) -> list[float]:
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if line["kind"] == "train"]

    for name, steps, shuffle in (("ordered", 4, False), ("whole", 4, True), ("halves", 2, True), ("halves", 4, True)):
        assert train(config(name, steps, shuffle), alone) is not None
    assert losses("whole") == losses("halves") != losses("ordered")
    with pytest.raises(CheckpointError, match="the checkpoint's pass over the data has shuffle_seed="):
        train(config("halves", 6, False), alone)


def test_columns_of_many_ids(tmp_path: Path) -> None:
    assert [column.hots for column in COLUMNS] == [1, 3, 1], "what the distributed tests rely on"


def test_data_without_dense_columns(tmp_path: Path, alone: World) -> None:
    data = write_tiny_tabular(tmp_path / "data", dense=())
    config = tiny_click_config(data, tmp_path / "run", model={"bottom": None}, evaluation={"path": str(data)})
    report = train(config, alone)
    assert report is not None and evaluate(config, resolve(tmp_path / "run"), alone, "test")
    with pytest.raises(
        ConfigError, match=r"model.bottom=\[12, 8\] has nothing to read, as there are no dense features"
    ):
        build(open_recipe(tiny_click_config(data, tmp_path / "other")), alone)
    with pytest.raises(ConfigError, match=r"^model.bottom=\[12, 8\] has nothing to read.*data/schema.json: dense\)$"):
        tiny_click_config(data, tmp_path / "other").inventory(TabularSchema.load(data))
