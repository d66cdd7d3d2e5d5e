"""The contents of a checkpoint, read from its metadata alone: no tensor is read."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from gr.checkpoint.layout import read_progress
from gr.checkpoint.metadata import read_metadata


@dataclass(frozen=True)
class SavedTensor:
    """shape: of the whole tensor. chunks: that it lies in."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int
    chunks: int


@dataclass(frozen=True)
class Contents:
    """tables: table -> `weight` or an optimizer state -> tensor. dense, dense_optimizer: by the parameter's name.

    ranks: of the run that saved it; None where an earlier release did. files: bytes by name.
    """

    path: str
    step: int
    ranks: int | None
    data: dict[str, Any]
    files: dict[str, int]
    tables: dict[str, dict[str, SavedTensor]] = field(default_factory=dict)
    dense: dict[str, SavedTensor] = field(default_factory=dict)
    dense_optimizer: dict[str, SavedTensor] = field(default_factory=dict)


def read_contents(path: Path) -> Contents:
    """The contents of the checkpoint folder `path`. Raises CheckpointError where it cannot be read."""
    progress, metadata = read_progress(path), read_metadata(path)
    files = sorted(each for each in path.rglob("*") if each.is_file())
    sizes = {each.relative_to(path).as_posix(): each.stat().st_size for each in files}
    contents = Contents(str(path), progress["step"], progress.get("ranks"), progress["data"], sizes)
    for name, entry in sorted(metadata.state_dict_metadata.items()):
        assert isinstance(entry, TensorStorageMetadata), "read_metadata admits nothing else"
        dtype = entry.properties.dtype
        saved = SavedTensor(
            tuple(entry.size), str(dtype).removeprefix("torch."), entry.size.numel() * dtype.itemsize, len(entry.chunks)
        )
        group, _, rest = name.partition(".")
        if group == "tables":
            table, _, kind = rest.rpartition(".")
            contents.tables.setdefault(table, {})[kind] = saved
        else:
            getattr(contents, group)[rest] = saved
    return contents
