"""The update of looked-up rows by the C++ operator. Letters as in reference.py."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gr.ops.row_update import reference
from gr.ops.row_update.reference import RowRule
from gr.ops.row_update.rounding import StochasticRounding

# The rules that row_update.cpp has, by its numbers, and the states of each, in the order in which it takes them.
RULES: dict[RowRule, tuple[int, tuple[str, ...]]] = {
    reference.sgd: (0, ()),
    reference.rowwise_adagrad: (1, ("sum",)),
    reference.adagrad: (2, ("sum",)),
    reference.adam: (3, ("exp_avg", "exp_avg_sq")),
    reference.rowwise_adamw: (4, ("exp_avg", "exp_avg_sq")),
}
_NUMBERS = ("lr", "eps", "beta1", "beta2", "weight_decay", "steps")


def numbers_of(numbers: Mapping[str, float]) -> list[float]:
    """The numbers of a rule, in the order of the C++ operators; 0 for those that it has not."""
    return [float(numbers.get(name, 0.0)) for name in _NUMBERS]


def row_update_native(
    rule: RowRule,
    weight_ED: Tensor,
    states: Mapping[str, Tensor],
    ids_T: Tensor,
    gradient_TD: Tensor,
    rounding: StochasticRounding | None,
    numbers: Mapping[str, float],
) -> None:
    """row_update_reference on CPU. Raises IndexError for an id outside the table."""
    number, names = RULES[rule]
    # Stable: the gradients of one row are summed in the order of the batch.
    sorted_ids, order = ids_T.sort(stable=True)
    draws = [] if rounding is None else [rounding.start, rounding.row, rounding.column, rounding.columns]
    torch.ops.gr.row_update(
        weight_ED,
        [states[name] for name in names],
        sorted_ids,
        order,
        gradient_TD.contiguous(),
        number,
        numbers_of(numbers),
        draws,
    )
