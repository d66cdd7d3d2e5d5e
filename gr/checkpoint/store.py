"""Saves and loads a run: dense parameters, tables, optimizer states, step and data position.

Schedules and random draws are functions of (seed, step, rank), so the step is all that has to be kept of them.
"""

import shutil
import time
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
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
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from gr.checkpoint.checksums import sum_lines, write_sums
from gr.checkpoint.layout import CONFIG, FORMAT, PROGRESS, SHARED, CheckpointFolder, read_progress
from gr.checkpoint.metadata import SafeReader, first_faults, misfits, read_metadata, saved_size
from gr.checkpoint.streaming import BlockPlanner, NotFiniteError, SummingWriter
from gr.dist import World
from gr.errors import CheckpointError
from gr.files import DISK_FULL, is_transient, sha256_of, write_json, write_text
from gr.logging import get_logger

log = get_logger(__name__)
DENSE = "dense"


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
        # Copies of what is saved in the background. They are made now: new memory takes five times as long to fill,
        # and a host without room for them says so before training.
        self.buffers: dict[MetadataIndex, Tensor] = {}
        if asynchronous:
            BlockPlanner(_tensors(state), world.is_main).stage(self.buffers)
        if world.is_main:
            self.folder.path.mkdir(parents=True, exist_ok=True)
            self.folder.remove_partial()

    def save(self, progress: dict[str, Any], keep_last: int) -> None:
        """Saves the state as of progress["step"]. Asynchronous saves return once the tensors are copied.

        Raises CheckpointError on every rank, and saves nothing, when a weight or state of any rank is not finite, and
        where a fault of the disk will stay; OSError where it may pass. An asynchronous save raises them in the next
        save, or in finish().
        """
        self.finish()
        step, began = progress["step"], time.monotonic()
        partial, planner = self.folder.partial(step), BlockPlanner(_tensors(self.state), self.world.is_main)
        with self._explained(step):
            self.savers.on_all(lambda: self._begin(partial, progress) if self.world.is_main else None)
        if self.group is None:
            self._write(planner, step, keep_last, began)
            return
        planner.stage(self.buffers)
        work = planner, step, keep_last, began
        self.pending = Thread(target=self._write_later, args=work, name="checkpoint")
        self.pending.start()

    def _begin(self, partial: Path, progress: dict[str, Any]) -> None:
        partial.mkdir(exist_ok=True)
        write_text(partial / CONFIG, self.config_yaml)
        write_json(partial / PROGRESS, {"format": FORMAT, "ranks": self.world.size, **progress})
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

    def _write_later(self, *work: Any) -> None:
        try:
            self._write(*work)
        except Exception as error:  # raised by finish(), in the thread that trains
            self.failure = error

    def _write(self, planner: BlockPlanner, step: int, keep_last: int, began: float) -> None:
        """Writes a checkpoint, and gives it its name once every rank has written. Raises on every rank."""
        writer = SummingWriter(self.folder.partial(step))
        with self._explained(step):
            dcp.save({}, storage_writer=writer, planner=planner, process_group=self.group)  # the planner has them
            # It has its name on every rank's return: none may look for it before.
            lines = self.savers.on_all(lambda: sum_lines(writer.digests))
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
        partial = self.folder.partial(step)
        shared = {name: sha256_of(partial / name) for name in (*SHARED, *self.artifacts)}
        write_sums(partial, [*lines, sum_lines(shared)])
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
            if isinstance(fault, NotFiniteError):
                raise CheckpointError(
                    f"weights are not finite after step {step} ({fault}): not saved; {self.folder.describe_latest()}"
                ) from None
            if is_transient(fault) or not isinstance(fault, OSError):
                raise fault from None
            why, remedy = fault.strerror or fault, "Make room there" if fault.errno in DISK_FULL else "Mend that"
            raise CheckpointError(
                f"step {step} cannot be saved under {self.folder.path}: {why}; {self.folder.describe_latest()}. "
                f"{remedy}, or set another run_dir with checkpoint.load_from, then start again"
            ) from error


def _cause(error: BaseException) -> BaseException:
    """The error of a rank; a lasting one comes before a transient one, and values that are not finite before both."""
    if not isinstance(error, dcp.CheckpointException):
        return error
    causes = [cause for cause, _ in error.failures.values()]
    lasting = [cause for cause in causes if isinstance(cause, OSError) and not is_transient(cause)]
    return next((cause for cause in causes if isinstance(cause, NotFiniteError)), [*lasting, *causes][0])


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
    remedy = "use another run_dir, or the configuration saved in the checkpoint (config.yaml)"
    _refuse(path, _misfits(saved, expected, skip=resharded), remedy, world)
    for name in resharded:
        expected["tables"].pop(name)
    fulls = {name: torch.empty(size) for name, (size, _) in resharded.items()}
    _read(path, expected)
    if fulls:  # not on every rank, so without collectives
        _read(path, {"tables": fulls}, no_dist=True)
    for entry in state.tables.entries():
        if entry.name in fulls:
            entry.fill_rowwise(fulls[entry.name], resharded[entry.name][1])
    state.tables.set_steps(progress["step"])
    return progress


def load_parts(path: Path, state: ModelState, parts: Collection[str], world: World) -> None:
    """Loads the weights of some tables, with the maps of their ids, and of the dense part where `dense` is named.

    Raises CheckpointError on every rank where one does not fit, or the checkpoint cannot be read.
    """
    read_progress(path)
    prefixes = tuple(prefix for name in parts for prefix in (f"{name}.weight", f"{name}/"))
    tables = {entry.name: entry.value for entry in state.tables.entries() if entry.name.startswith(prefixes)}
    expected: dict[str, dict[str, Any]] = {"tables": tables}
    if DENSE in parts:
        expected[DENSE] = {name: p.detach() for name, p in state.dense.items()}
    _refuse(path, misfits(read_metadata(path), expected), "leave it out of checkpoint.load_parts", world)
    _read(path, expected)


def _refuse(path: Path, faults: list[str], remedy: str, world: World) -> None:
    """Raises CheckpointError on every rank where a tensor of any rank does not fit."""
    if world.any(bool(faults)):
        faults.sort(key=lambda fault: not fault.startswith("tables"))
        shown = first_faults(faults) or "another rank says which tensors"
        raise CheckpointError(f"{path} is of another model: {shown}; {remedy}")


def _read(path: Path, tensors: dict[str, dict[str, Any]], no_dist: bool = False) -> None:
    """Fills the tensors in place, a row block at a time. Raises CheckpointError, or OSError where it may pass."""
    try:
        dcp.load(tensors, storage_reader=SafeReader(path), no_dist=no_dist)
    except dcp.CheckpointException as error:
        fault = _cause(error)
        if is_transient(fault) or not isinstance(fault, Exception):  # the latter: a rank was asked to stop
            raise fault from None
        raise CheckpointError(f"{path}: cannot be loaded: {fault}; remove it to use the one before") from error


def _tensors(state: ModelState) -> dict[str, dict[str, Any]]:
    """The tensors that DCP saves, and writes into when it loads: optimizer states are made where there are none yet."""
    tensors: dict[str, dict[str, Any]] = {
        DENSE: {name: p.detach() for name, p in state.dense.items()},
        "tables": {entry.name: entry.value for entry in state.tables.entries()},
    }
    if state.dense_optimizer is not None:
        tensors["dense_optimizer"] = dict(_dense_states(state, state.dense_optimizer))
    return tensors


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


__all__ = ["DENSE", "CheckpointStore", "ModelState", "load_parts", "load_state"]
