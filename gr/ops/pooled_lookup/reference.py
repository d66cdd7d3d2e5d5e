"""Sums of the rows of bags and the update of these rows, in plain PyTorch: the definition. Letters as in __init__."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from gr.ops.row_update import row_update
from gr.ops.row_update.reference import RowRule, States


def pooled_lookup_reference(weights: Sequence[Tensor], tables: Sequence[int], ids_T: Tensor, offsets: Tensor) -> Tensor:
    return torch.cat([_sums(weights[table], *bags) for table, *bags in _features(tables, ids_T, offsets)], dim=1)


def pooled_update_reference(
    gradient: Tensor,
    weights: Sequence[Tensor],
    states: Sequence[States],
    tables: Sequence[int],
    ids_T: Tensor,
    offsets: Tensor,
    rule: RowRule,
    numbers: Mapping[str, float],
) -> None:
    """Each id of a bag has the gradient of the bag's sum; features of one table are updated as one batch."""
    columns = gradient.split([weights[table].shape[1] for table in tables], dim=1)
    features = list(_features(tables, ids_T, offsets))
    for table, weight in enumerate(weights):
        own = [(ids, g, bounds.diff()) for g, (at, ids, bounds) in zip(columns, features, strict=True) if at == table]
        if own:
            ids = torch.cat([ids for ids, _, _ in own])
            gradients = torch.cat([g.repeat_interleave(lengths, dim=0) for _, g, lengths in own])
            row_update(rule, weight, states[table], ids, gradients, None, **numbers)


def _sums(weight_ED: Tensor, ids_T: Tensor, offsets_B1: Tensor) -> Tensor:
    wide = weight_ED.dtype if weight_ED.dtype == torch.float64 else torch.float32
    rows_TD = weight_ED[ids_T].to(wide)
    bag_T = torch.repeat_interleave(torch.arange(len(offsets_B1) - 1), offsets_B1.diff())
    return rows_TD.new_zeros(len(offsets_B1) - 1, weight_ED.shape[1]).index_add_(0, bag_T, rows_TD)


def _features(tables: Sequence[int], ids_T: Tensor, offsets: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(table, ids, offsets of the bags [B + 1]) of each feature."""
    B = (len(offsets) - 1) // len(tables)
    for feature, table in enumerate(tables):
        bounds = offsets[feature * B : (feature + 1) * B + 1]
        yield table, ids_T[bounds[0] : bounds[-1]], bounds - bounds[0]
