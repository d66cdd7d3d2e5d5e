"""Inputs and outputs of an operator under test."""

import torch
from torch import Tensor


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    """Normal values rounded to dtype, in float64."""
    return torch.randn(*shape).to(dtype).double()


def gradients(out: Tensor, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """out, and the gradient of every input."""
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]
