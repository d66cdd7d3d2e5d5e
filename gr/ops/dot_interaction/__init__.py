"""Dot products of all pairs of an example's vectors.

B examples, F vectors of tables, T = F + 1 with the dense one (F without it), D their width.
"""

import torch
from torch import Tensor

from gr.ops.backend import backend_for
from gr.ops.dot_interaction.native import dot_interaction_native
from gr.ops.dot_interaction.reference import dot_interaction_reference

__all__ = ["dot_interaction", "dot_interaction_reference"]


def dot_interaction(dense_BD: Tensor | None, vectors_BFD: Tensor, *, diagonal: int) -> Tensor:
    """[x, <v_i, v_j> for i <= j - diagonal], float [B, D + pairs], row by row of the upper triangle; see reference.py.

    The vectors v are x = dense_BD and those of vectors_BFD after it; without x there are the products alone. diagonal:
    0 takes the product of each vector with itself too, 1 does not. The C++ is for float32 on CPU.
    """
    single = vectors_BFD.dtype == torch.float32 and (dense_BD is None or dense_BD.dtype == torch.float32)
    native = single and vectors_BFD.device.type == "cpu" and backend_for(vectors_BFD.device) == "native"
    return (dot_interaction_native if native else dot_interaction_reference)(dense_BD, vectors_BFD, diagonal)
