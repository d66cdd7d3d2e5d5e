"""Inputs and outputs of an operator under test."""

import torch
from torch import Tensor


def bfloat16_products() -> bool:
    """Whether this process has them: its CPU does, and ATEN_CPU_CAPABILITY does not forbid them."""
    return torch.cpu._is_avx512_bf16_supported() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    """Normal values rounded to dtype, in float64."""
    return torch.randn(*shape).to(dtype).double()


def gradients(out: Tensor, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """out, and the gradient of every input."""
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]
