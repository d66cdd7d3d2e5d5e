"""Softmax cross-entropy over all items, computed from queries and item vectors. T tokens, K items, D width."""

import torch
from torch import Tensor

from gr.ops.linear_cross_entropy.chunked import linear_cross_entropy_chunked

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    queries_TD: Tensor,
    items_KD: Tensor,
    target_T: Tensor,
    *,
    scale: float,
    bias_K: Tensor | None = None,
    chunk: int = 1024,
) -> Tensor:
    """loss_t = -log softmax(scale * queries[t] items^T + bias)[target[t]], without a [T, K] tensor.

    queries_TD [T, D], items_KD [K, D]: float32, bfloat16 or float64; bfloat16 is computed in float32.
    target_T: int64 [T], rows of items_KD. scale: 1 / temperature. bias_K: [K], for example log multiplicities or
    -log q. chunk: the number of tokens whose [chunk, K] logits exist at one time.
    Returns the loss of each token, [T], float32 or float64. Gradients: queries, items (dense), bias.
    Raises ValueError if shapes or dtypes do not fit, IndexError if a CPU target lies outside [0, K).
    Source: the full softmax that the sampled loss of arXiv 2402.17152 approximates; recomputation by chunks follows
    Wijmans et al. 2024 (arXiv 2411.09009, "Cut Your Losses").
    """
    _check(queries_TD, items_KD, target_T, bias_K, chunk)
    dtype = torch.promote_types(queries_TD.dtype, torch.float32)
    return linear_cross_entropy_chunked(
        queries_TD.to(dtype),
        items_KD.to(dtype),
        target_T,
        scale=scale,
        bias_K=None if bias_K is None else bias_K.to(dtype),
        chunk=chunk,
    )


def _check(queries_TD: Tensor, items_KD: Tensor, target_T: Tensor, bias_K: Tensor | None, chunk: int) -> None:
    if queries_TD.dim() != 2 or items_KD.dim() != 2 or queries_TD.shape[1] != items_KD.shape[1]:
        raise ValueError(
            f"queries_TD and items_KD must be [T, D], [K, D], not {list(queries_TD.shape)} and {list(items_KD.shape)}"
        )
    if items_KD.shape[0] == 0:
        raise ValueError("items_KD has no rows, so there is nothing to choose from")
    if queries_TD.dtype != items_KD.dtype or not queries_TD.is_floating_point():
        raise ValueError(f"queries_TD and items_KD must share a float dtype: {queries_TD.dtype}, {items_KD.dtype}")
    tokens, items = queries_TD.shape[0], items_KD.shape[0]
    if target_T.dtype != torch.int64 or target_T.shape != (tokens,):
        raise ValueError(f"target_T must be int64 [{tokens}], not {target_T.dtype} of {list(target_T.shape)}")
    if target_T.device.type == "cpu" and tokens:
        low, high = (int(target) for target in target_T.aminmax())
        if low < 0 or high >= items:
            raise IndexError(f"target_T must lie in [0, {items}), the rows of items_KD; found {min(low, 0) or high}")
    if bias_K is not None and bias_K.shape != (items,):
        raise ValueError(f"bias_K must be [{items}], not {list(bias_K.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, not {chunk}")
