"""Saves and loads a run: dense parameters, tables, optimizer states, step and data position.

Schedules and random draws are functions of (seed, step, rank), so the step is all that has to be kept of them.
"""

import shutil
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
from torch.distributed.tensor import DTensor

from gr.checkpoint.checksums import sums_of, write_sums
from gr.checkpoint.layout import CONFIG, FORMAT, PROGRESS, SHARED, CheckpointFolder, read_progress
from gr.checkpoint.metadata import SafeReader, first_faults, misfits, read_metadata, saved_size
from gr.dist import World
from gr.errors import CheckpointError
from gr.files import DISK_FULL, is_transient, write_json, write_text
from gr.logging import get_logger

log = get_logger(__name__)


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
    """The live tensors of a run; saving reads them and loading writes into them.

    dense_states: the optimizer's names of the tensors it keeps for a parameter, each a `scalar` or of its shape.
    """

    dense: dict[str, nn.Parameter]
    dense_optimizer: torch.optim.Optimizer | None
    tables: Tables
    dense_states: Mapping[str, str] = field(default_factory=dict)


class CheckpointStore:
    """The checkpoints of one run, written by all ranks together."""

    def __init__(
        self,
        folder: Path,
        state: ModelState,
        config_yaml: str,
        world: World,
        *,
        asynchronous: bool,
        artifacts: Mapping[str, bytes] | None = None,
    ) -> None:
        """artifacts: files to keep in every checkpoint, such as the data's schema.json: name -> content on rank 0."""
        self.folder = CheckpointFolder(folder)
        self.state, self.config_yaml, self.artifacts, self.world = state, config_yaml, artifacts or {}, world
        self.pending: Thread | None = None
        self.failure: Exception | None = None  # error of a save in the background
        newest = world.from_main(" ".join(map(str, self.folder.steps()[-1:])))
        self.complete = int(newest) if newest else None  # step of the newest
        self.seconds: float | None = None  # duration of the last save
        # A save in the background must not share collectives with training.
        self.group = dist.new_group(backend="gloo") if asynchronous else None
        self.savers = replace(world, host_group=self.group) if asynchronous else world
        if world.is_main:
            self.folder.path.mkdir(parents=True, exist_ok=True)
            self.folder.remove_partial()

    def save(self, progress: dict[str, Any], keep_last: int) -> None:
        """Saves the state as of progress["step"]. Asynchronous saves return once the tensors are copied.

        Raises CheckpointError on every rank, and saves nothing, when a weight or state of any rank is not finite, and
        where a fault of the disk will stay; OSError where it may pass.
        """
        self.finish()
        step, began = progress["step"], time.monotonic()
        tensors = _tensors(self.state)
        if self.world.any(not _all_finite(tensors)):
            raise CheckpointError(
                f"weights are not finite after step {step}: not saved; {self.folder.describe_latest()}"
            )
        partial = self.folder.partial(step)
        with self._explained(step):
            self.savers.on_all(lambda: self._begin(partial, progress) if self.world.is_main else None)
        if self.group is None:
            with self._explained(step):
                dcp.save(tensors, storage_writer=_Writer(partial))
                self._commit(step, keep_last, began)
            return
        future = dcp.async_save(
            tensors, storage_writer=_Writer(partial), process_group=self.group, async_stager=BlockingAsyncStager()
        )
        parameters = future, step, keep_last, began
        self.pending = Thread(target=self._commit_later, args=parameters, name="checkpoint-commit")
        self.pending.start()

    def _begin(self, partial: Path, progress: dict[str, Any]) -> None:
        partial.mkdir(exist_ok=True)
        write_text(partial / CONFIG, self.config_yaml)
        write_json(partial / PROGRESS, {"format": FORMAT, **progress})
        for name, content in self.artifacts.items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(content)

    def finish(self) -> None:
        """Waits for a save in the background. Raises what went wrong in it."""
        if self.pending is None:
            return
        self.pending.join()
        self.pending = None
        if self.failure is not None:
            raise self.failure

    def best(self, metric: str) -> tuple[int, float]:
        """The step with the best value of `metric` so far, and that value, on every rank.

        Step 0 and minus infinity where another metric chose, or none did.
        """
        best = self.folder.best() or {"step": None, "metric": None, "value": None}
        known = best["metric"] == metric and best["step"] in self.folder.steps()
        step, value = self.world.from_main(f"{best['step']} {best['value']}" if known else "0 -inf").split()
        return int(step), float(value)

    def mark_best(self, step: int, metric: str, value: float) -> None:
        """Marks a saved step as the best so far, on every rank's return."""
        self.finish()
        if self.world.is_main:
            self.folder.mark_best(step, metric, value)
        dist.barrier()

    def _commit_later(self, future: Future, step: int, keep_last: int, began: float) -> None:
        try:
            with self._explained(step):
                future.result()
                self._commit(step, keep_last, began)
        except Exception as error:  # raised by finish(), in the thread that trains
            self.failure = error

    def _commit(self, step: int, keep_last: int, began: float) -> None:
        """Gives the checkpoint its name once every rank has summed what it wrote. Raises OSError, on every rank."""
        partial = self.folder.partial(step)
        shared = [*SHARED, *self.artifacts]
        lines = self.savers.on_all(lambda: sums_of(partial, self.world.rank, shared))
        # It has its name on every rank's return: none may look for it before.
        self.savers.on_all(lambda: self._name(step, lines) if self.world.is_main else None)
        self.seconds, self.complete = time.monotonic() - began, step
        if self.world.is_main:
            try:
                self.folder.prune(keep_last)
            except OSError as error:
                log.warning(
                    "an older checkpoint cannot be removed: %s; what is left of it goes at the next start", error
                )

    def _name(self, step: int, lines: Sequence[str]) -> None:
        write_sums(self.folder.partial(step), lines)
        self.folder.commit(step)

    @contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        """Turns a fault of the disk that will stay into a CheckpointError, and makes room again."""
        try:
            yield
        except (dcp.CheckpointException, OSError) as error:
            if self.world.is_main:
                shutil.rmtree(self.folder.partial(step), ignore_errors=True)
            fault = _cause(error)
            if is_transient(fault) or not isinstance(fault, OSError):
                raise fault from None
            why, remedy = fault.strerror or fault, "Make room there" if fault.errno in DISK_FULL else "Mend that"
            raise CheckpointError(
                f"step {step} cannot be saved under {self.folder.path}: {why}; {self.folder.describe_latest()}. "
                f"{remedy}, or set another run_dir with checkpoint.load_from, then start again"
            ) from error


class _Writer(dcp.FileSystemWriter):
    """Says why a write failed: torch's own error for a file cut short hides the file system's."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> torch.futures.Future:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def _cause(error: BaseException) -> BaseException:
    """The error of a rank; a lasting one comes before a transient one."""
    if not isinstance(error, dcp.CheckpointException):
        return error
    causes = [cause for cause, _ in error.failures.values()]
    return next((cause for cause in causes if isinstance(cause, OSError) and not is_transient(cause)), causes[0])


def load_state(path: Path, state: ModelState, world: World) -> dict[str, Any]:
    """Loads a checkpoint into the live tensors, under whatever plan and world size; returns its progress.

    Checksums are not compared here: see verify(). Raises CheckpointError naming both shapes where a tensor does not
    fit, for an optimizer state that the model has no use for, and for a checkpoint that cannot be read; on every rank,
    whichever found the fault.
    """
    progress = read_progress(path)
    saved = read_metadata(path)
    expected = _tensors(state)
    if progress["step"] == 0 and not any(name.startswith("dense_optimizer.") for name in saved.state_dict_metadata):
        expected.pop("dense_optimizer", None)  # weights that came from elsewhere: the optimizer starts afresh
    resharded = _rowwise_of_other_blocks(saved, state)
    faults = _misfits(saved, expected, skip=resharded)
    if world.any(bool(faults)):
        faults.sort(key=lambda fault: not fault.startswith("tables"))
        shown = first_faults(faults) or "another rank says which tensors"
        raise CheckpointError(
            f"{path} is of another model: {shown}; use another run_dir, or the configuration saved in the "
            "checkpoint (config.yaml)"
        )
    for name in resharded:
        expected["tables"].pop(name)
    fulls = {name: torch.empty(size) for name, (size, _) in resharded.items()}
    try:
        dcp.load(expected, storage_reader=SafeReader(path))
        if fulls:  # not on every rank, so without collectives
            dcp.load({"tables": fulls}, storage_reader=SafeReader(path), no_dist=True)
    except dcp.CheckpointException as error:
        fault = _cause(error)
        if is_transient(fault) or not isinstance(fault, Exception):  # the latter: a rank was asked to stop
            raise fault from None
        raise CheckpointError(f"{path}: cannot be loaded: {fault}; remove it to use the one before") from error
    for entry in state.tables.entries():
        if entry.name in fulls:
            entry.fill_rowwise(fulls[entry.name], resharded[entry.name][1])
    state.tables.set_steps(progress["step"])
    return progress


def _tensors(state: ModelState) -> dict[str, dict[str, Any]]:
    """The tensors that DCP saves, and writes into when it loads: optimizer states are made where there are none yet."""
    tensors: dict[str, dict[str, Any]] = {
        "dense": {name: p.detach() for name, p in state.dense.items()},
        "tables": {entry.name: entry.value for entry in state.tables.entries()},
    }
    if state.dense_optimizer is not None:
        tensors["dense_optimizer"] = dict(_dense_states(state, state.dense_optimizer))
    return tensors


def _all_finite(tensors: dict[str, dict[str, Any]]) -> bool:
    """Whether every element of this rank's parts is finite."""
    for value in (tensor for group in tensors.values() for tensor in group.values()):
        if isinstance(value, ShardedTensor):
            parts = [shard.tensor for shard in value.local_shards()]
        else:
            parts = [value.to_local() if isinstance(value, DTensor) else value]
        if not all(bool(part.isfinite().all()) for part in parts):
            return False
    return True


def _dense_states(state: ModelState, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in state.dense.items():
        if not parameter.requires_grad:  # frozen: the optimizer does not have it
            continue
        states = optimizer.state[parameter]
        for kind, shape in state.dense_states.items():
            if kind not in states:
                scalar = torch.zeros((), dtype=torch.float32, device=parameter.device)
                states[kind] = scalar if shape == "scalar" else torch.zeros_like(parameter)
            yield f"{name}.{kind}", states[kind]


def _rowwise_of_other_blocks(saved: Metadata, state: ModelState) -> dict[str, tuple[torch.Size, tuple[int, ...]]]:
    """Row-wise states that were saved under other column blocks, with their saved shape and the blocks' widths."""
    mismatched = {}
    for entry in state.tables.entries():
        size = saved_size(saved, f"tables.{entry.name}")
        if not entry.is_rowwise or size is None or size[0] != entry.value.size()[0]:
            continue
        widths = _saved_widths(saved, f"tables.{entry.name.rpartition('.')[0]}.weight")
        # A table of another width is another table: _misfits says so.
        if widths != entry.column_widths and sum(widths) == sum(entry.column_widths) and len(widths) == size[1]:
            mismatched[entry.name] = size, widths
    return mismatched


def _saved_widths(saved: Metadata, weight: str) -> tuple[int, ...]:
    """Widths of the column blocks that a table was saved in."""
    entry = saved.state_dict_metadata.get(weight)
    if not isinstance(entry, TensorStorageMetadata):
        return ()
    return tuple(width for _, width in sorted({(chunk.offsets[1], chunk.sizes[1]) for chunk in entry.chunks}))


def _misfits(saved: Metadata, expected: dict[str, dict[str, Any]], skip: Container[str]) -> list[str]:
    """The faults of a checkpoint that does not fit: other shapes, missing tensors, states that would be dropped."""
    faults = misfits(saved, expected, skip)
    own_tables = {name.split(".")[0] for name in expected["tables"]}
    for name in saved.state_dict_metadata:
        group, _, tensor_name = name.partition(".")
        if group == "tables" and tensor_name.split(".")[0] in own_tables and tensor_name not in expected["tables"]:
            faults.append(f"tables {tensor_name}: the checkpoint has it, the optimizer of the tables has none")
        if group == "dense_optimizer" and group in expected and tensor_name not in expected[group]:
            faults.append(f"{group} {tensor_name}: the checkpoint has it, the optimizer here has none")
    return faults


__all__ = ["CheckpointStore", "ModelState", "load_state"]
