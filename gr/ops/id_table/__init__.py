"""A map from raw 64-bit ids to the rows of a table, which admits ids and evicts them; reference.py defines it."""

import torch
from torch import Tensor

from gr.ops.backend import backend_for
from gr.ops.id_table.native import count_ids_native, id_table_native
from gr.ops.id_table.reference import (
    EMPTY,
    MOST_COUNT,
    MOST_SETS,
    IdTable,
    Step,
    count_ids_reference,
    find_reference,
    id_table_reference,
    set_of,
    tag_of,
)

__all__ = [
    "EMPTY",
    "MOST_COUNT",
    "MOST_SETS",
    "IdTable",
    "Step",
    "count_ids",
    "find_rows",
    "id_table_step",
    "set_of",
    "tag_of",
]


def count_ids(ids_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(distinct ids [U] in any order, how often each occurs [U], the place of each of ids_T among them [T]), all int64.

    ids_T: int64 on the CPU.
    """
    return (count_ids_native if backend_for(ids_T.device) == "native" else count_ids_reference)(ids_T)


def id_table_step(table: IdTable, ids_U: Tensor, uses_U: Tensor, stamp: float, min_count: int = 1) -> Step:
    """One step of the table, in place, on the CPU; see reference.py. The same bits under every implementation.

    ids_U: int64, distinct, none of them EMPTY. uses_U: int64. stamp: above 0; of this step under LRU, what a use counts
    under LFU. Raises ValueError for tensors of other shapes or dtypes, and for an id of another rank's sets.
    """
    if ids_U.shape != uses_U.shape or ids_U.dtype != torch.int64 or uses_U.dtype != torch.int64:
        raise ValueError("ids_U and uses_U must be int64 of one length")
    if table.score_SA.dtype not in (torch.int32, torch.float32) or not 0 < table.sets <= MOST_SETS:
        raise ValueError(f"score_SA must be int32 or float32, and sets within 1..{MOST_SETS}")
    native = backend_for(ids_U.device) == "native"
    return (id_table_native if native else id_table_reference)(table, ids_U, uses_U, stamp, min_count)


def find_rows(key_SA: Tensor, tag_SA: Tensor, ids_T: Tensor, *, first: int = 0, sets: int | None = None) -> Tensor:
    """The row of each id, int64 [T], in a table that stays as it is; way 0 of its set for an id without a row.

    key_SA, tag_SA: as in IdTable, of the sets from `first` on, of all of them unless `sets` says how many there are.
    ids_T: int64 on the CPU, distinct or not. Raises ValueError for tensors of other shapes, and for an id of other
    sets.
    """
    sets = len(key_SA) if sets is None else sets
    if backend_for(ids_T.device) == "native":
        return torch.ops.gr.id_table_find(key_SA, tag_SA, first, sets, ids_T)
    return find_reference(key_SA, first, sets, ids_T)
