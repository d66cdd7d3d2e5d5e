"""A checkpoint of a checkpoint and the deltas that follow it, written a row block at a time."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from gr.checkpoint.delta import FILES, ROWS, Manifest, check_chain, finish, require_whole
from gr.checkpoint.saved_rows import SavedRows, StateDigest, blocks, tables_of
from gr.checkpoint.streaming import SummingWriter, with_own_storage
from gr.errors import CheckpointError, ConfigError
from gr.files import make_folder


def apply_deltas(base: Path, deltas: Sequence[Path], out: Path) -> Manifest:
    """Writes `base` with the deltas as the checkpoint `out`; returns the last delta's manifest.

    Every bit of its tensors is that of the checkpoint that the last delta was made from: their SHA-256 are compared.
    Whenever it is killed, the checkpoint is whole or not there. Raises CheckpointError for a delta that is missing,
    repeated, out of order or of another run, DamagedCheckpointError for a damaged file.
    """
    if out.exists():
        raise ConfigError(f"--out={out} exists: name another folder")
    manifests = check_chain(base, deltas)
    require_whole(base)
    saved, last = SavedRows(base), manifests[-1]
    draft = out.with_name(f".{out.name}.draft")
    if draft.exists():
        shutil.rmtree(draft)
    make_folder(draft, CheckpointError)
    planner = _Applied(saved, [_Changed(delta, manifest) for delta, manifest in zip(deltas, manifests, strict=True)])
    dcp.save({}, storage_writer=SummingWriter(draft), planner=planner, no_dist=True)
    if planner.before.hexdigest() != manifests[0].before:
        shutil.rmtree(draft)
        raise CheckpointError(
            f"{base} is not the step {manifests[0].since} that {deltas[0]} changes: it is of another run"
        )
    if planner.after.hexdigest() != last.after:
        shutil.rmtree(draft)
        raise CheckpointError(f"{deltas[-1]}: what it gives is not what was published (SHA-256 of all tensors)")
    for name in last.names:
        folders = [base, *(delta / FILES for delta in deltas)]
        (draft / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(next(each / name for each in reversed(folders) if (each / name).is_file()), draft / name)
    finish(draft, out)
    return last


class _Changed:
    """The changes of one delta: rows by table, in order, and whole tensors."""

    def __init__(self, delta: Path, manifest: Manifest) -> None:
        self.parts: dict[str, list[Any]] = {}  # files by the names of what is in them
        for file in (safe_open(delta / part, "pt") for part in manifest.parts):
            for name in file.keys():  # noqa: SIM118
                self.parts.setdefault(name, []).append(file)
        self.rows = {
            table: [file.get_tensor(ROWS + table) for file in self.parts[ROWS + table]] for table in manifest.rows
        }

    def whole(self, name: str) -> Tensor | None:
        return self.parts[name][0].get_tensor(name) if name in self.parts else None

    def put_rows(self, table: str, name: str, values: Tensor, first: int) -> None:
        """Overwrites the changed ones of `values`, of which the first is of row `first` of the table."""
        for file, rows in zip(self.parts.get(ROWS + table, ()), self.rows.get(table, ()), strict=True):
            low, high = torch.searchsorted(rows, torch.tensor([first, first + len(values)])).tolist()
            if low < high:
                values[rows[low:high] - first] = file.get_slice(name)[low:high]


class _Applied(dcp.DefaultSavePlanner):
    """Plans the tensors of a checkpoint in row blocks; each is read, and changed, when it is written."""

    def __init__(self, saved: SavedRows, changes: Sequence[_Changed]) -> None:
        super().__init__()
        self.saved, self.changes = saved, changes
        self.before, self.after = StateDigest(saved), StateDigest(saved)
        self.table_of = {name: table for table in tables_of(saved).values() for name in table.in_one}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Everything comes from the checkpoint."""

    def create_local_plan(self) -> dcp.SavePlan:
        items = [item for name in self.saved.tensors for item in self._items(name)]
        self.plan = dcp.SavePlan(items, planner_data=self.saved.metadata.planner_data)
        return self.plan

    def _items(self, name: str) -> list[WriteItem]:
        entry = self.saved.tensors[name]
        offsets = [torch.Size([0] * len(entry.size))]
        sizes = [entry.size]
        if name in self.table_of:
            bounds = list(blocks(entry.size[0], self.saved.row_bytes(name)))
            offsets = [torch.Size([first, *offsets[0][1:]]) for first, _ in bounds]
            sizes = [torch.Size([last - first, *entry.size[1:]]) for first, last in bounds]
        return [
            WriteItem(
                MetadataIndex(name, offset),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(ChunkStorageMetadata(offset, size), entry.properties, entry.size),
            )
            for offset, size in zip(offsets, sizes, strict=True)
        ]

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        assert write_item.tensor_data is not None
        name, chunk = write_item.index.fqn, write_item.tensor_data.chunk
        table = self.table_of.get(name)
        if table is None:
            rows = self.saved.read(name)
            self.before.add(name, rows)
            wholes = (changed.whole(name) for changed in self.changes)
            rows = [rows, *(whole for whole in wholes if whole is not None)][-1]
        else:
            first = chunk.offsets[0]
            rows, in_one = self.saved.read(name, first, first + chunk.sizes[0]), table.in_one[name]
            self.before.add(name, rows)
            by_row = rows.view(len(rows) * in_one, -1)
            for changed in self.changes:
                changed.put_rows(table.name, name, by_row, first * in_one)
        self.after.add(name, rows)
        return with_own_storage(rows)
