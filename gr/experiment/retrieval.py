"""A run from its configuration: the build sequence, training, evaluation.

schema -> model on meta -> plan -> shard tables -> replicate dense -> fill or load -> train module -> loader -> trainer
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torchrec.distributed.model_parallel import DistributedModelParallel, get_unwrapped_module

from gr import watchdog
from gr.checkpoint import ModelState
from gr.config.inventory import InventoryConfig
from gr.config.tree import ExperimentConfig
from gr.data.dataset import Dataset
from gr.data.loader import TrainLoader, evaluation_batches
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
from gr.metrics.retrieval import retrieval_metrics
from gr.metrics.writers import MetricsWriter
from gr.models.baselines import evaluate_baselines
from gr.models.retrieval import RetrievalModel
from gr.planner.inventory import experiment_inventory
from gr.planner.plan import Plan
from gr.tasks import CandidateSampler
from gr.train import callbacks
from gr.train.evaluate import user_ranks
from gr.train.module import TrainModule
from gr.train.objectives import RetrievalObjective
from gr.train.trainer import Callback

Split = Literal["validation", "test"]
TARGET_FROM_END: dict[Split, Literal[1, 2]] = {"test": 1, "validation": 2}


@dataclass(frozen=True)
class Built:
    """A sharded model and the data it is for. plan: None where TorchRec's planner made it."""

    config: ExperimentConfig
    world: World
    train_data: Dataset
    evaluation_data: Dataset
    model: DistributedModelParallel
    inventory: InventoryConfig
    plan: Plan | None

    @cached_property
    def corpus(self) -> tuple[np.ndarray, np.ndarray]:
        """Candidate item ids and their counts in training, read once for the sampler and every evaluation."""
        return self.train_data.corpus()

    @property
    def inner(self) -> RetrievalModel:
        return get_unwrapped_module(self.model)


def meta_model(config: ExperimentConfig, item_rows: int) -> RetrievalModel:
    """The model without storage."""
    with torch.device("meta"):
        return RetrievalModel(config, item_rows)


def build(config: ExperimentConfig, world: World) -> Built:
    """Opens the data, plans, shards and fills the model with its initial weights."""
    check_history_world(config, world.size)
    train_data = Dataset.open(config.data.path)
    evaluation_data = Dataset.open(config.evaluation.path) if config.evaluation.path else train_data
    check_data(config, train_data, evaluation_data)
    rows = train_data.schema.item_cardinality
    inventory = experiment_inventory(config, rows)
    sharded, plan = sharded_model(meta_model(config, rows), inventory, config, world, config.model.dim)
    return Built(config, world, train_data, evaluation_data, sharded, inventory, plan)


def train(config: ExperimentConfig, world: World) -> dict[str, Any] | None:
    """Trains to config.trainer.steps, resuming where run_dir has a checkpoint; returns the final report.

    Returns None when the run was stopped by a signal.
    """
    built = build(config, world)
    objective = RetrievalObjective(CandidateSampler(config.task, *built.corpus, config.seed), world)
    module = TrainModule(built.model, objective, config, world, balance_of(built.inventory, config, world))
    state = ModelState(module.dense, module.dense_optimizer, module.table_optimizer)
    loader = TrainLoader(
        built.train_data,
        config.data,
        seed=config.seed,
        global_batch_size=config.trainer.global_batch_size,
        rank=world.rank,
        world_size=world.size,
    )
    job = Job(
        config,
        built.plan,
        module,
        loader,
        state,
        callbacks=lambda writer, checkpointing: _evaluation(built, writer, checkpointing),
        check_saved=lambda saved, path: _check_saved(saved, path, config),
        report=lambda writer: _final_report(built, state, loader.counters(), writer),
    )
    return run(job, world)


def _check_saved(saved: ExperimentConfig, path: str, config: ExperimentConfig) -> None:
    if saved.data.train_holdout != config.data.train_holdout:
        raise CheckpointError(
            f"{path} was trained with data.train_holdout={saved.data.train_holdout}, not "
            f"{config.data.train_holdout}: other targets are held out. Use another run_dir"
        )


def _evaluation(built: Built, writer: MetricsWriter | None, checkpointing: callbacks.Checkpointing) -> list[Callback]:
    settings = built.config.evaluation
    if not settings.every:
        return []
    return [
        callbacks.Evaluation(
            lambda: retrieval_metrics(evaluate_ranks(built, "validation")),
            checkpointing,
            writer,
            every=settings.every,
            select_by=settings.select_by,
            shown=("hr@10", "ndcg@10", "mrr"),
        )
    ]


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
    corpus = torch.tensor(built.corpus[0])
    return user_ranks(built.inner, batches, corpus, built.world)


def _final_report(
    built: Built, state: ModelState, counters: Mapping[str, int], writer: MetricsWriter | None
) -> dict[str, Any]:
    """Test metrics of the best checkpoint by validation, or of the last where there was none, beside the baselines."""
    run_dir, world = Path(built.config.run_dir), built.world
    path, step = best_step(run_dir, state, world)
    ranks = evaluate_ranks(built, "test")
    report = _report(built, path, step, "test", ranks) | {"training_data": counted(counters, world)}
    if writer is not None:
        writer.write(step, "test", report["model"])
        np.save(run_dir / "test-ranks.npy", ranks)
        # Before the baselines, which may take long on a large corpus.
        write_json(run_dir / "report.json", report)
        watchdog.enter("the baselines of the final report", "evaluation")
        report["baselines"] = baseline_metrics(built, "test")
        write_json(run_dir / "report.json", report)
    return report


def _report(built: Built, checkpoint: Path, step: int, split: Split, ranks: np.ndarray) -> dict[str, Any]:
    return {
        "kind": "retrieval",
        "checkpoint": str(checkpoint),
        "step": step,
        "split": split,
        "filter_seen": built.config.evaluation.filter_seen,
        "users": len(ranks),
        "model": retrieval_metrics(ranks),
        "baselines": {},
    }


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
    """Metrics of a checkpoint on one split, from the checkpoint and the data alone.

    The tables are sharded for this world, which need not be that of planner.plan. Raises ConfigError when the split's
    targets were trained on.
    """
    if config.evaluates_training_users and config.data.train_holdout < TARGET_FROM_END[split]:
        raise ConfigError(
            f"the {split} targets were trained on (data.train_holdout={config.data.train_holdout}): evaluate the test "
            "split, or other users with evaluation.path"
        )
    built = build(without_plan(config), world)
    step = load_weights(built.model, config, checkpoint, world)
    report = _report(built, checkpoint, step, split, evaluate_ranks(built, split))
    return report | {"baselines": baseline_metrics(built, split)}


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
