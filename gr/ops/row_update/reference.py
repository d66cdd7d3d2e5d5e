"""The definition of an optimizer's update of the rows of a table that a batch looked up.

E rows of the table, T ids of the batch, R distinct ones among them, D columns. Rows that were not looked up stay as
they are, moments included, as under fbgemm's fused kernels: Adam's moments of a row decay only when it is looked up,
while the bias correction counts all steps.

An update is one of the functions below: it changes weight_RD and the states of these rows in place, all of one float
dtype. states: by fbgemm's names, [R, D] or, where a row has one number, [R]. steps: taken so far, with this one.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gr.ops.row_update.rounding import StochasticRounding

States = Mapping[str, Tensor]
RowRule = Callable[..., None]


def row_update_reference(
    rule: RowRule,
    weight_ED: Tensor,
    states: States,
    ids_T: Tensor,
    gradient_TD: Tensor,
    rounding: StochasticRounding | None,
    numbers: Mapping[str, float],
) -> None:
    """Applies `rule` with `numbers` (its keyword arguments) to the rows ids_T of weight_ED and of the states.

    Gradients of equal ids are summed first, in float64. The update is in float32, or in float64 for a table of it.
    """
    exact = torch.float64 if weight_ED.dtype == torch.float64 else torch.float32
    rows_R, place_T = ids_T.unique(return_inverse=True)
    summed_RD = torch.zeros(len(rows_R), gradient_TD.shape[1], dtype=torch.float64, device=gradient_TD.device)
    summed_RD.index_add_(0, place_T, gradient_TD.double())
    weight_RD = weight_ED[rows_R].to(exact)
    own = {name: state[rows_R] for name, state in states.items()}
    rule(weight_RD, summed_RD.to(exact), own, **numbers)
    for name, state in states.items():
        state[rows_R] = own[name]
    if rounding is not None and weight_ED.dtype in (torch.float16, torch.bfloat16):
        weight_ED[rows_R] = rounding(weight_RD, rows_R, weight_ED.dtype)
    else:
        weight_ED[rows_R] = weight_RD.to(weight_ED.dtype)


def sgd(weight_RD: Tensor, gradient_RD: Tensor, states: States, *, lr: float, steps: int) -> None:
    weight_RD.sub_(gradient_RD, alpha=lr)


def adagrad(weight_RD: Tensor, gradient_RD: Tensor, states: States, *, lr: float, steps: int, eps: float) -> None:
    """Duchi et al., JMLR 2011."""
    total_RD = states["sum"].addcmul_(gradient_RD, gradient_RD)
    weight_RD.addcdiv_(gradient_RD, total_RD.sqrt().add_(eps), value=-lr)


def rowwise_adagrad(
    weight_RD: Tensor, gradient_RD: Tensor, states: States, *, lr: float, steps: int, eps: float
) -> None:
    """Adagrad whose sum is one number a row, of the mean of the squares over its columns."""
    total_R = states["sum"].add_(gradient_RD.square().mean(1))
    weight_RD.addcdiv_(gradient_RD, total_R.sqrt().add_(eps)[:, None], value=-lr)


def adam(
    weight_RD: Tensor,
    gradient_RD: Tensor,
    states: States,
    *,
    lr: float,
    steps: int,
    eps: float,
    beta1: float,
    beta2: float,
) -> None:
    """Kingma and Ba, arXiv 1412.6980, algorithm 1."""
    mean_RD = states["exp_avg"].lerp_(gradient_RD, 1 - beta1)
    square_RD = states["exp_avg_sq"].mul_(beta2).addcmul_(gradient_RD, gradient_RD, value=1 - beta2)
    root_RD = (square_RD / (1 - beta2**steps)).sqrt_().add_(eps)
    weight_RD.addcdiv_(mean_RD, root_RD, value=-lr / (1 - beta1**steps))


def rowwise_adamw(
    weight_RD: Tensor,
    gradient_RD: Tensor,
    states: States,
    *,
    lr: float,
    steps: int,
    eps: float,
    beta1: float,
    beta2: float,
    weight_decay: float = 0.0,
) -> None:
    """Adam with one second moment a row, the mean over its columns, and decoupled decay (arXiv 1711.05101).

    weight -= lr * (mean / (sqrt(square) + eps) + weight_decay * weight), the moments corrected for their bias.
    """
    mean_RD = states["exp_avg"].lerp_(gradient_RD, 1 - beta1)
    square_R = states["exp_avg_sq"].lerp_(gradient_RD.square().mean(1), 1 - beta2)
    root_R = (square_R / (1 - beta2**steps)).sqrt_().add_(eps)
    weight_RD.mul_(1 - lr * weight_decay).addcdiv_(mean_RD, root_R[:, None], value=-lr / (1 - beta1**steps))
