"""Rows of saved tensors, read in order, whatever plan and world size they were saved under."""

import hashlib
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from gr.checkpoint.metadata import SafeReader, read_metadata
from gr.checkpoint.streaming import BLOCK_BYTES, octets
from gr.config.features import ID_MAP
from gr.errors import CheckpointError


class SavedRows:
    """The tensors of a checkpoint. Of a tensor that is read from its start to its end, every chunk is read once.

    tensors: their metadata by name, `dense.x`, `tables.item_id.weight`.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.metadata = path, read_metadata(path)
        named = sorted(self.metadata.state_dict_metadata.items())
        self.tensors = {name: entry for name, entry in named if isinstance(entry, TensorStorageMetadata)}
        self._reader = SafeReader(path)
        self._chunks: dict[str, list[ChunkStorageMetadata]] = {}
        self._held: dict[str, dict[MetadataIndex, Tensor]] = {}  # the chunks of the rows read last

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows first to last of a tensor; the whole of one without dimensions. Raises CheckpointError where it has
        holes.
        """
        size = self.tensors[name].size
        rows = torch.empty(size, dtype=self.dtype(name))
        if len(size):
            last = size[0] if last is None else last
            rows = torch.empty(last - first, *size[1:], dtype=self.dtype(name))
        filled, held = 0, {}
        for chunk in self._overlapping(name, first, last):
            index = MetadataIndex(name, chunk.offsets)
            before = self._held.get(name, {})
            held[index] = tensor = before[index] if index in before else self._load(index)
            if len(size):
                assert last is not None
                begin, end = max(first, chunk.offsets[0]), min(last, chunk.offsets[0] + chunk.sizes[0])
                tensor = tensor[begin - chunk.offsets[0] : end - chunk.offsets[0]]
                others = zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)
                place = (slice(begin - first, end - first), *(slice(at, at + length) for at, length in others))
                rows[place] = tensor
            else:
                rows.copy_(tensor)
            filled += tensor.numel()
        self._held[name] = {} if last is None or last == size[0] else held
        if filled != rows.numel():
            raise CheckpointError(f"{self.path}: {name} has {rows.numel()} numbers there, {filled} are saved")
        return rows

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].properties.dtype

    def row_bytes(self, name: str) -> int:
        return self.tensors[name].size[1:].numel() * self.dtype(name).itemsize

    def _overlapping(self, name: str, first: int, last: int | None) -> list[ChunkStorageMetadata]:
        if last is None:
            return self.tensors[name].chunks
        if name not in self._chunks:
            self._chunks[name] = sorted(self.tensors[name].chunks, key=lambda chunk: chunk.offsets)
        chunks = self._chunks[name]
        longest = max((chunk.sizes[0] for chunk in chunks), default=0)
        low = bisect_left(chunks, first - longest, key=lambda chunk: chunk.offsets[0])
        high = bisect_left(chunks, last, key=lambda chunk: chunk.offsets[0])
        return [chunk for chunk in chunks[low:high] if chunk.offsets[0] + chunk.sizes[0] > first]

    def _load(self, index: MetadataIndex) -> Tensor:
        place = self.metadata.storage_data[index]
        with (self.path / place.relative_path).open("rb") as file:
            return torch.load(self._reader._slice_file(file, place), map_location="cpu", weights_only=True)


def blocks(rows: int, row_bytes: int, ways: int = 1) -> Iterator[tuple[int, int]]:
    """First and last row of each block of rows, in order; each has whole sets of `ways` rows."""
    step = max(1, BLOCK_BYTES // max(1, ways * row_bytes)) * ways
    return ((first, min(first + step, rows)) for first in range(0, rows, step))


@dataclass(frozen=True)
class TableRows:
    """The tensors of a checkpoint that have a part for each row of a table.

    in_one: by the tensor's name, the rows of the table in one row of the tensor. That is 1, but for the map of dynamic
    ids, which is saved by sets: there it is the ways of a set.
    """

    name: str
    in_one: dict[str, int] = field(default_factory=dict)

    @property
    def raw_id(self) -> str:
        """The name of the tensor of raw ids, where the table has dynamic ids."""
        return f"tables.{self.name}{ID_MAP}.raw_id"

    def blocks(self, saved: SavedRows) -> Iterator[tuple[int, int]]:
        """First and last row of each block of rows, in order; each has whole sets."""
        name, in_one = next(iter(self.in_one.items()))
        row_bytes = sum(saved.row_bytes(name) // in_one for name, in_one in self.in_one.items())
        return blocks(saved.tensors[name].size[0] * in_one, row_bytes, max(self.in_one.values()))

    def read(self, saved: SavedRows, name: str, first: int, last: int) -> Tensor:
        """Rows first to last of the table, [last - first, columns], of one of its tensors."""
        in_one = self.in_one[name]
        return saved.read(name, first // in_one, last // in_one).view(last - first, -1)


def tables_of(saved: SavedRows) -> dict[str, TableRows]:
    """The tables of a checkpoint. The counters of ids without a row are a table by themselves, of as many rows."""
    tables: dict[str, TableRows] = {}
    for name in saved.tensors:
        group, _, rest = name.partition(".")
        if group != "tables":
            continue
        table, _, tensor = rest.rpartition(".")
        in_one = 1
        if table.endswith(ID_MAP):
            in_one = saved.tensors[f"tables.{table}.raw_id"].size[1]
            table = rest if tensor == "seen" else table.removesuffix(ID_MAP)
        tables.setdefault(table, TableRows(table)).in_one[name] = in_one
    return tables


class StateDigest:
    """SHA-256 of all tensors of a checkpoint: the same whatever chunks, files and ranks they lie in.

    It is that of a list of names, types, sizes and each tensor's own SHA-256, of its rows in order.
    """

    def __init__(self, saved: SavedRows) -> None:
        self._saved = saved
        self._digests = {name: hashlib.sha256() for name in saved.tensors}

    def add(self, name: str, rows: Tensor) -> None:
        """The next rows of a tensor."""
        self._digests[name].update(octets(rows).numpy().data)

    def hexdigest(self) -> str:
        lines = (
            f"{name} {self._saved.dtype(name)} {tuple(entry.size)} {self._digests[name].hexdigest()}\n"
            for name, entry in self._saved.tensors.items()
        )
        return hashlib.sha256("".join(lines).encode()).hexdigest()
