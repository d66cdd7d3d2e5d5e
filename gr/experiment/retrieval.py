"""A run from its configuration: the build sequence, training, evaluation.

schema -> model on meta -> plan -> shard tables -> replicate dense -> fill or load -> train module -> loader -> trainer
"""

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel, get_unwrapped_module

from gr.checkpoint import CheckpointFolder, CheckpointStore, ModelState, load_state, resolve
from gr.checkpoint.layout import CONFIG, write_json
from gr.config import differences, dump_config, load_config
from gr.config.tree import ExperimentConfig
from gr.data.dataset import Dataset
from gr.data.loader import TrainLoader, evaluation_batches
from gr.dist import World
from gr.embeddings import TableOptimizer, initialise_tables, shard_tables
from gr.errors import CheckpointError, ConfigError, DataError
from gr.logging import get_logger
from gr.metrics.retrieval import retrieval_metrics
from gr.metrics.writers import MetricsWriter
from gr.models.baselines import evaluate_baselines
from gr.models.retrieval import RetrievalModel
from gr.planner.plan import Plan
from gr.planner.planfile import dump_plan
from gr.planner.run import make_plan
from gr.tasks import CandidateSampler
from gr.train import callbacks
from gr.train.evaluate import user_ranks
from gr.train.module import TrainModule, dense_parameters
from gr.train.trainer import Callback, Trainer

log = get_logger(__name__)
PLAN = "plan.json"
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
    check_world(config, world.size)
    train_data = Dataset.open(config.data.path)
    evaluation_data = Dataset.open(config.evaluation.path) if config.evaluation.path else train_data
    check_data(config, train_data, evaluation_data)
    item_rows = train_data.schema.item_cardinality
    model = meta_model(config, item_rows)
    plan, sharding = make_plan(model, config, item_rows, world)
    sharded = shard_tables(model, sharding, config.embeddings, world.device)
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
    sampler = CandidateSampler(config.task, *built.corpus, config.seed)
    module = TrainModule(built.model, sampler, config, world)
    state = ModelState(module.dense, module.dense_optimizer, module.table_optimizer)
    loader = TrainLoader(
        built.train_data,
        config.data,
        seed=config.seed,
        global_batch_size=config.trainer.global_batch_size,
        rank=world.rank,
        world_size=world.size,
    )
    with closing(loader), _locked(run_dir, world):
        step = _resume(config, state, loader, world)
        config_yaml = dump_config(config)
        store = CheckpointStore(
            run_dir / "checkpoints", state, config_yaml, world, asynchronous=config.checkpoint.asynchronous
        )
        if world.is_main:
            (run_dir / CONFIG).write_text(config_yaml)
            if built.plan is not None:
                (run_dir / PLAN).write_text(dump_plan(built.plan))
        with closing(MetricsWriter(run_dir, step)) if world.is_main else nullcontext() as writer:
            trainer = Trainer(module, loader, _callbacks(built, store, writer), world, steps=config.trainer.steps)
            trainer.step = step
            trainer.run()
            if trainer.stopped and trainer.step < trainer.steps:
                log.info("stopped after step %d; the same command resumes there", trainer.step)
                return None
            return _final_report(built, state, loader.counters(), writer)


@contextmanager
def _locked(run_dir: Path, world: World) -> Iterator[None]:
    """Makes run_dir, and keeps a second run out of it. Raises ConfigError."""
    if not world.is_main:
        yield
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"run_dir={run_dir} cannot be written: {error.strerror}; set another one") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"run_dir={run_dir} is in use by another run: stop it, or set another one") from error
        yield


def _resume(config: ExperimentConfig, state: ModelState, loader: TrainLoader, world: World) -> int:
    """Loads run_dir's latest checkpoint, or else checkpoint.load_from; returns the steps done."""
    path = CheckpointFolder(Path(config.run_dir) / "checkpoints").latest() if world.is_main else None
    if path is None and config.checkpoint.load_from and world.is_main:
        path = resolve(config.checkpoint.load_from)
    chosen = world.from_main(str(path or ""))
    if not chosen:
        return 0
    saved = load_config(Path(chosen) / CONFIG)
    if saved.data.train_holdout != config.data.train_holdout:
        raise CheckpointError(
            f"{chosen} was trained with data.train_holdout={saved.data.train_holdout}, not "
            f"{config.data.train_holdout}: other targets are held out. Use another run_dir"
        )
    progress = load_state(Path(chosen), state, world)
    loader.load_state_dict(progress["data"])
    log.info("resumed from %s", chosen)
    for name, (before, now) in differences(saved, config).items():
        log.info("  %s: %s there, %s now", name, before, now)
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
    corpus = torch.tensor(built.corpus[0])
    return user_ranks(built.inner, batches, corpus, built.world)


def _final_report(
    built: Built, state: ModelState, counters: Mapping[str, int], writer: MetricsWriter | None
) -> dict[str, Any]:
    """Test metrics of the best checkpoint by validation, or of the last where there was none, beside the baselines."""
    run_dir, world = Path(built.config.run_dir), built.world
    path = Path(world.from_main(str(resolve(run_dir)) if world.is_main else ""))
    step = load_state(path, state, world)["step"]
    ranks = evaluate_ranks(built, "test")
    counted = dict(zip(counters, world.all_reduce_sum([float(n) for n in counters.values()]), strict=True))
    report = _report(built, path, step, "test", ranks) | {"training_data": counted}
    if writer is not None:
        writer.write(step, "test", report["model"])
        np.save(run_dir / "test-ranks.npy", ranks)
        # Before the baselines, which may take long on a large corpus.
        write_json(run_dir / "report.json", report)
        report["baselines"] = baseline_metrics(built, "test")
        write_json(run_dir / "report.json", report)
        if bad := counted["bad_rows"]:
            log.warning("data.on_bad_row=skip emptied %d bad rows; see training_data in report.json", bad)
    return report


def _report(built: Built, checkpoint: Path, step: int, split: Split, ranks: np.ndarray) -> dict[str, Any]:
    return {
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
    planner = config.planner.model_copy(update={"plan": None})
    built = build(config.model_copy(update={"planner": planner}), world)
    state = ModelState(dense_parameters(built.model), None, TableOptimizer(built.model, config.embeddings.optimizer))
    step = load_state(checkpoint, state, world)["step"]
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


def check_world(config: ExperimentConfig, world_size: int) -> None:
    """Raises ConfigError when the batches cannot be dealt evenly to `world_size` ranks."""
    for name, value in (
        ("data.lanes", config.data.lanes),
        ("trainer.global_batch_size", config.trainer.global_batch_size),
        ("evaluation.global_batch_size", config.evaluation.global_batch_size),
    ):
        if value % world_size:
            raise ConfigError(
                f"{name}={value} is not divisible by the {world_size} ranks of this run: use a number of ranks that "
                f"divides it, or set {name} to a multiple of {world_size}"
            )
