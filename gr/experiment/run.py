"""What the kinds of experiments share: the sharded model, the run folder, resuming, the trainer's run."""

from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel, get_unwrapped_module

from gr import watchdog
from gr.checkpoint import CheckpointFolder, CheckpointStore, ModelState, load_state, resolve, verify
from gr.checkpoint.layout import CONFIG
from gr.config import differences, dump_config, load_config
from gr.config.inventory import InventoryConfig
from gr.config.tree import HistoryRunConfig, RunConfig
from gr.dist import World
from gr.embeddings import TableOptimizer, initialise_tables, shard_tables
from gr.errors import CheckpointError, ConfigError, DamagedCheckpointError
from gr.experiment.folder import CHECKPOINTS, write_config
from gr.logging import get_logger
from gr.metrics.writers import MetricsWriter
from gr.planner.dense import sequence_flops
from gr.planner.plan import Plan
from gr.planner.planfile import dump_plan
from gr.planner.run import make_plan
from gr.status import StatusFile
from gr.train import callbacks
from gr.train.balance import Balance
from gr.train.feed import Loader
from gr.train.module import TrainModule, dense_parameters
from gr.train.trainer import Callback, Trainer

log = get_logger(__name__)
PLAN = "plan.json"
Config = TypeVar("Config", bound=RunConfig)


class TrainingData(Loader, Protocol):
    """A loader whose position can be set."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def counters(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class Job:
    """One training run. callbacks: those of this kind of experiment, given the writer (main rank) and Checkpointing.

    check_saved: raises CheckpointError where a checkpoint's configuration makes it another experiment. report: called
    after the last step.
    """

    config: RunConfig
    plan: Plan | None
    module: TrainModule
    loader: TrainingData
    state: ModelState
    callbacks: Callable[[MetricsWriter | None, callbacks.Checkpointing], list[Callback]]
    check_saved: Callable[[Any, str], None]
    report: Callable[[MetricsWriter | None], dict[str, Any]]


def sharded_model(
    model: nn.Module, inventory: InventoryConfig, config: RunConfig, world: World, dim: int | None
) -> tuple[DistributedModelParallel, Plan | None]:
    """`model` (on meta) planned, sharded and filled with its initial weights. dim: see initialise_tables."""
    watchdog.enter("planning")
    plan, sharding = make_plan(model, inventory, config, world)
    watchdog.enter("sharding")
    sharded = shard_tables(model, sharding, config.embeddings, world.device)
    embeddings = config.embeddings
    initialise_tables(sharded, seed=config.seed, std=embeddings.init_std, dim=dim, init=embeddings.init)
    initialise_dense(get_unwrapped_module(sharded), config.seed)
    return sharded, plan


def balance_of(
    inventory: InventoryConfig, config: HistoryRunConfig, world: World, *, tokens: int = 1, context: int = 0
) -> Balance | None:
    """What deals the examples to the ranks by their FLOPs; None where nothing is dealt.

    tokens: of an event. context: those before the events of an example that has any.
    """
    if world.size == 1 or not config.data.balance:
        return None
    return Balance(lambda events_N: sequence_flops(inventory, tokens * events_N + context * (events_N > 0)), world)


def without_plan(config: Config) -> Config:
    """`config` for a world other than that of planner.plan."""
    return config.model_copy(update={"planner": config.planner.model_copy(update={"plan": None})})


def load_weights(model: nn.Module, config: RunConfig, checkpoint: Path, world: World) -> int:
    """Fills the sharded `model` with the weights of `checkpoint` and returns its step. Collective."""
    verify(checkpoint, world)
    state = ModelState(dense_parameters(model), None, TableOptimizer(model, config.embeddings.optimizer))
    return int(load_state(checkpoint, state, world)["step"])


def initialise_dense(model: nn.Module, seed: int) -> None:
    """Initial dense weights from `seed` alone: sharding has used each rank's generator to a different extent."""
    torch.manual_seed(seed)
    # Children first: a layer has the last word on the linear maps in it.
    for name, module in reversed(list(model.named_modules())):
        if not name.startswith("tables") and hasattr(module, "reset_parameters"):
            module.reset_parameters()


def run(job: Job, world: World) -> dict[str, Any] | None:
    """Trains to config.trainer.steps, resuming where run_dir has a checkpoint; returns the final report.

    Returns None when the run was stopped by a signal; one that came in the last step leaves the report to the next run.
    """
    config, run_dir = job.config, Path(job.config.run_dir)
    with closing(job.loader):
        progress = _resume(job, world)
        step = progress["step"]
        store = CheckpointStore(
            run_dir / CHECKPOINTS, job.state, dump_config(config), world, asynchronous=config.checkpoint.asynchronous
        )
        if world.is_main:
            write_config(config)
            if job.plan is not None:
                (run_dir / PLAN).write_text(dump_plan(job.plan))
        with closing(MetricsWriter(run_dir, step)) if world.is_main else nullcontext() as writer:
            trainer = Trainer(job.module, job.loader, _callbacks(job, store, writer), world, steps=config.trainer.steps)
            trainer.step, trainer.owing = step, progress.get("stopped", False)
            trainer.run()
            if trainer.stopped:
                log.info("stopped after step %d; the same command resumes there", trainer.step)
                report = None
            else:
                watchdog.enter("the final report", "evaluation")
                report = job.report(writer)
        if world.is_main:
            StatusFile(run_dir).update(state="stopped" if report is None else "done")
        return report


def _resume(job: Job, world: World) -> dict[str, Any]:
    """Loads run_dir's latest checkpoint, or else checkpoint.load_from; returns its progress, with the steps done."""
    config = job.config
    chosen = _undamaged(config, world)
    if not chosen:
        return {"step": 0}
    watchdog.enter(f"loading {chosen}")
    saved = load_config(Path(chosen) / CONFIG)
    if type(saved) is not type(config):
        raise CheckpointError(f"{chosen} is of another kind of experiment (task.kind); use another run_dir")
    job.check_saved(saved, chosen)
    progress = load_state(Path(chosen), job.state, world)
    job.loader.load_state_dict(progress["data"])
    log.info("resumed from %s", chosen)
    for name, (before, now) in differences(saved, config).items():
        log.info("  %s: %s there, %s now", name, before, now)
    return progress


def _undamaged(config: RunConfig, world: World) -> str:
    """The checkpoint to resume from, empty for none. Damaged ones of run_dir are set aside for the one before.

    Raises DamagedCheckpointError where there is none before, or load_from is damaged.
    """
    folder = CheckpointFolder(Path(config.run_dir) / CHECKPOINTS)
    steps = [int(step) for step in world.from_main(" ".join(map(str, folder.steps()))).split()]
    for step in reversed(steps):
        path = folder.final(step)
        watchdog.enter(f"verifying {path}")
        try:
            verify(path, world)
        except DamagedCheckpointError as error:
            if step == steps[0]:
                raise
            aside = folder.set_aside(step) if world.is_main else path
            log.warning("%s. Resuming from the one before; the damaged one is now %s", error, aside)
            continue
        return str(path)
    if config.checkpoint.load_from is None:
        return ""
    path = Path(world.from_main(str(resolve(config.checkpoint.load_from)) if world.is_main else ""))
    verify(path, world)
    return str(path)


def _callbacks(job: Job, store: CheckpointStore, writer: MetricsWriter | None) -> list[Callback]:
    config = job.config
    checkpointing = callbacks.Checkpointing(store, config.checkpoint)
    chosen: list[Callback] = [callbacks.Metrics(writer, config.trainer.log_every)]
    if config.trainer.profiler:
        rank = job.module.world.rank
        chosen.append(callbacks.Profiler(config.trainer.profiler, Path(config.run_dir), rank))
    status = callbacks.Status(StatusFile(Path(config.run_dir)), store, config.trainer.log_every)
    return [*chosen, *job.callbacks(writer, checkpointing), checkpointing, status]


def best_step(run_dir: Path, state: ModelState, world: World) -> tuple[Path, int]:
    """Loads the best checkpoint of a run, or its last where none was chosen: (its path, its step)."""
    path = Path(world.from_main(str(resolve(run_dir)) if world.is_main else ""))
    verify(path, world)
    return path, load_state(path, state, world)["step"]


def counted(counters: Mapping[str, int], world: World) -> dict[str, float]:
    """What the loaders of all ranks counted, for the report; what a user should know of it is logged. Collective.

    Adds stochastic_length_sparsity where events were left out: their share of all that were in a window.
    """
    total = dict(zip(counters, world.all_reduce_sum([float(n) for n in counters.values()]), strict=True))
    if dropped := total.get("subsampled_tokens"):
        total["stochastic_length_sparsity"] = dropped / (dropped + total["tokens"])
        if world.is_main:
            log.info("stochastic length left out %.1f %% of the events", 100 * total["stochastic_length_sparsity"])
    if total["bad_rows"] and world.is_main:
        log.warning("data.on_bad_row=skip emptied %d bad rows; see training_data in report.json", total["bad_rows"])
    return total


def check_history_world(config: HistoryRunConfig, world_size: int) -> None:
    """Raises ConfigError when the batches of user histories cannot be dealt evenly to `world_size` ranks."""
    sizes = {
        "data.lanes": config.data.lanes,
        "trainer.global_batch_size": config.trainer.global_batch_size,
        "evaluation.global_batch_size": config.evaluation.global_batch_size,
    }
    check_divisible(sizes, world_size)


def check_divisible(sizes: Mapping[str, int], world_size: int) -> None:
    """Raises ConfigError where a size cannot be dealt evenly to `world_size` ranks."""
    for name, value in sizes.items():
        if value % world_size:
            raise ConfigError(
                f"{name}={value} is not divisible by the {world_size} ranks of this run: use a number of ranks that "
                f"divides it, or set {name} to a multiple of {world_size}"
            )
