"""Logits of a few sampled items for every token, the core of sampled-softmax losses.

T tokens, S samples a token, K items, D width.
"""

import torch
from torch import Tensor

from gr.ops.backend import backend_for
from gr.ops.checks import FLOAT_DTYPES
from gr.ops.sampled_logits.chunked import sampled_logits_chunked
from gr.ops.sampled_logits.native import sampled_logits_native
from gr.ops.sampled_logits.reference import sampled_logits_reference

__all__ = ["sampled_logits"]


def sampled_logits(queries_TD: Tensor, items_KD: Tensor, index_TS: Tensor) -> Tensor:
    """logits[t, s] = queries[t] . items[index[t, s]], without a [T, S, D] tensor.

    queries_TD [T, D], items_KD [K, D]: float32, bfloat16, float16 or float64 (the last runs the definition). Half
    precisions are accumulated in float32. index_TS: int64 [T, S], rows of items_KD.
    Returns [T, S] in the dtype of queries. Gradients: queries and items (dense), neither through a [T, S, D] tensor.
    Results of the C++ and Triton paths are the same bits every time, and on any number of threads.
    Raises ValueError if shapes or dtypes do not fit, IndexError if an index lies outside [0, K).
    Source: the sampled softmax of arXiv 2402.17152, as in the public research code (uniform negatives per position).
    """
    check_arguments(queries_TD, items_KD, index_TS)
    if queries_TD.dtype == torch.float64:
        return sampled_logits_reference(queries_TD, items_KD, index_TS)
    match backend_for(queries_TD.device):
        case "native":
            return sampled_logits_native(queries_TD, items_KD, index_TS)
        case "triton":
            from gr.ops.sampled_logits.triton import sampled_logits_triton  # CPU machines have no triton

            return sampled_logits_triton(queries_TD, items_KD, index_TS)
        case "torch":
            return sampled_logits_chunked(queries_TD, items_KD, index_TS)


def check_arguments(queries_TD: Tensor, items_KD: Tensor, index_TS: Tensor) -> None:
    if queries_TD.dim() != 2 or queries_TD.shape[1] == 0:
        raise ValueError(f"queries_TD must be [T, D] with D > 0, not {list(queries_TD.shape)}")
    if items_KD.dim() != 2 or items_KD.shape[1] != queries_TD.shape[1]:
        raise ValueError(f"items_KD must be [K, D] with D = {queries_TD.shape[1]}, not {list(items_KD.shape)}")
    if queries_TD.dtype not in FLOAT_DTYPES or items_KD.dtype != queries_TD.dtype:
        raise ValueError(
            f"queries_TD and items_KD must share a dtype of {', '.join(map(str, FLOAT_DTYPES))}; "
            f"they are {queries_TD.dtype} and {items_KD.dtype}"
        )
    if not queries_TD.device == items_KD.device == index_TS.device:
        raise ValueError(
            f"queries_TD, items_KD and index_TS differ in device: {queries_TD.device}, {items_KD.device}, "
            f"{index_TS.device}"
        )
    if index_TS.dtype != torch.int64 or index_TS.dim() != 2 or index_TS.shape[0] != queries_TD.shape[0]:
        raise ValueError(
            f"index_TS must be int64 [T, S] with T = {queries_TD.shape[0]}, not {index_TS.dtype} {list(index_TS.shape)}"
        )
