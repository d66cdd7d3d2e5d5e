"""gr from Python: the commands train, evaluate, recommend, predict, embed, prepare events and plan as functions.

Each function runs in one process, or on every rank that torchrun started, as the commands do. No torch is imported
before it is needed.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gr import watchdog
from gr.config import RunConfig, load_config
from gr.environment import whole_number
from gr.errors import ConfigError

if TYPE_CHECKING:
    from gr.config.inventory import InventoryConfig
    from gr.dist import World
    from gr.planner.estimate import Estimate
    from gr.planner.topology import Topology
    from gr.schema import DataSchema, TabularSchema
    from gr.training.trainer import Callback


def train(
    config: RunConfig | str | Path, overrides: Sequence[str] = (), *, callbacks: "Sequence[Callback]" = ()
) -> dict[str, Any] | None:
    """Trains, resuming where run_dir has a checkpoint; returns the final report, None where a signal stopped the run.

    config: a loaded configuration, or a file. overrides: `a.b.c=value`, for a file. callbacks: called beside the
    recipe's own, on every rank. Raises GRError: a mistake of the user's, in one line with its remedy.
    """
    loaded = _loaded(config, overrides)
    from gr import experiment
    from gr.dist import use_cpu_well, world
    from gr.training.run_folder import record_refusal

    rank, logs = whole_number("RANK", 0), Path(loaded.run_dir) / "logs"
    limits = loaded.trainer.timeouts.model_dump()
    # The watchdog reports first.
    slowest = max(limits.values()) + 2 * watchdog.GRACE_SECONDS
    with watchdog.watching(limits, logs, rank), ExitStack() as stack:
        try:
            own = stack.enter_context(world(loaded.device, timeout=slowest, logs=logs))
        except ConfigError as error:
            record_refusal(loaded, error)
            raise
        use_cpu_well(own)
        return experiment.train(loaded, own, callbacks)


def evaluate(
    checkpoint: str | Path,
    overrides: Sequence[str] = (),
    *,
    split: Literal["validation", "test"] = "test",
    plugins: Collection[str] = (),
) -> dict[str, Any]:
    """The report of a checkpoint on one split, from the checkpoint and the evaluation data alone.

    checkpoint: a run folder (its best, or else its latest) or a step-XXXXXXXX folder. overrides: `a.b.c=value` on the
    configuration that is saved with it. plugins: modules that this configuration may have imported.
    """
    from gr import experiment

    loaded, path = _of_checkpoint(checkpoint, overrides, plugins)
    with _world(loaded) as own:
        return experiment.evaluate(loaded, path, own, split)


def recommend(
    checkpoint: str | Path,
    out: str | Path,
    overrides: Sequence[str] = (),
    *,
    plugins: Collection[str] = (),
    **request: Any,
) -> dict[str, int]:
    """Writes the best items of users of the evaluation data as one Parquet file, from a checkpoint.

    `out` has user_id and item_id (as in the log that was prepared), score and place (1 is best), users in the order of
    the data, without the items that evaluation.filter_seen forbids. overrides: `evaluation.path=FOLDER` names other
    data. request: fields of gr.recipes.base.Request: k=20; users, items: Parquet files with a column user_id (and
    perhaps k) or item_id, of those to recommend to and of those allowed; cold="popularity"; holdout=1, to compare with
    the newest event. Returns the numbers of rows, of users with and without a history, of users and items not known.
    """
    from gr import experiment
    from gr.recipes.base import Request

    loaded, path = _of_checkpoint(checkpoint, overrides, plugins)
    with _world(loaded) as own:
        return experiment.recommend(loaded, path, own, Path(out), Request.of(**request))


def predict(
    checkpoint: str | Path,
    file: str | Path,
    out: str | Path,
    overrides: Sequence[str] = (),
    *,
    plugins: Collection[str] = (),
) -> dict[str, int]:
    """Writes the rows of a Parquet file with a ranking or click model's predictions beside them; returns the counts.

    Click models read the columns of their training data and add `score`; ranking models read user_id, item_id, perhaps
    timestamp and event features, and add score_TASK for each task. Ids are those of the log that was prepared.
    """
    from gr import experiment

    loaded, path = _of_checkpoint(checkpoint, overrides, plugins)
    with _world(loaded) as own:
        return experiment.predict(loaded, path, own, Path(file), Path(out))


def embed(
    checkpoint: str | Path, out: str | Path, overrides: Sequence[str] = (), *, plugins: Collection[str] = ()
) -> dict[str, int]:
    """Writes items.parquet and users.parquet, ids and vectors of a retrieval model, into the folder `out`.

    The dot product of a user's and an item's vector is the score that recommend() ranks by. Returns the rows of each.
    """
    from gr import experiment

    loaded, path = _of_checkpoint(checkpoint, overrides, plugins)
    with _world(loaded) as own:
        return experiment.embed(loaded, path, own, Path(out))


def prepare_events(
    source: Any, out: str | Path, *, force: bool = False, **options: Any
) -> "dict[str, DataSchema | TabularSchema]":
    """Turns an interaction log into a data folder, as `gr prepare events` does; returns its schemas, by folder.

    source: files, patterns of files, or a table in memory (pandas, polars, pyarrow). options: fields of
    gr.prepare.event_options.EventOptions, such as user="u", item="i", time="t", time_unit="s".
    """
    from pydantic import ValidationError

    from gr.prepare.event_options import EventOptions
    from gr.prepare.events import prepare_events
    from gr.prepare.write import atomic_folder

    try:
        chosen = EventOptions(**options)
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise ConfigError(f"options of prepare_events: {'; '.join(faults)}") from None
    with atomic_folder(Path(out), force) as folder:
        return prepare_events(source, folder, chosen).schemas


def plan(config: RunConfig | str | Path, overrides: Sequence[str] = (), *, topology: str | None = None) -> "Estimate":
    """Plans where the tables of a model go, and returns an estimate of the memory and time that the best plan takes.

    config: an experiment, an inventory (configs/scale) or a list of tables (.json, .parquet). topology: named hardware
    and a number of ranks (h100x64), or a file of `gr calibrate`; unset: that of an experiment's planner.topology.
    Raises PlanError where the model does not fit. Imports no torch.
    """
    from gr.planner.estimate import estimate
    from gr.planner.plan import search

    inventory, machine, _ = planning_problem(config, overrides, topology)
    return estimate(search(inventory, machine))


def planning_problem(
    config: RunConfig | str | Path, overrides: Sequence[str], topology: str | None
) -> "tuple[InventoryConfig, Topology, int]":
    """The input of plan(): the tables with what may be done with each, and the machine; and what its ranks must divide.

    The last is 0 for an inventory, which any number divides. Raises ConfigError.
    """
    from gr.planner.constraints import constrained
    from gr.planner.inventory import is_inventory, load_inventory
    from gr.planner.topology import hardware_names, parse_topology

    if not isinstance(config, RunConfig) and is_inventory(config):
        inventory = load_inventory(config, overrides)
        if topology is None:
            raise ConfigError(f"topology is missing: NAMExRANKS, with NAME one of {', '.join(hardware_names())}")
        return inventory, parse_topology(topology), 0
    experiment = _loaded(config, overrides)
    topology = topology or experiment.planner.topology
    if topology is None:
        raise ConfigError("topology is missing: cpux2 plans for two ranks on a CPU, h100x8 for eight H100s")
    machine = parse_topology(topology)
    experiment.check_ranks(machine.ranks)
    inventory = experiment.inventory(experiment.planning_schema())
    divides = gcd(*experiment.batch_sizes().values())
    return constrained(inventory, experiment.planner, machine.device), machine, divides


def _loaded(config: RunConfig | str | Path, overrides: Sequence[str]) -> RunConfig:
    if not isinstance(config, RunConfig):
        return load_config(config, overrides)
    if overrides:
        raise ConfigError("overrides are for a file: load_config(path, overrides) first, then pass what it returns")
    return config


def _of_checkpoint(
    checkpoint: str | Path, overrides: Sequence[str], plugins: Collection[str]
) -> tuple[RunConfig, Path]:
    """The configuration that is saved with a checkpoint, and the checkpoint's own folder."""
    from gr.checkpoint import resolve
    from gr.checkpoint.layout import CONFIG, read_progress

    path = resolve(checkpoint)
    read_progress(path)
    return load_config(path / CONFIG, overrides, plugins=plugins), path


@contextmanager
def _world(config: RunConfig) -> "Iterator[World]":
    from gr.dist import use_cpu_well, world

    with world(config.device) as own:
        use_cpu_well(own)
        yield own
