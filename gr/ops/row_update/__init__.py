"""An optimizer's update of the rows of a table that a batch looked up: its cost follows the ids, not the table."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gr.ops.backend import backend_for
from gr.ops.row_update.native import RULES, row_update_native
from gr.ops.row_update.reference import RowRule, row_update_reference
from gr.ops.row_update.rounding import StochasticRounding

__all__ = ["StochasticRounding", "row_update"]


@torch.no_grad()
def row_update(
    rule: RowRule,
    weight_ED: Tensor,
    states: Mapping[str, Tensor],
    ids_T: Tensor,
    gradient_TD: Tensor,
    rounding: StochasticRounding | None = None,
    **numbers: float,
) -> None:
    """Updates the rows ids_T of weight_ED and of `states` in place; see reference.py, which defines it.

    rule: a function of reference.py, or one like them. weight_ED: fp32, fp64, fp16 or bf16. states: fp32 (fp64 for a
    table of it), [E, D] or [E]. ids_T: int64 in [0, E), repeats included. gradient_TD: fp32 (or fp64). numbers: keyword
    arguments of the rule. On CPU the bits are the same at any number of threads. Raises ValueError for other shapes and
    dtypes, IndexError for an id outside the table.
    """
    _check(weight_ED, states, ids_T, gradient_TD)
    native = rule in RULES and backend_for(weight_ED.device) == "native" if weight_ED.device.type == "cpu" else False
    update = row_update_native if native else row_update_reference
    update(rule, weight_ED, states, ids_T, gradient_TD, rounding, numbers)


def _check(weight_ED: Tensor, states: Mapping[str, Tensor], ids_T: Tensor, gradient_TD: Tensor) -> None:
    if gradient_TD.shape != (len(ids_T), weight_ED.shape[1]):
        raise ValueError(
            f"gradient_TD must be [{len(ids_T)}, {weight_ED.shape[1]}], one row for each id, not "
            f"{list(gradient_TD.shape)}"
        )
    exact = torch.float64 if weight_ED.dtype == torch.float64 else torch.float32
    for name, tensor in {"gradient_TD": gradient_TD, **states}.items():
        if tensor.dtype != exact:
            raise ValueError(f"{name} must be {exact} for a table of {weight_ED.dtype}, not {tensor.dtype}")
