"""The lookup of bags and the update of their rows by the C++ operators. Letters as in __init__."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gr.ops.row_update.native import RULES, numbers_of
from gr.ops.row_update.reference import RowRule, States


def pooled_lookup_native(weights: Sequence[Tensor], tables: Sequence[int], ids_T: Tensor, offsets: Tensor) -> Tensor:
    """pooled_lookup_reference, which raises IndexError for an id outside its table."""
    return torch.ops.gr.pooled_lookup(weights, tables, ids_T, offsets)


def pooled_update_native(
    gradient: Tensor,
    weights: Sequence[Tensor],
    states: Sequence[States],
    tables: Sequence[int],
    ids_T: Tensor,
    offsets: Tensor,
    rule: RowRule,
    numbers: Mapping[str, float],
) -> None:
    """pooled_update_reference."""
    number, names = RULES[rule]
    flat = [state[name] for state in states for name in names]
    torch.ops.gr.pooled_update(
        gradient.contiguous(), weights, flat, tables, ids_T, offsets, number, numbers_of(numbers)
    )
