"""How far a fast path may be from its definition in float64: the one table, by dtype, for every operator test."""

import torch
from torch import Tensor

# Norm of the difference over norm of the reference.
RELATIVE_ERROR = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 5e-3, torch.float64: 1e-12}


def relative_error(actual: Tensor, reference: Tensor) -> float:
    """NaN or infinity anywhere gives NaN; a reference of zeros asks for exact zeros."""
    difference = (actual.detach().double() - reference.detach().double()).norm()
    norm = reference.detach().double().norm()
    return float(difference / norm) if norm > 0 else float(difference)


def assert_near(actual: Tensor, reference: Tensor, dtype: torch.dtype, name: str) -> None:
    """dtype: what the fast path was given; its gradients of float32 tables follow the same rule."""
    assert actual.shape == reference.shape, f"{name}: shape {list(actual.shape)}, expected {list(reference.shape)}"
    error = relative_error(actual, reference)
    assert error < RELATIVE_ERROR[dtype], f"{name}: relative error {error:.1e}, allowed {RELATIVE_ERROR[dtype]:.0e}"
