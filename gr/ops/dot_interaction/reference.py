"""DLRM's dot interaction (arXiv 1906.00091, section 2.1.3), in plain PyTorch: the definition. Letters: __init__."""

import torch
from torch import Tensor


def dot_interaction_reference(dense_BD: Tensor | None, vectors_BFD: Tensor, diagonal: int) -> Tensor:
    vectors_BTD = vectors_BFD if dense_BD is None else torch.cat([dense_BD[:, None], vectors_BFD], dim=1)
    T = vectors_BTD.shape[1]
    products_BTT = torch.bmm(vectors_BTD, vectors_BTD.mT)
    i, j = torch.triu_indices(T, T, diagonal, device=vectors_BTD.device)
    pairs = products_BTT.flatten(1).index_select(1, i * T + j)
    return pairs if dense_BD is None else torch.cat([dense_BD, pairs], dim=1)
