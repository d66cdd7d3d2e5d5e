"""The id table by the C++ operators. Letters as in reference.py."""

import torch
from torch import Tensor

from gr.ops.id_table.reference import IdTable, Step


def count_ids_native(ids_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """count_ids_reference; ids come in the order of their hashes, roughly, and so of their sets."""
    return torch.ops.gr.count_ids(ids_T.contiguous())


def id_table_native(table: IdTable, ids_U: Tensor, uses_U: Tensor, stamp: float, min_count: int) -> Step:
    """id_table_reference. Raises ValueError for an id of another rank's sets."""
    return Step(
        *torch.ops.gr.id_table_step(
            *(table.key_SA, table.score_SA, table.tag_SA, table.seen_SC, table.first, table.sets),
            *(ids_U, uses_U, stamp, min_count),
        )
    )
