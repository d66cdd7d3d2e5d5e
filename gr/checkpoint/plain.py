"""The weights of a checkpoint in one process: no process group, no sharding, no optimizer states."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor

from gr.checkpoint.metadata import SafeReader, first_faults, misfits, read_metadata
from gr.errors import CheckpointError


def load_weights(
    path: Path, dense: Mapping[str, Tensor], tables: Mapping[str, Tensor], raw_ids: Mapping[str, Tensor]
) -> None:
    """Fills the tensors in place from the checkpoint at `path`, whatever plan and world size it was saved under.

    dense: parameters by name. tables: weights [rows, columns] by the table's name. raw_ids: the ids of tables with
    dynamic ids, by the checkpoint's names (IdMap.raw_ids). Checksums are not compared here.
    Raises CheckpointError where a tensor is missing or has another shape, or the checkpoint cannot be read.
    """
    saved = read_metadata(path)
    weights = {f"{name}.weight": weight for name, weight in tables.items()}
    expected = {"dense": dict(dense), "tables": {**weights, **raw_ids}}
    if faults := misfits(saved, expected):
        raise CheckpointError(f"{path} is of another model: {first_faults(faults)}")
    tensors_of_groups = {group: tensors for group, tensors in expected.items() if tensors}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is meant here
            dcp.load(tensors_of_groups, storage_reader=SafeReader(path), no_dist=True)
    except dcp.CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{path}: cannot be loaded: {cause}") from error
