"""A run from its configuration, in order:

    schema -> recipe -> model on meta -> plan -> shard tables -> parallelise dense
    -> fill or load -> train module -> trainer

The experiment asks the recipe (gr.recipes.base.Recipe) for all that differs between kinds.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from torch import nn

from gr import watchdog
from gr.checkpoint import DENSE, CheckpointStore, ModelState, load_parts, load_state, resolve, resume_from, verify
from gr.checkpoint.layout import CHECKPOINTS, CONFIG
from gr.config import RunConfig, differences, dump_config, load_config
from gr.config.run import CALLBACKS, DenseConfig
from gr.dist import World
from gr.embeddings import InitialRows, TableOptimizer, id_map_of, initialise_tables, map_ids
from gr.errors import CheckpointError, ConfigError, nearest
from gr.files import write_json
from gr.logging import get_logger
from gr.metrics.trackers import check_installed, open_trackers
from gr.metrics.writers import MetricsWriter
from gr.models.dense import initialise_dense
from gr.ops.backend import force_backend
from gr.parallel.dense import dense_parameters, parallelise_dense, unwrapped
from gr.parallel.load_balance import LoadBalancer
from gr.parallel.mesh import build_mesh
from gr.parallel.tables import shard_tables
from gr.planner.for_run import make_plan
from gr.planner.placement import Plan
from gr.planner.planfile import dump_plan
from gr.recipes.answers import write_answers
from gr.recipes.base import Recipe, Request, Split, Training, TrainingLoader, open_recipe
from gr.status import StatusFile
from gr.training import callbacks
from gr.training.header import header
from gr.training.module import TrainModule
from gr.training.run_folder import run_folder, write_config
from gr.training.trainer import Callback, Trainer

log = get_logger(__name__)
PLAN = "plan.json"


@dataclass(frozen=True)
class Built:
    """A recipe and its model on this rank, sharded, parallelised and filled. plan: None without tables."""

    recipe: Recipe
    world: World
    model: nn.Module
    plan: Plan | None


def build(recipe: Recipe, world: World) -> Built:
    """The model of a recipe with its initial values, for data that was opened and checked. Collective."""
    config = recipe.config
    config.check_ranks(world.size)
    recipe.check_data()
    model, plan = recipe.model(), None
    if recipe.has_tables:
        watchdog.enter("planning")
        plan, sharding = make_plan(model, config.inventory(recipe.schema), config, world)
        watchdog.enter("sharding")
        model = shard_tables(model, sharding, config.embeddings, world.device, config.planner)
    model = parallelise_dense(model, build_mesh(world, config.dense.tensor_parallel), config.dense, world.device)
    initialise_tables(model, seed=config.seed, embeddings=config.embeddings, dim=recipe.table_columns)
    map_ids(model, InitialRows(config.seed, config.embeddings, recipe.table_columns), world)
    initialise_dense(unwrapped(model), config.seed)
    return Built(recipe, world, model, plan)


def train(config: RunConfig, world: World, callbacks: Sequence[Callback] = ()) -> dict[str, Any] | None:
    """Trains for trainer.steps or trainer.epochs, resuming where run_dir has a checkpoint; returns the final report.

    callbacks: beside the recipe's and those of the configuration. Returns None when a signal stopped the run; one that
    came in the last step leaves the report to the next run. Collective.
    """
    with run_folder(config, world), force_backend(config.trainer.kernels):
        check_installed(config)
        return _train(build(open_recipe(config), world), callbacks)
    return None  # asked to stop outside the steps


def _train(built: Built, more: Sequence[Callback]) -> dict[str, Any] | None:
    recipe, world, config, run_dir = built.recipe, built.world, built.recipe.config, Path(built.recipe.config.run_dir)
    flops = recipe.example_flops() if world.size > 1 else None
    balance = LoadBalancer(flops, world) if flops is not None else None
    objective = recipe.objective(world)
    with closing(recipe.loader(world)) as loader:
        steps = config.trainer.steps or loader.steps(config.trainer.epochs or 1)
        module = TrainModule(built.model, objective, config, world, balance, steps=steps, flops=recipe.flops())
        state = ModelState(module.dense, module.dense_optimizer, module.table_optimizer, config.optimizer.states)
        progress = _resume(built, state, loader)
        step = progress["step"]
        store = CheckpointStore(
            run_dir / CHECKPOINTS,
            state,
            dump_config(config),
            world,
            asynchronous=config.checkpoint.asynchronous,
            # Read once, so that every checkpoint has what the run was trained with.
            artifacts={name: recipe.artifact(name) if world.is_main else b"" for name in recipe.artifacts},
        )
        if world.is_main:
            write_config(config)
            if built.plan is not None:
                (run_dir / PLAN).write_text(dump_plan(built.plan))
        with closing(_writer(config, step)) if world.is_main else nullcontext() as writer:
            checkpointing = callbacks.Checkpointing(store, config.checkpoint)
            training = Training(built.model, world, objective, loader, writer, checkpointing)
            chosen = [*_callbacks(built, training), *more, *_last_callbacks(training, config)]
            for line in [
                *config.reasons(recipe.schema),
                *header(config, module, built.plan, world, steps=steps, epoch_steps=loader.steps(1)),
            ]:
                log.info("%s", line)
            trainer = Trainer(module, loader, chosen, world, steps=steps)
            trainer.step, trainer.owing = step, progress.get("stopped", False)
            trainer.run()
            if trainer.stopped:
                log.info("stopped after step %d; the same command resumes there", trainer.step)
                report = None
            else:
                watchdog.enter("the final report", "evaluation")
                report = _final_report(built, state, loader, writer)
        if world.is_main:
            StatusFile(run_dir).update(state="stopped" if report is None else "done")
        return report


def evaluate(config: RunConfig, checkpoint: Path, world: World, split: Split) -> dict[str, Any]:
    """The report of a checkpoint on one split, from the checkpoint and the evaluation data alone. Collective.

    The tables are sharded for this world, which need not be that of planner.plan. Raises ConfigError where the split
    cannot be evaluated, CheckpointError where the checkpoint is of another model.
    """
    with force_backend(config.trainer.kernels):
        recipe = _recipe_of(checkpoint, config, world)
        if split not in get_args(Split):
            raise ConfigError(f"split={split!r}: is none; splits: {', '.join(get_args(Split))}")
        recipe.check_split(split)
        built = build(recipe, world)
        report, _ = _report(built, checkpoint, load_weights(built, checkpoint), split)
        return report | (recipe.comparisons(split) if world.is_main else {})


def _recipe_of(checkpoint: Path, config: RunConfig, world: World) -> Recipe:
    """The recipe of an undamaged checkpoint, which takes the place of the training data, for any world.

    Raises CheckpointError where it is of another model than `config`. Collective.
    """
    verify(checkpoint, world)
    # That plan and its groups were for the world of the training.
    planner = config.planner.model_copy(update={"plan": None, "groups": 1})
    dense = DenseConfig() if world.size == 1 else config.dense  # one rank has nobody to share with
    recipe = open_recipe(config.model_copy(update={"planner": planner, "dense": dense}), checkpoint)
    recipe.check_saved(_saved_config(checkpoint, config), str(checkpoint))
    return recipe


def load_weights(built: Built, checkpoint: Path) -> int:
    """Fills the built model with the weights of a checkpoint and returns its step. Collective."""
    tables = TableOptimizer(built.model, built.recipe.config.embeddings, built.recipe.config.seed)
    state = ModelState(dense_parameters(built.model), None, tables)
    return int(load_state(checkpoint, state, built.world)["step"])


@contextmanager
def trained(config: RunConfig, checkpoint: Path, world: World) -> Iterator[Built]:
    """The model of a checkpoint with its weights, and the kernels of its configuration. Collective."""
    with force_backend(config.trainer.kernels):
        built = build(_recipe_of(checkpoint, config, world), world)
        load_weights(built, checkpoint)
        yield built


def recommend(config: RunConfig, checkpoint: Path, world: World, out: Path, request: Request) -> dict[str, int]:
    """Writes the best items of users of the evaluation data as `out`, and returns what was counted. Collective.

    `out` is one Parquet file: user_id, item_id, score, place; the same at every world size. Every rank must reach its
    folder.
    """
    with trained(config, checkpoint, world) as built:
        answers = built.recipe.recommend(built.model, world, request)
        return {"rows": write_answers(out, answers.schema, answers.tables, world), **answers.counts}


def predict(config: RunConfig, checkpoint: Path, world: World, file: Path, out: Path) -> dict[str, int]:
    """Writes the rows of a Parquet file with the model's predictions beside them; returns what was counted. Collective.

    The same at every world size. Every rank must reach both folders.
    """
    with trained(config, checkpoint, world) as built:
        answers = built.recipe.predict(built.model, world, file)
        return {"rows": write_answers(out, answers.schema, answers.tables, world), **answers.counts}


def embed(config: RunConfig, checkpoint: Path, world: World, folder: Path) -> dict[str, int]:
    """Writes items.parquet and users.parquet of ids and vectors into a folder; returns their rows. Collective.

    Raises ConfigError where the folder holds more than these: items.parquet of a data folder is another file.
    """
    files = {"items.parquet", "users.parquet"}
    if folder.is_dir() and (others := sorted({path.name for path in folder.iterdir()} - files)):
        raise ConfigError(f"out={folder}: holds {others[0]}, so it is no folder of vectors; name another folder")
    with trained(config, checkpoint, world) as built:
        parts = built.recipe.embed(built.model, world)
        try:
            world.on_all(lambda: folder.mkdir(exist_ok=True) if world.is_main else None)
        except OSError as error:
            raise ConfigError(f"out={folder}: cannot be made: {error.strerror}; name another folder") from error
        return {
            name: write_answers(folder / f"{name}.parquet", answers.schema, answers.tables, world)
            for name, answers in parts.items()
        }


def _resume(built: Built, state: ModelState, loader: TrainingLoader) -> dict[str, Any]:
    """Loads run_dir's latest checkpoint, or else checkpoint.load_from; returns its progress, with the steps done."""
    recipe, world, config = built.recipe, built.world, built.recipe.config
    own, parts = Path(config.run_dir) / CHECKPOINTS, config.checkpoint.load_parts
    if parts is not None:
        _check_parts(recipe, parts)
    chosen = resume_from(own, config.checkpoint.load_from, world)
    if chosen is None:
        if recipe.starts_from:
            raise ConfigError(
                f"checkpoint.load_from is unset: a {config.kind} run begins from the weights of another "
                f"({' or '.join(recipe.starts_from)}): set it to that run's run_dir"
            )
        return {"step": 0}
    watchdog.enter(f"loading {chosen}")
    saved = _saved_config(chosen, config, recipe.starts_from)
    if parts is not None and chosen.parent != own:
        load_parts(chosen, state, parts, world)
        state.tables.set_steps(0)
        log.info("begins at step 0 with %s of %s", ", ".join(parts), chosen)
        return {"step": 0}
    recipe.check_saved(saved, str(chosen))
    assert isinstance(state.tables, TableOptimizer)
    state.tables.grow_from(saved.embeddings)
    if state.tables.growing and chosen.is_relative_to(config.run_dir):
        raise CheckpointError(
            f"{chosen} has fewer ways (embeddings.tables.COLUMN.ids) than this run, which would leave its run_dir with "
            "checkpoints of two sizes: set another run_dir, with checkpoint.load_from"
        )
    if saved.kind != config.kind:
        trained = {
            name: parameter
            for name, parameter in state.dense.items()
            if parameter.requires_grad and not name.startswith(recipe.added)
        }
        load_state(chosen, ModelState(trained, None, state.tables), world)
        state.tables.set_steps(0)
        recipe.begin(built.model, world)
        log.info("begins from %s", chosen)
        return {"step": 0}
    progress = load_state(chosen, state, world)
    if progress["data"]:  # empty in a checkpoint of weights that came from elsewhere
        loader.load_state_dict(progress["data"])
    log.info("resumed from %s", chosen)
    for name, (before, now) in differences(saved, config).items():
        log.info("  %s: %s there, %s now", name, before, now)
    return progress


def _check_parts(recipe: Recipe, parts: Sequence[str]) -> None:
    """Raises ConfigError for parts that the model does not have, or a recipe that needs all of them."""
    config = recipe.config
    if recipe.starts_from:
        raise ConfigError(
            f"checkpoint.load_parts: a {config.kind} run begins from all weights of another: leave it out"
        )
    known = [DENSE, *(table.name for table in config.tables(recipe.schema))]
    for part in parts:
        if part not in known:
            raise ConfigError(f"checkpoint.load_parts: no part {part}; {nearest(part, known, 'parts')}")


def _writer(config: RunConfig, steps_done: int) -> MetricsWriter:
    return MetricsWriter(Path(config.run_dir), steps_done, open_trackers(config, steps_done))


def _saved_config(checkpoint: Path, config: RunConfig, others: Sequence[str] = ()) -> RunConfig:
    """The configuration that a checkpoint was trained with. Raises CheckpointError where it is of another kind than
    `config` and than `others`.
    """
    saved = load_config(checkpoint / CONFIG, plugins=config.plugins)
    if type(saved) is not type(config) and saved.kind not in others:
        raise CheckpointError(f"{checkpoint} is of another kind of experiment (task.kind); use another run_dir")
    return saved


def _callbacks(built: Built, training: Training) -> list[Callback]:
    recipe, config = built.recipe, built.recipe.config
    chosen: list[Callback] = [callbacks.Metrics(training.writer, config.trainer.log_every, _peak_flops(built))]
    if (ids := id_map_of(training.model)) is not None:
        chosen.append(callbacks.DynamicIds(ids, training.writer, config.trainer.log_every))
    if config.trainer.profiler:
        chosen.append(callbacks.Profiler(config.trainer.profiler, Path(config.run_dir), training.world.rank))
    plugins = [CALLBACKS.target(each)(each) for each in config.callbacks]
    return [*chosen, *recipe.callbacks(training), *plugins]


def _peak_flops(built: Built) -> float | None:
    """FLOP/s of all ranks by the data sheet; None where the plan is for hardware that nobody named, as on a CPU."""
    config, world = built.recipe.config, built.world
    if built.plan is None or (world.device.type == "cpu" and config.planner.topology is None):
        return None
    topology = built.plan.topology
    return world.size * (topology.peak_bf16 if config.trainer.precision == "bf16" else topology.peak_fp32)


def _last_callbacks(training: Training, config: RunConfig) -> list[Callback]:
    """The callbacks that come after all others of a step: it is saved, and status.json says so."""
    status = StatusFile(Path(config.run_dir))
    store = training.checkpointing.store
    return [training.checkpointing, callbacks.Status(status, store, config.trainer.log_every)]


def _report(built: Built, checkpoint: Path, step: int, split: Split) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if (ids := id_map_of(built.model)) is not None:
        ids.read_lookups()  # those of evaluations before this one
    evaluation = built.recipe.evaluate(built.model, built.world, split)
    unknown = {} if ids is None else {"dynamic_ids": ids.read_lookups()}
    head = {"kind": built.recipe.config.kind, "checkpoint": str(checkpoint), "step": step}
    return {**head, **evaluation.details, **unknown, "model": evaluation.metrics}, evaluation.arrays


def _final_report(
    built: Built, state: ModelState, loader: TrainingLoader, writer: MetricsWriter | None
) -> dict[str, Any]:
    """Test metrics of the best checkpoint by validation, or of the last where there was none, beside comparisons."""
    recipe, world, run_dir = built.recipe, built.world, Path(built.recipe.config.run_dir)
    path = Path(world.from_main(str(resolve(run_dir)) if world.is_main else ""))
    verify(path, world)
    step = int(load_state(path, state, world)["step"])
    report, arrays = _report(built, path, step, "test")
    report |= {"training_data": recipe.count(loader.counters(), world)}
    if writer is not None:
        if report["model"]:
            writer.write(step, "test", report["model"])
        for name, values in arrays.items():
            np.save(run_dir / f"test-{name}.npy", values)
        # Before the comparisons, which may take long on a large corpus.
        write_json(run_dir / "report.json", report)
        watchdog.enter("the comparisons of the final report", "evaluation")
        report |= recipe.comparisons("test")
        write_json(run_dir / "report.json", report)
    return report
