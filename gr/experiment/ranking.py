"""A ranking run: DLRM on tabular data, in one pass, each example scored before it is trained on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from gr.checkpoint import ModelState
from gr.config.ranking import RankingConfig
from gr.data.tabular import TabularDataset
from gr.data.tabular_loader import TabularLoader
from gr.dist import World
from gr.errors import CheckpointError, ConfigError, DataError
from gr.experiment.run import Job, best_step, check_divisible, load_weights, run, sharded_model, without_plan
from gr.files import write_json
from gr.metrics.progressive import ProgressiveMetrics
from gr.metrics.ranking import RankingMetrics
from gr.metrics.writers import MetricsWriter
from gr.models.dlrm import DLRM, CategoricalFeature
from gr.planner.inventory import ranking_inventory
from gr.planner.plan import Plan
from gr.schema import TabularSchema
from gr.train import callbacks
from gr.train.module import TrainModule
from gr.train.objectives import RankingObjective
from gr.train.trainer import Callback


@dataclass(frozen=True)
class Built:
    """A sharded model and the data it is for. plan: None where TorchRec's planner made it."""

    config: RankingConfig
    world: World
    train_data: TabularDataset
    evaluation_data: TabularDataset | None
    model: DistributedModelParallel
    plan: Plan | None


@dataclass(frozen=True)
class _Feature:
    name: str
    rows: int


def meta_model(config: RankingConfig, schema: TabularSchema) -> DLRM:
    """The model without storage."""
    features: list[CategoricalFeature] = [_Feature(column.name, column.cardinality) for column in schema.sparse]
    with torch.device("meta"):
        return DLRM(config.model, features, len(schema.dense), config.embeddings)


def build(config: RankingConfig, world: World) -> Built:
    """Opens the data, plans, shards and fills the model with its initial weights."""
    check_world(config, world.size)
    train_data = TabularDataset.open(config.data.path)
    evaluation_data = TabularDataset.open(config.evaluation.path) if config.evaluation.path else None
    _check_data(train_data, evaluation_data)
    schema = train_data.schema
    inventory = ranking_inventory(config, schema)
    sharded, plan = sharded_model(meta_model(config, schema), inventory, config, world, config.model.dim)
    return Built(config, world, train_data, evaluation_data, sharded, plan)


def train(config: RankingConfig, world: World) -> dict[str, Any] | None:
    """Trains to config.trainer.steps, resuming where run_dir has a checkpoint; returns the final report.

    Returns None when the run was stopped by a signal.
    """
    built = build(config, world)
    objective = RankingObjective(config.task.loss)
    module = TrainModule(built.model, objective, config, world)
    state = ModelState(module.dense, module.dense_optimizer, module.table_optimizer)
    loader = TabularLoader(
        built.train_data,
        global_batch_size=config.trainer.global_batch_size,
        rank=world.rank,
        world_size=world.size,
        shuffle_seed=config.seed if config.data.shuffle else None,
    )
    if config.trainer.steps > len(loader):
        loader.close()
        raise ConfigError(
            f"trainer.steps={config.trainer.steps}, but {config.data.path} has {len(loader)} batches of "
            f"{config.trainer.global_batch_size} rows for its one pass: set trainer.steps to {len(loader)} or fewer"
        )
    job = Job(
        config,
        built.plan,
        module,
        loader,
        state,
        callbacks=lambda writer, checkpointing: _callbacks(built, objective, writer, checkpointing),
        check_saved=lambda saved, path: _check_saved(saved, path, config),
        report=lambda writer: _final_report(built, state, loader.counters(), writer),
    )
    return run(job, world)


def _check_saved(saved: RankingConfig, path: str, config: RankingConfig) -> None:
    if saved.model != config.model:
        raise CheckpointError(f"{path} is of another model (see `gr config diff`): use another run_dir")


def _callbacks(
    built: Built, objective: RankingObjective, writer: MetricsWriter | None, checkpointing: callbacks.Checkpointing
) -> list[Callback]:
    config = built.config
    every, window = config.trainer.log_every, config.evaluation.window
    metrics = ProgressiveMetrics("train", built.world, window=window)
    chosen: list[Callback] = [callbacks.Progressive(objective, metrics, writer, every=every)]
    if config.evaluation.every:
        chosen.append(
            callbacks.Evaluation(
                lambda: evaluate_data(built),
                checkpointing,
                writer,
                every=config.evaluation.every,
                select_by=None,  # it is scored on at the end, and one pass has nothing to select
                shown=("auc", "ne", "log_loss", "calibration"),
            )
        )
    return chosen


@torch.no_grad()
def evaluate_data(built: Built) -> dict[str, float]:
    """Metrics over every row of the evaluation data; the same at every world size. Collective."""
    data, world, model = built.evaluation_data, built.world, built.model
    assert data is not None, "checked by the configuration"
    was_training = model.training
    model.eval()
    metrics = RankingMetrics("evaluation", world)
    loader = TabularLoader(
        data,
        global_batch_size=built.config.evaluation.global_batch_size,
        rank=world.rank,
        world_size=world.size,
        drop_last=False,
    )
    with loader:
        for batch in loader:
            rows = min(built.config.evaluation.global_batch_size, data.rows - batch.first_example)
            here = len(batch.labels_B)
            batch = batch.padded(-(-rows // world.size), [column.hots for column in data.schema.sparse])
            batch = batch.to(world.device)
            logits_B = model(batch.dense_BN, batch.sparse)
            metrics.update(logits_B[:here], batch.labels_B[:here])
    model.train(was_training)
    return metrics.compute()


def _final_report(
    built: Built, state: ModelState, counters: Mapping[str, int], writer: MetricsWriter | None
) -> dict[str, Any]:
    """Metrics of the last checkpoint."""
    run_dir = Path(built.config.run_dir)
    path, step = best_step(run_dir, state, built.world)
    report = _report(built, path, step) | {"training_data": dict(counters)}
    if writer is not None:
        if report["model"]:
            writer.write(step, "test", report["model"])
        write_json(run_dir / "report.json", report)
    return report


def _report(built: Built, checkpoint: Path, step: int) -> dict[str, Any]:
    metrics = evaluate_data(built) if built.evaluation_data is not None else {}
    return {
        "kind": "ranking",
        "checkpoint": str(checkpoint),
        "step": step,
        "data": built.config.evaluation.path,
        "model": metrics,
    }


def evaluate(config: RankingConfig, checkpoint: Path, world: World) -> dict[str, Any]:
    """Metrics of a checkpoint on evaluation.path. Raises ConfigError where there is none."""
    if config.evaluation.path is None:
        raise ConfigError("evaluation.path is unset: name the data folder to evaluate on, evaluation.path=PATH")
    built = build(without_plan(config), world)
    step = load_weights(built.model, config, checkpoint, world)
    return _report(built, checkpoint, step)


def _check_data(train_data: TabularDataset, evaluation_data: TabularDataset | None) -> None:
    """Raises DataError where the model of one folder cannot read the other: other columns, ids or dense features."""
    if evaluation_data is None:
        return
    a, b = train_data.schema, evaluation_data.schema
    for name in ("labels", "dense", "transform", "sparse"):
        if getattr(a, name) != getattr(b, name):
            raise DataError(
                f"{train_data.path} and {evaluation_data.path} differ in {name} (schema.json): prepare both with the "
                "same columns, transform and vocabulary (as `gr prepare criteo --vocabulary` does)"
            )


def check_world(config: RankingConfig, world_size: int) -> None:
    """Raises ConfigError when the batches cannot be dealt evenly to `world_size` ranks."""
    sizes = {
        "trainer.global_batch_size": config.trainer.global_batch_size,
        "evaluation.global_batch_size": config.evaluation.global_batch_size,
    }
    check_divisible(sizes, world_size)
