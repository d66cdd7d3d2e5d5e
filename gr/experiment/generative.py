"""A generative ranking run: what users will do with an item, from the sequence of what they did."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from gr.batch import HistoryBatch
from gr.checkpoint import ModelState
from gr.checkpoint.layout import CONFIG
from gr.config import load_config
from gr.config.generative import GenerativeConfig, InterleavedInput
from gr.config.inventory import InventoryConfig
from gr.data.collate_ranking import RankingCollate
from gr.data.dataset import Dataset
from gr.data.loader import TrainLoader, UserBatches
from gr.data.stream import StreamLoader
from gr.dist import World
from gr.errors import CheckpointError, ConfigError, DataError
from gr.experiment.run import (
    Job,
    balance_of,
    best_step,
    check_history_world,
    counted,
    load_weights,
    run,
    sharded_model,
    without_plan,
)
from gr.files import write_json
from gr.metrics.progressive import ProgressiveMetrics
from gr.metrics.ranking import LifetimeMetrics, RankingMetrics
from gr.metrics.tasks import BinaryMetrics, MultiTaskMetrics
from gr.metrics.writers import MetricsWriter
from gr.models.generative import GenerativeRanker
from gr.planner.inventory import generative_inventory
from gr.planner.plan import Plan
from gr.schema import DataSchema, HistoryColumns
from gr.train import callbacks
from gr.train.module import TrainModule
from gr.train.objectives import GenerativeObjective
from gr.train.trainer import Callback

Split = Literal["validation", "test"]
NEWER_PARTS: dict[Split, int] = {"test": 0, "validation": 1}


@dataclass(frozen=True)
class Built:
    """A sharded model and the data it is for. plan: None where TorchRec's planner made it."""

    config: GenerativeConfig
    world: World
    train_data: Dataset
    evaluation_data: Dataset
    model: DistributedModelParallel
    inventory: InventoryConfig
    plan: Plan | None

    @property
    def first_task(self) -> str:
        return self.config.task.tasks[0].name


def meta_model(config: GenerativeConfig, schema: DataSchema) -> GenerativeRanker:
    """The model without storage."""
    with torch.device("meta"):
        return GenerativeRanker(config, schema)


def build(config: GenerativeConfig, world: World) -> Built:
    """Opens the data, plans, shards and fills the model with its initial weights."""
    check_history_world(config, world.size)
    train_data = Dataset.open(config.data.path)
    evaluation_data = Dataset.open(config.evaluation.path) if config.evaluation.path else train_data
    check_data(config, train_data, evaluation_data)
    schema = train_data.schema
    inventory = generative_inventory(config, schema)
    sharded, plan = sharded_model(meta_model(config, schema), inventory, config, world, config.model.dim)
    return Built(config, world, train_data, evaluation_data, sharded, inventory, plan)


def train(config: GenerativeConfig, world: World) -> dict[str, Any] | None:
    """Trains to config.trainer.steps, resuming where run_dir has a checkpoint; returns the final report.

    Returns None when the run was stopped by a signal.
    """
    built = build(config, world)
    objective = GenerativeObjective(config.task)
    schema = built.train_data.schema
    balance = balance_of(
        built.inventory,
        config,
        world,
        tokens=2 if isinstance(config.model.input, InterleavedInput) else 1,
        context=len(schema.contextual) + len(schema.contextual_numeric),
    )
    module = TrainModule(built.model, objective, config, world, balance)
    state = ModelState(module.dense, module.dense_optimizer, module.table_optimizer)
    loader = _loader(built)
    job = Job(
        config,
        built.plan,
        module,
        loader,
        state,
        callbacks=lambda writer, checkpointing: _callbacks(built, loader, objective, writer, checkpointing),
        check_saved=lambda saved, path: _check_saved(saved, path, config),
        report=lambda writer: _final_report(built, state, loader.counters(), writer),
    )
    return run(job, world)


def _check_saved(saved: GenerativeConfig, path: str, config: GenerativeConfig) -> None:
    if (saved.model, saved.task) != (config.model, config.task):
        raise CheckpointError(f"{path} is of another model or task (see `gr config diff`): use another run_dir")
    if saved.data.train_holdout != config.data.train_holdout:
        raise CheckpointError(
            f"{path} was trained with data.train_holdout={saved.data.train_holdout}, not "
            f"{config.data.train_holdout}: other events are held out. Use another run_dir"
        )
    if (saved.data.stream is None) != (config.data.stream is None):
        raise CheckpointError(f"{path} was trained {'without' if saved.data.stream is None else 'with'} data.stream")


def _loader(built: Built) -> TrainLoader | StreamLoader:
    config, world = built.config, built.world
    collate = RankingCollate(built.train_data.schema, config.data, config.task)
    size = config.trainer.global_batch_size
    if config.data.stream is None:
        return TrainLoader(
            built.train_data,
            config.data,
            seed=config.seed,
            global_batch_size=size,
            rank=world.rank,
            world_size=world.size,
            collate=collate,
        )
    stream = StreamLoader(
        built.train_data, config.data, collate, global_batch_size=size, rank=world.rank, world_size=world.size
    )
    if config.trainer.steps > len(stream):
        raise ConfigError(
            f"trainer.steps={config.trainer.steps}, but {config.data.path} has {len(stream)} batches of {size} users "
            f"for its one pass: set trainer.steps to {len(stream)} or fewer"
        )
    return stream


def _callbacks(
    built: Built,
    loader: TrainLoader | StreamLoader,
    objective: GenerativeObjective,
    writer: MetricsWriter | None,
    checkpointing: callbacks.Checkpointing,
) -> list[Callback]:
    config, first = built.config, built.first_task
    metrics = MultiTaskMetrics(
        config.task.tasks,
        built.world,
        lambda name: ProgressiveMetrics(name, built.world, window=config.evaluation.window),
    )
    shown = [f"{first}/{name}" for name in callbacks.progressive.SHOWN]
    chosen: list[Callback] = [
        callbacks.Progressive(objective, metrics, writer, every=config.trainer.log_every, shown=shown)
    ]
    if isinstance(loader, StreamLoader):
        chosen.append(
            callbacks.NextWindow(
                loader.starting_window,
                lambda window: _metrics(built, loader.window(window), lambda name: LifetimeMetrics(name, built.world)),
                writer,
                shown=shown,
            )
        )
    if config.evaluation.every:
        chosen.append(
            callbacks.Evaluation(
                lambda: evaluate_split(built, "validation"),
                checkpointing,
                writer,
                every=config.evaluation.every,
                select_by=f"{first}/auc",
                shown=[f"{first}/{name}" for name in ("auc", "ne")],
            )
        )
    return chosen


def evaluate_split(built: Built, split: Split) -> dict[str, float]:
    """Metrics of the predictions of a split, by task; the same at every world size. Collective."""
    config, world, data = built.config, built.world, built.evaluation_data
    collate = RankingCollate(data.schema, config.data, config.task)
    newest = config.evaluation.newest
    batches = UserBatches(
        data,
        config.data,
        partial(collate.newest, newest=newest, before=NEWER_PARTS[split] * newest),
        columns=collate.columns,
        global_batch_size=config.evaluation.global_batch_size,
        rank=world.rank,
        world_size=world.size,
    )
    return _metrics(built, batches, lambda name: RankingMetrics(name, world, grouped=True))


@torch.no_grad()
def _metrics(built: Built, batches: Iterable[HistoryBatch], binary: Callable[[str], BinaryMetrics]) -> dict[str, float]:
    metrics, model = MultiTaskMetrics(built.config.task.tasks, built.world, binary), built.model
    was_training = model.training
    model.eval()
    for batch in batches:
        here = batch.to(built.world.device)
        metrics.update(model(here), *here.targets())
    model.train(was_training)
    return metrics.compute()


def _final_report(
    built: Built, state: ModelState, counters: Mapping[str, int], writer: MetricsWriter | None
) -> dict[str, Any]:
    """Test metrics of the best checkpoint by validation, or of the last where there was none."""
    run_dir, world = Path(built.config.run_dir), built.world
    path, step = best_step(run_dir, state, world)
    report = _report(built, path, step, "test") | {"training_data": counted(counters, world)}
    if writer is not None:
        writer.write(step, "test", report["model"])
        write_json(run_dir / "report.json", report)
    return report


def _report(built: Built, checkpoint: Path, step: int, split: Split) -> dict[str, Any]:
    return {
        "kind": built.config.task.kind,
        "checkpoint": str(checkpoint),
        "step": step,
        "split": split,
        "data": str(built.evaluation_data.path),
        "tasks": [task.name for task in built.config.task.tasks],
        "model": evaluate_split(built, split) if _can_evaluate(built.config, split) else {},
    }


def _can_evaluate(config: GenerativeConfig, split: Split) -> bool:
    """Whether the events of the split were kept out of training, or are of other users."""
    needed = config.evaluation.newest * (1 + NEWER_PARTS[split])
    return not config.evaluates_training_users or config.data.train_holdout >= needed


def evaluate(config: GenerativeConfig, checkpoint: Path, world: World, split: Split) -> dict[str, Any]:
    """Metrics of a checkpoint on one split. Raises ConfigError when the split's events were trained on."""
    saved = load_config(checkpoint / CONFIG)
    assert isinstance(saved, GenerativeConfig), "the caller chose by the checkpoint's own configuration"
    _check_saved(saved, str(checkpoint), config)
    if not _can_evaluate(config, split):
        others = "other users with evaluation.path"
        remedy = f"the test split, or {others}" if _can_evaluate(config, "test") else others
        raise ConfigError(
            f"the {split} events were trained on (data.train_holdout={config.data.train_holdout}, evaluation.newest="
            f"{config.evaluation.newest}): evaluate {remedy}"
        )
    built = build(without_plan(config), world)
    step = load_weights(built.model, config, checkpoint, world)
    return _report(built, checkpoint, step, split)


def check_data(config: GenerativeConfig, train_data: Dataset, evaluation_data: Dataset) -> None:
    """Raises ConfigError or DataError when the model cannot read one of the data folders."""
    uses = {
        "data.stream": config.data.stream is not None,
        "model.tower.time_bias": getattr(config.model.tower, "time_bias", False),
        "model.time": config.model.time is not None,
    }
    for data in (train_data, evaluation_data):
        for name in (name for name, used in uses.items() if used):
            if not data.schema.timestamps:
                raise ConfigError(f"{name} is set, but {data.path} has no timestamps: unset it")
    mine, other = train_data.schema, evaluation_data.schema
    for name in ("item_cardinality", *HistoryColumns.model_fields):
        if getattr(mine, name) != getattr(other, name):
            raise DataError(
                f"{train_data.path} and {evaluation_data.path} differ in {name} (schema.json): prepare both alike"
            )
