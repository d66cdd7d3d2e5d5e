"""The dot interaction by the C++ operator. Letters as in __init__."""

from typing import Any

import torch
from torch import Tensor


def dot_interaction_native(dense_BD: Tensor | None, vectors_BFD: Tensor, diagonal: int) -> Tensor:
    """dot_interaction_reference on CPU, of float32."""
    dense_BD = None if dense_BD is None else dense_BD.contiguous()
    return _DotInteraction.apply(dense_BD, vectors_BFD.contiguous(), diagonal)


class _DotInteraction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dense_BD: Tensor | None, vectors_BFD: Tensor, diagonal: int) -> Tensor:
        ctx.save_for_backward(dense_BD, vectors_BFD)
        ctx.diagonal = diagonal
        return torch.ops.gr.dot_interaction(dense_BD, vectors_BFD, diagonal)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        dense_BD, vectors_BFD = ctx.saved_tensors
        d_dense, d_vectors = torch.ops.gr.dot_interaction_backward(
            gradient.contiguous(), dense_BD, vectors_BFD, ctx.diagonal
        )
        return None if dense_BD is None else d_dense, d_vectors, None
