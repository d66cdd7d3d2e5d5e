"""A run from its configuration: the build sequence, training, evaluation.

schema -> model on meta -> plan -> shard tables -> replicate dense -> fill or load -> train module -> loader -> trainer
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel, get_unwrapped_module
from torchrec.distributed.types import ShardingPlan

from gr.checkpoint import CheckpointFolder, CheckpointStore, ModelState, load_state, resolve
from gr.checkpoint.layout import CONFIG, write_json
from gr.config import dump_config
from gr.config.tree import ExperimentConfig
from gr.data.dataset import Dataset
from gr.data.loader import TrainLoader, evaluation_batches
from gr.dist import World
from gr.embeddings import TableOptimizer, initialise_tables, shard_tables
from gr.errors import ConfigError, DataError
from gr.logging import get_logger
from gr.metrics.retrieval import retrieval_metrics
from gr.metrics.writers import MetricsWriter
from gr.models.baselines import evaluate_baselines
from gr.models.retrieval import RetrievalModel
from gr.planner import make_plan
from gr.tasks import CandidateSampler
from gr.train import callbacks
from gr.train.evaluate import user_ranks
from gr.train.module import TrainModule, dense_parameters
from gr.train.trainer import Callback, Trainer

log = get_logger(__name__)
Split = Literal["validation", "test"]
TARGET_FROM_END: dict[Split, Literal[1, 2]] = {"test": 1, "validation": 2}


@dataclass(frozen=True)
class Built:
    """A sharded model and the data it is for."""

    config: ExperimentConfig
    world: World
    train_data: Dataset
    evaluation_data: Dataset
    model: DistributedModelParallel
    plan: ShardingPlan

    @property
    def inner(self) -> RetrievalModel:
        return get_unwrapped_module(self.model)


def meta_model(config: ExperimentConfig, item_rows: int) -> RetrievalModel:
    """The model without storage."""
    with torch.device("meta"):
        return RetrievalModel(config, item_rows)


def build(config: ExperimentConfig, world: World) -> Built:
    """Opens the data, plans, shards and fills the model with its initial weights."""
    check_world(config, world.size)
    train_data = Dataset.open(config.data.path)
    evaluation_data = Dataset.open(config.evaluation.path) if config.evaluation.path else train_data
    check_data(config, train_data, evaluation_data)
    model = meta_model(config, train_data.schema.item_cardinality)
    plan = make_plan(model, config, world_size=world.size, local_size=world.local_size, device=world.device)
    sharded = shard_tables(model, plan, config.embeddings, world.device)
    initialise_tables(sharded, seed=config.seed, std=config.embeddings.init_std, dim=config.model.dim)
    initialise_dense(get_unwrapped_module(sharded), config.seed)
    return Built(config, world, train_data, evaluation_data, sharded, plan)


def initialise_dense(model: nn.Module, seed: int) -> None:
    """Initial dense weights from `seed` alone: sharding has used each rank's generator to a different extent."""
    torch.manual_seed(seed)
    # Children first: a layer has the last word on the linear maps in it.
    for name, module in reversed(list(model.named_modules())):
        if not name.startswith("tables") and hasattr(module, "reset_parameters"):
            module.reset_parameters()


def train(config: ExperimentConfig, world: World) -> dict[str, Any] | None:
    """Trains to config.trainer.steps, resuming where run_dir has a checkpoint; returns the final report.

    Returns None when the run was stopped by a signal before its last step.
    """
    run_dir = Path(config.run_dir)
    built = build(config, world)
    corpus_ids, corpus_counts = built.train_data.corpus()
    sampler = CandidateSampler(config.task, corpus_ids, corpus_counts, config.seed)
    module = TrainModule(built.model, sampler, config, world)
    config_yaml = dump_config(config)
    if world.is_main:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / CONFIG).write_text(config_yaml)
        except OSError as error:
            raise ConfigError(f"run_dir={run_dir} cannot be written: {error.strerror}; set another one") from error
    state = ModelState(module.dense, module.dense_optimizer, module.table_optimizer)
    store = CheckpointStore(
        run_dir / "checkpoints", state, config_yaml, world, asynchronous=config.checkpoint.asynchronous
    )
    loader = TrainLoader(
        built.train_data,
        config.data,
        seed=config.seed,
        global_batch_size=config.trainer.global_batch_size,
        rank=world.rank,
        world_size=world.size,
    )
    writer = MetricsWriter(run_dir) if world.is_main else None
    try:
        trainer = Trainer(module, loader, _callbacks(built, store, writer), world, steps=config.trainer.steps)
        trainer.step = _resume(config, state, loader)
        trainer.run()
        if trainer.stopped and trainer.step < trainer.steps:
            log.info("stopped after step %d; the same command resumes there", trainer.step)
            return None
        return final_report(built, store.folder, state, writer)
    finally:
        loader.close()
        if writer is not None:
            writer.close()


def _resume(config: ExperimentConfig, state: ModelState, loader: TrainLoader) -> int:
    """Loads run_dir's latest checkpoint, or else checkpoint.load_from; returns the steps done."""
    path = CheckpointFolder(Path(config.run_dir) / "checkpoints").latest()
    if path is None and config.checkpoint.load_from:
        path = resolve(config.checkpoint.load_from)
    if path is None:
        return 0
    progress = load_state(path, state)
    loader.load_state_dict(progress["data"])
    log.info("resumed from %s", path)
    return progress["step"]


def _callbacks(built: Built, store: CheckpointStore, writer: MetricsWriter | None) -> list[Callback]:
    config = built.config
    checkpointing = callbacks.Checkpointing(store, config.checkpoint)
    chosen: list[Callback] = [callbacks.Metrics(writer, config.trainer.log_every)]
    if config.trainer.profiler:
        chosen.append(callbacks.Profiler(config.trainer.profiler, Path(config.run_dir), built.world.rank))
    if config.evaluation.every:
        chosen.append(
            callbacks.Evaluation(
                lambda: retrieval_metrics(evaluate_ranks(built, "validation")),
                checkpointing,
                writer,
                every=config.evaluation.every,
                select_by=config.evaluation.select_by,
            )
        )
    return [*chosen, checkpointing]


def evaluate_ranks(built: Built, split: Split) -> np.ndarray:
    """Rank of each user's held-out item, float64 [users]; all ranks together."""
    batches = evaluation_batches(
        built.evaluation_data,
        built.config.data,
        target_from_end=TARGET_FROM_END[split],
        global_batch_size=built.config.evaluation.global_batch_size,
        filter_seen=built.config.evaluation.filter_seen,
        rank=built.world.rank,
        world_size=built.world.size,
    )
    corpus = torch.tensor(built.train_data.corpus()[0])
    return user_ranks(built.inner, batches, corpus, built.world)


def final_report(
    built: Built, folder: CheckpointFolder, state: ModelState, writer: MetricsWriter | None
) -> dict[str, Any]:
    """Test metrics of the best checkpoint by validation, or of the last where there was none, beside the baselines."""
    path = resolve(folder.path)
    step = load_state(path, state)["step"]
    ranks = evaluate_ranks(built, "test")
    metrics = retrieval_metrics(ranks)
    report = {
        "checkpoint": str(path),
        "step": step,
        "split": "test",
        "filter_seen": built.config.evaluation.filter_seen,
        "users": len(ranks),
        "model": metrics,
        "baselines": baseline_metrics(built, "test"),
    }
    if writer is not None:
        run_dir = Path(built.config.run_dir)
        writer.write(step, "test", metrics)
        np.save(run_dir / "test-ranks.npy", ranks)
        write_json(run_dir / "report.json", report)
    return report


def baseline_metrics(built: Built, split: Split) -> Mapping[str, Mapping[str, float]]:
    """Metrics of the configured baselines on the same users, computed on the main rank; empty on the others."""
    if not built.world.is_main:
        return {}
    config = built.config
    ranks = evaluate_baselines(
        built.train_data,
        built.evaluation_data,
        names=config.evaluation.baselines,
        train_holdout=config.data.train_holdout,
        target_from_end=TARGET_FROM_END[split],
        filter_seen=config.evaluation.filter_seen,
        max_length=config.data.max_length,
        on_bad_row=config.data.on_bad_row,
    )
    return {name: retrieval_metrics(values) for name, values in ranks.items()}


def evaluate(config: ExperimentConfig, checkpoint: Path, world: World, split: Split) -> dict[str, Any]:
    """Metrics of a checkpoint on one split, from the checkpoint and the data alone."""
    built = build(config, world)
    state = ModelState(dense_parameters(built.model), None, TableOptimizer(built.model, config.embeddings.optimizer))
    progress = load_state(checkpoint, state)
    ranks = evaluate_ranks(built, split)
    return {
        "checkpoint": str(checkpoint),
        "step": progress["step"],
        "split": split,
        "filter_seen": config.evaluation.filter_seen,
        "users": len(ranks),
        "model": retrieval_metrics(ranks),
        "baselines": baseline_metrics(built, split),
    }


def uses_time(config: ExperimentConfig) -> bool:
    return getattr(config.model.tower, "time_bias", False)


def check_data(config: ExperimentConfig, train_data: Dataset, evaluation_data: Dataset) -> None:
    """Raises ConfigError or DataError when the model cannot read one of the data folders."""
    for data in (train_data, evaluation_data):
        if uses_time(config) and not data.schema.timestamps:
            raise ConfigError(f"model.tower.time_bias=true, but {data.path} has no timestamps: set it to false")
    trained, evaluated = train_data.schema.item_cardinality, evaluation_data.schema.item_cardinality
    if trained != evaluated:
        raise DataError(
            f"{train_data.path} has item_cardinality {trained}, {evaluation_data.path} has {evaluated}: evaluate on "
            "data with the same items"
        )


def check_world(config: ExperimentConfig, world_size: int) -> None:
    """Raises ConfigError when the batches cannot be dealt evenly to `world_size` ranks."""
    for name, value in (
        ("data.lanes", config.data.lanes),
        ("trainer.global_batch_size", config.trainer.global_batch_size),
        ("evaluation.global_batch_size", config.evaluation.global_batch_size),
    ):
        if value % world_size:
            raise ConfigError(f"{name}={value} is not divisible by the {world_size} ranks of this run")
