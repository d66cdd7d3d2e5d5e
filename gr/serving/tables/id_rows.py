"""The rows of raw ids in a version of a package: their map as of the checkpoint's step, mapped into memory.

ids.safetensors has, of each table with dynamic ids, the id of each row, int64 [sets, ways], and eight bits of its hash,
by which it is found (gr/ops/id_table). A hashed row is a function of the id. T ids.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gr.errors import ServingError
from gr.ops.id_table import find_rows
from gr.ops.splitmix64 import hashed_rows
from gr.serving.package.layout import RAW_ID_FILE, IdsRecord, Manifest
from gr.serving.package.weights import map_tensors

_ID, _TAG = "raw_id", "tag"


def id_tensors(raw_ids: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The tensors of ids.safetensors. raw_ids: the ids and tags of each table with dynamic ids, [sets, ways]."""
    return {
        f"{table}/{part}": tensor
        for table, both in raw_ids.items()
        for part, tensor in zip((_ID, _TAG), both, strict=True)
    }


class IdRows:
    """Rows of the columns whose ids are raw. It never changes, and may be asked by several threads at once."""

    def __init__(self, records: Mapping[str, IdsRecord], tensors: Mapping[str, Tensor]) -> None:
        """records: by column, of those with raw ids. tensors: as id_tensors names them. Raises ServingError."""
        self._records = records
        self._maps: dict[str, tuple[Tensor, Tensor]] = {}
        for record in records.values():
            if record.kind == "dynamic":
                key, tag = (tensors.get(f"{record.table}/{part}") for part in (_ID, _TAG))
                shape = (record.rows // (record.ways or 1), record.ways)
                if key is None or tag is None or not key.shape == tag.shape == shape:
                    raise ServingError(
                        f"{RAW_ID_FILE}: the ids of {record.table} are not those of {record.rows:,} rows; export again"
                    )
                self._maps[record.table] = key, tag
                find_rows(key, tag, key.new_empty(0))  # so that no request waits until the operator is built

    @classmethod
    def open(cls, folder: Path, manifest: Manifest) -> "IdRows":
        """The rows of a version. Raises ServingError where the file is not as the manifest says."""
        dynamic = any(record.kind == "dynamic" for record in manifest.ids.values())
        return cls(manifest.ids, map_tensors(folder / RAW_ID_FILE) if dynamic else {})

    def __bool__(self) -> bool:
        """Whether any column has raw ids."""
        return bool(self._records)

    def rows(self, column: str, ids_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The row of each id of a column, int64 [T], and whether it has none of its own and reads a shared one, [T].

        Where the ids of the column are rows, they come back.
        """
        record = self._records.get(column)
        if record is None:
            return ids_T, np.zeros(ids_T.shape, dtype=bool)
        ids = torch.from_numpy(np.ascontiguousarray(ids_T, dtype=np.int64))
        if record.kind == "hashed":
            return hashed_rows(ids, record.rows).numpy(), np.zeros(ids_T.shape, dtype=bool)
        assert record.ways is not None, "a dynamic table has ways"
        row_T = find_rows(*self._maps[record.table], ids.view(-1)).numpy().reshape(ids_T.shape)
        return row_T, row_T % record.ways == 0


ALL_DENSE = IdRows({}, {})  # ids are rows, in every column
