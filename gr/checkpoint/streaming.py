"""DCP's writer without a copy of the tensors: row blocks, straight from their storage, checked and summed on the way.

torch.save writes the whole storage of a tensor, so DCP clones every tensor that is a part of one; and a table is a part
of the storage of its kernel. Here a block of rows is given a storage of its own, at the same memory. The checkpoints
are DCP's: a table merely has more chunks.
"""

import hashlib
import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.utils import serialization

BLOCK_BYTES = 64 << 20
_PIECE_BYTES = 1 << 18  # is written while it still is in a core's cache from being summed


class NotFiniteError(Exception):
    """A weight or state that is to be saved is infinite or not a number."""


class BlockPlanner(dcp.DefaultSavePlanner):
    """Plans the tensors of this rank as row blocks, and hands them to the writer as views.

    A block that is not finite raises NotFiniteError as it is written.
    """

    def __init__(self, tensors: dict[str, dict[str, Any]], is_main: bool) -> None:
        """tensors: group -> name -> Tensor, ShardedTensor or DTensor, all of them detached."""
        super().__init__()
        super().set_up_planner(tensors, is_coordinator=is_main)
        self.blocks: dict[MetadataIndex, Tensor] = {}
        plan = super().create_local_plan()
        self.plan = replace(plan, items=[block for item in plan.items for block in self._cut(item)])

    def _cut(self, item: WriteItem) -> Iterator[WriteItem]:
        tensor = super().lookup_object(item.index)
        if tensor.nbytes <= BLOCK_BYTES or tensor.dim() == 0:
            self.blocks[item.index] = tensor
            yield item
            return
        assert item.tensor_data is not None, "every item is a tensor"
        first, *others = item.tensor_data.chunk.offsets
        step = max(1, BLOCK_BYTES * len(tensor) // tensor.nbytes)
        for start in range(0, len(tensor), step):
            block = tensor[start : start + step]
            offsets = torch.Size([first + start, *others])
            chunk = replace(item.tensor_data.chunk, offsets=offsets, sizes=block.size())
            index = MetadataIndex(item.index.fqn, offsets)
            self.blocks[index] = block
            yield WriteItem(index, WriteItemType.SHARD, tensor_data=replace(item.tensor_data, chunk=chunk))

    def stage(self, buffers: MutableMapping[MetadataIndex, Tensor]) -> None:
        """Copies the blocks, so that they can be written while training goes on.

        buffers: those of the save before, which are used again; those that are missing are made, pinned for a GPU.
        """
        for index, block in self.blocks.items():
            if index not in buffers:
                buffers[index] = torch.empty(block.size(), dtype=block.dtype, pin_memory=block.is_cuda)
            self.blocks[index] = buffers[index].copy_(block, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Everything was set up with the tensors."""

    def create_local_plan(self) -> dcp.SavePlan:
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        block = self.blocks[index]
        if not _is_finite(block):
            raise NotFiniteError(index.fqn)
        return with_own_storage(block) if block.device.type == "cpu" else block


def _is_finite(block: Tensor) -> bool:
    """Whether every element is finite. A finite sum proves it at a twentieth of the cost, unless it overflows."""
    if not block.is_floating_point():
        return True
    return bool(block.sum(dtype=torch.float32).isfinite()) or bool(block.isfinite().all())


def octets(tensor: Tensor) -> Tensor:
    """The memory of a tensor as bytes, uint8 [N]; a copy where its rows do not lie together."""
    whole = tensor.contiguous()
    # A dimension of one element is contiguous whatever its stride, which view(-1) would keep.
    return whole.as_strided((whole.numel(),), (1,)).view(torch.uint8)


def with_own_storage(block: Tensor) -> Tensor:
    """The block as a tensor whose storage is its memory and no more; a copy where its rows do not lie together."""
    if not block.numel():  # numpy gives an empty array a stride of which no view can be made
        return torch.empty(block.size(), dtype=block.dtype)
    return torch.from_numpy(octets(block).numpy()).view(block.dtype).view(block.size())


class SummingWriter(dcp.FileSystemWriter):
    """Writes a rank's blocks, with the SHA-256 of its files in `digests`: file name -> digest.

    It raises the file system's error where a write fails: torch's own error for a file cut short hides it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, per_thread_copy_ahead=0)  # a block at a time, in the order of the plan
        self.fs = _SummingFiles()
        self.digests = self.fs.digests

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> torch.futures.Future:
        try:
            # The CRC of torch.save takes twice as long as SHA-256, which covers the same bytes.
            with serialization.config.patch({"save.compute_crc32": False}):  # type: ignore[attr-defined]
                return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


class _SummingFiles(FileSystem):
    """DCP's file system; what is written of data files is summed."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as file:
            name = os.path.basename(path)
            if mode != "wb" or not name.endswith(".distcp"):
                yield file
                return
            stream = _SummedFile(file)
            yield stream
            self.digests[name] = stream.digest.hexdigest()


class _SummedFile:
    """A file that is written from its start to its end."""

    def __init__(self, file: Any) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        octets = memoryview(data).cast("B")
        for start in range(0, len(octets), _PIECE_BYTES):
            piece = octets[start : start + _PIECE_BYTES]
            self.digest.update(piece)
            self.file.write(piece)
        return len(octets)

    def __getattr__(self, name: str) -> Any:
        """tell, flush, fileno and close are those of the file."""
        return getattr(self.file, name)
