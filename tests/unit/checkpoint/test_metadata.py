"""What a stranger's `.metadata` may not do."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from gr.checkpoint.layout import METADATA
from gr.checkpoint.metadata import read_metadata
from gr.errors import CheckpointError


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (str(self.mark),)


def plain(**parts: object) -> Metadata:
    tensor = TensorStorageMetadata(TensorProperties(dtype=torch.float16), torch.Size([3]), [])
    place = {MetadataIndex("dense.w", torch.Size([0])): _StorageInfo("__0_0.distcp", 0, 9)}
    return Metadata(**{"state_dict_metadata": {"dense.w": tensor}, "storage_data": place, **parts})


def written(folder: Path, content: object) -> Path:
    (folder / METADATA).write_bytes(pickle.dumps(content))
    return folder


def test_metadata_of_tensors_reads_back(tmp_path: Path) -> None:
    assert read_metadata(written(tmp_path, plain())).state_dict_metadata == plain().state_dict_metadata


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda mark: Evil(mark), "posix.mkdir, which no checkpoint of tensors has"),
        (lambda mark: plain(planner_data=Evil(mark)), "posix.mkdir"),
        (lambda mark: plain(planner_data=torch.nn.Linear), "torch.nn.modules.linear.Linear"),
        (lambda mark: [1, 2], "holds a list"),
        (lambda mark: plain(state_dict_metadata={"dense.w": BytesStorageMetadata()}), "BytesStorageMetadata"),
        (
            lambda mark: plain(storage_data={MetadataIndex("x"): _StorageInfo("../../secret", 0, 9)}),
            "a file of another folder: ../../secret",
        ),
        (lambda mark: plain(storage_meta="x"), "has no StorageMeta"),
        (lambda mark: plain(state_dict_metadata={"dense.w": 5}), "dense.w is no tensor"),
    ],
    ids=["the whole", "a part", "a class", "a list", "pickled values", "another folder", "no storage", "a number"],
)
def test_what_is_no_checkpoint_of_tensors_is_refused_and_not_run(
    tmp_path: Path, content: Callable[[Path], object], reason: str
) -> None:
    mark = tmp_path / "it ran"
    with pytest.raises(CheckpointError) as caught:
        read_metadata(written(tmp_path, content(mark)))
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert not mark.exists()
