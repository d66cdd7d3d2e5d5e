"""Saves and loads a run: dense parameters, tables, optimizer states, step and data position.

Schedules and random draws are functions of (seed, step, rank), so the step is all that has to be kept of them.
"""

import json
import shutil
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from gr.checkpoint.checksums import find_damage, write_sums
from gr.checkpoint.layout import CONFIG, PROGRESS, CheckpointFolder
from gr.dist import World
from gr.errors import CheckpointError, DamagedCheckpointError
from gr.files import write_json, write_text

DENSE_STATES: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.Adagrad: ("step", "sum"),
    torch.optim.SGD: (),
}
SHARED = (CONFIG, PROGRESS, ".metadata")  # files that rank 0 writes for all
SHOWN_FAULTS = 3


class SavedTable(Protocol):
    """One tensor of one table. value: saved, and loaded in place. is_rowwise: [rows, column blocks], a state.

    column_widths: of the table's column blocks, in order.
    """

    @property
    def name(self) -> str: ...

    @property
    def is_rowwise(self) -> bool: ...

    @property
    def column_widths(self) -> tuple[int, ...]: ...

    @property
    def value(self) -> ShardedTensor | Tensor: ...

    def fill_rowwise(self, saved: Tensor, widths: Sequence[int]) -> None: ...


class Tables(Protocol):
    """The tables of a model with their optimizer state, as far as a checkpoint goes."""

    def entries(self) -> Sequence[SavedTable]: ...

    def set_steps(self, steps: int) -> None: ...


@dataclass(frozen=True)
class ModelState:
    """The live tensors of a run; saving reads them and loading writes into them."""

    dense: dict[str, nn.Parameter]
    dense_optimizer: torch.optim.Optimizer | None
    tables: Tables


class CheckpointStore:
    """The checkpoints of one run, written by all ranks together."""

    def __init__(self, folder: Path, state: ModelState, config_yaml: str, world: World, *, asynchronous: bool) -> None:
        self.folder = CheckpointFolder(folder)
        self.state, self.config_yaml, self.world = state, config_yaml, world
        self.pending: Thread | None = None
        self.failure: Exception | None = None  # of a save in the background
        self.complete = steps[-1] if (steps := self.folder.steps()) else None  # step of the newest, on the main rank
        # A save in the background must not share collectives with training.
        self.group = dist.new_group(backend="gloo") if asynchronous else None
        if world.is_main:
            self.folder.path.mkdir(parents=True, exist_ok=True)
            self.folder.remove_partial()

    def save(self, progress: dict[str, Any], keep_last: int) -> None:
        """Saves the state as of progress["step"]. Asynchronous saves return once the tensors are copied.

        Raises CheckpointError on every rank, and saves nothing, when a weight or state of any rank is not finite.
        """
        self.finish()
        step = progress["step"]
        tensors = _tensors(self.state)
        if self.world.any(not _all_finite(tensors)):
            raise CheckpointError(
                f"weights are not finite after step {step}: not saved; {self.folder.describe_latest()}"
            )
        partial = self.folder.partial(step)
        if self.world.is_main:
            partial.mkdir(exist_ok=True)
            write_text(partial / CONFIG, self.config_yaml)
            write_json(partial / PROGRESS, progress)
        if self.group is None:
            with self._explained(step):
                dcp.save(tensors, checkpoint_id=partial)
                self._commit(step, keep_last)
            # No rank may look for the checkpoint before it has its name.
            dist.barrier()
            return
        future = dcp.async_save(
            tensors, checkpoint_id=partial, process_group=self.group, async_stager=BlockingAsyncStager()
        )
        self.pending = Thread(target=self._commit_later, args=(future, step, keep_last), name="checkpoint-commit")
        self.pending.start()

    def finish(self) -> None:
        """Waits for a save in the background. Raises what went wrong in it."""
        if self.pending is None:
            return
        self.pending.join()
        self.pending = None
        dist.barrier(group=self.group)
        if self.failure is not None:
            raise self.failure

    def best_value(self, metric: str) -> float:
        """The best value of `metric` so far, on every rank; minus infinity where another metric chose, or none did."""
        best = self.folder.best() or {"step": None, "metric": None, "value": None}
        known = best["metric"] == metric and best["step"] in self.folder.steps()
        return float(self.world.from_main(str(best["value"] if known else float("-inf"))))

    def mark_best(self, step: int, metric: str, value: float) -> None:
        """Marks a saved step as the best so far, on every rank's return."""
        self.finish()
        if self.world.is_main:
            self.folder.mark_best(step, metric, value)
        dist.barrier()

    def _commit_later(self, future: Future, step: int, keep_last: int) -> None:
        try:
            with self._explained(step):
                future.result()
                self._commit(step, keep_last)
        except Exception as error:  # raised by finish(), in the thread that trains
            self.failure = error

    def _commit(self, step: int, keep_last: int) -> None:
        """Gives the checkpoint its name once every rank has summed what it wrote. Raises OSError."""
        fault: OSError | None = None
        try:
            write_sums(self.folder.partial(step), self.world.rank, SHARED)
        except OSError as error:
            fault = error
        faults = torch.tensor([float(fault is not None)], device=self.world.device if self.group is None else "cpu")
        dist.all_reduce(faults, group=self.group)
        if faults.item():
            raise fault or OSError("another rank could not write its checksums")
        if self.world.is_main:
            self.folder.commit(step)
            self.complete = step
            self.folder.prune(keep_last)

    @contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        """Turns what goes wrong in a save into a CheckpointError, and makes room again."""
        try:
            yield
        except (dcp.CheckpointException, OSError) as error:
            failures = error.failures if isinstance(error, dcp.CheckpointException) else {}
            cause = str(next(iter(failures.values()))[0] if failures else error)
            if "inline_container" in cause:  # torch's writer keeps to itself why a write fell short
                cause = "a write fell short, the disk or a quota is full"
            if self.world.is_main:
                shutil.rmtree(self.folder.partial(step), ignore_errors=True)
            raise CheckpointError(
                f"step {step} cannot be saved under {self.folder.path}: {cause}; {self.folder.describe_latest()}. Make "
                "room there, or set another run_dir with checkpoint.load_from, then start again"
            ) from error


def verify(path: Path, world: World) -> None:
    """Raises DamagedCheckpointError on every rank where a file of a checkpoint is not what was written. Collective."""
    damage = world.gather_text(find_damage(path, SHARED, world.rank, world.size))
    if faults := [fault for fault in damage if fault]:
        raise DamagedCheckpointError(f"{faults[0]}; restore that file, or remove {path} to use the one before")


def load_state(path: Path, state: ModelState, world: World) -> dict[str, Any]:
    """Loads a checkpoint into the live tensors, under whatever plan and world size; returns its progress.

    Checksums are not compared here: see verify(). Raises CheckpointError naming both shapes where a tensor does not
    fit, for an optimizer state that the model has no use for, and for a checkpoint that cannot be read; on every rank,
    whichever found the fault.
    """
    try:
        progress = json.loads((path / PROGRESS).read_text())
        if not {"step", "data"} <= progress.keys():
            raise ValueError(f"{PROGRESS} has no step or no data")
        saved = dcp.FileSystemReader(path).read_metadata()
    except Exception as error:  # damaged metadata fails in as many ways as it can be damaged
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint: {error}; remove it to use the one before"
        ) from error
    wanted = _tensors(state)
    resharded = _rowwise_of_other_blocks(saved, state)
    faults = _misfits(saved, wanted, skip=resharded)
    if world.any(bool(faults)):
        faults.sort(key=lambda fault: not fault.startswith("tables"))
        shown = "; ".join(faults[:SHOWN_FAULTS]) or "another rank says which tensors"
        more = f"; and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        raise CheckpointError(
            f"{path} is of another model: {shown}{more}; use another run_dir, or the configuration saved in the "
            "checkpoint (config.yaml)"
        )
    for name in resharded:
        wanted["tables"].pop(name)
    fulls = {name: torch.empty(size) for name, (size, _) in resharded.items()}
    try:
        dcp.load(wanted, checkpoint_id=path)
        if fulls:  # not on every rank, so without collectives
            dcp.load({"tables": fulls}, checkpoint_id=path, no_dist=True)
    except dcp.CheckpointException as error:
        fault = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{path}: cannot be loaded: {fault}; remove it to use the one before") from error
    for entry in state.tables.entries():
        if entry.name in fulls:
            entry.fill_rowwise(fulls[entry.name], resharded[entry.name][1])
    state.tables.set_steps(progress["step"])
    return progress


def _tensors(state: ModelState) -> dict[str, dict[str, Any]]:
    """What DCP saves. Loading writes into the same tensors, so optimizer states are made if they are not there."""
    tensors: dict[str, dict[str, Any]] = {
        "dense": {name: p.detach() for name, p in state.dense.items()},
        "tables": {entry.name: entry.value for entry in state.tables.entries()},
    }
    if state.dense_optimizer is not None:
        tensors["dense_optimizer"] = dict(_dense_states(state.dense, state.dense_optimizer))
    return tensors


def _all_finite(tensors: dict[str, dict[str, Any]]) -> bool:
    """Of this rank's parts."""
    for value in (tensor for group in tensors.values() for tensor in group.values()):
        parts = [s.tensor for s in value.local_shards()] if isinstance(value, ShardedTensor) else [value]
        if not all(bool(part.isfinite().all()) for part in parts):
            return False
    return True


def _dense_states(dense: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    kinds = DENSE_STATES[type(optimizer)]
    for name, parameter in dense.items():
        states = optimizer.state[parameter]
        for kind in kinds:
            if kind not in states:
                scalar = torch.zeros((), dtype=torch.float32, device=parameter.device)
                states[kind] = scalar if kind == "step" else torch.zeros_like(parameter)
            yield f"{name}.{kind}", states[kind]


def _rowwise_of_other_blocks(saved: Metadata, state: ModelState) -> dict[str, tuple[torch.Size, tuple[int, ...]]]:
    """Row-wise states that were saved under other column blocks, with their saved shape and the blocks' widths."""
    found = {}
    for entry in state.tables.entries():
        size = _saved_size(saved, f"tables.{entry.name}")
        if not entry.is_rowwise or size is None or size[0] != entry.value.size()[0]:
            continue
        widths = _saved_widths(saved, f"tables.{entry.name.rpartition('.')[0]}.weight")
        # A table of another width is another table: _misfits says so.
        if widths != entry.column_widths and sum(widths) == sum(entry.column_widths) and len(widths) == size[1]:
            found[entry.name] = size, widths
    return found


def _saved_widths(saved: Metadata, weight: str) -> tuple[int, ...]:
    """Widths of the column blocks that a table was saved in."""
    entry = saved.state_dict_metadata.get(weight)
    if not isinstance(entry, TensorStorageMetadata):
        return ()
    return tuple(width for _, width in sorted({(chunk.offsets[1], chunk.sizes[1]) for chunk in entry.chunks}))


def _misfits(saved: Metadata, wanted: dict[str, dict[str, Any]], skip: Container[str]) -> list[str]:
    """What of the model the checkpoint has in another shape or not at all, and states that would be dropped."""
    faults = []
    for group, tensors in wanted.items():
        for name, tensor in tensors.items():
            size = _saved_size(saved, f"{group}.{name}")
            if size is None:
                faults.append(f"{group} {name}: the model has {tuple(tensor.size())}, the checkpoint has none")
            elif size != tensor.size() and name not in skip:
                faults.append(f"{group} {name}: the model has {tuple(tensor.size())}, the checkpoint {tuple(size)}")
    here = {name.split(".")[0] for name in wanted["tables"]}
    for name in saved.state_dict_metadata:
        group, _, tensor_name = name.partition(".")
        if group == "tables" and tensor_name.split(".")[0] in here and tensor_name not in wanted["tables"]:
            faults.append(f"tables {tensor_name}: the checkpoint has it, the optimizer of the tables has none")
        if group == "dense_optimizer" and group in wanted and tensor_name not in wanted[group]:
            faults.append(f"{group} {tensor_name}: the checkpoint has it, the optimizer here has none")
    return faults


def _saved_size(saved: Metadata, name: str) -> torch.Size | None:
    entry = saved.state_dict_metadata.get(name)
    return entry.size if isinstance(entry, TensorStorageMetadata) else None


__all__ = ["CheckpointStore", "ModelState", "load_state", "verify"]
