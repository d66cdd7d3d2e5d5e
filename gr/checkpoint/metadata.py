"""DCP's `.metadata`, read without running what is in it.

torch.distributed.checkpoint keeps it as a pickle and loads it with pickle.load, which runs whatever a stranger's file
names. This reader admits the classes that a checkpoint of tensors needs, and no others.
"""

import os
import pickle
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from gr.checkpoint.layout import METADATA
from gr.errors import CheckpointError
from gr.files import is_transient

FAULTS_SHOWN = 3
_ADMITTED = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "collections": {"OrderedDict"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ADMITTED.get(module, ()):
            raise pickle.UnpicklingError(f"{METADATA} names {module}.{name}, which no checkpoint of tensors has")
        return super().find_class(module, name)


class SafeReader(dcp.FileSystemReader):
    """DCP's reader of a folder, with `.metadata` restricted; tensors are read by torch with weights_only anyway."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._folder = path

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(self._folder)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_metadata(path: Path) -> Metadata:
    """The metadata of a checkpoint. Raises CheckpointError where it cannot be read or names anything but tensors."""
    try:
        with (path / METADATA).open("rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"{METADATA} holds a {type(metadata).__name__}")
        if not isinstance(metadata.storage_meta, StorageMeta | None):
            raise pickle.UnpicklingError(f"{METADATA} has no StorageMeta")
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise pickle.UnpicklingError(f"{name} is no tensor")
        for place in (metadata.storage_data or {}).values():
            if os.path.basename(place.relative_path) != place.relative_path:
                raise pickle.UnpicklingError(f"{METADATA} names a file of another folder: {place.relative_path}")
    except Exception as error:  # damaged metadata fails in as many ways as it can be damaged
        if is_transient(error):
            raise
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint: {error}; remove it to use the one before"
        ) from error
    return metadata


def saved_size(saved: Metadata, name: str) -> torch.Size | None:
    """The shape of a saved tensor, None where there is none of the name."""
    entry = saved.state_dict_metadata.get(name)
    return entry.size if isinstance(entry, TensorStorageMetadata) else None


def misfits(saved: Metadata, expected: Mapping[str, Mapping[str, Any]], skip: Container[str] = ()) -> list[str]:
    """The tensors that a checkpoint lacks or has in another shape. expected: group -> name -> tensor."""
    faults = []
    for group, tensors in expected.items():
        for name, tensor in tensors.items():
            size = saved_size(saved, f"{group}.{name}")
            if size is None:
                faults.append(f"{group} {name}: the model has {tuple(tensor.size())}, the checkpoint has none")
            elif size != tensor.size() and name not in skip:
                faults.append(f"{group} {name}: the model has {tuple(tensor.size())}, the checkpoint {tuple(size)}")
    return faults


def first_faults(faults: Sequence[str]) -> str:
    """The first few in one line, and how many there are beside them."""
    more = f"; and {len(faults) - FAULTS_SHOWN} more" if len(faults) > FAULTS_SHOWN else ""
    return "; ".join(faults[:FAULTS_SHOWN]) + more
