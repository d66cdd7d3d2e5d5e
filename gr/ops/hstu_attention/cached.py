"""HSTU attention of new tokens against cached keys and values, of one sequence, without gradients.

M new tokens, N cached ones, H heads, Q width of q and k per head, V width of v per head, P tokens of the longest
sequence.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gr.ops.backend import backend_for
from gr.ops.hstu_attention.call import AttentionCall, Operands
from gr.ops.hstu_attention.mask import AttentionMask
from gr.ops.hstu_attention.native import native_dtype, native_operand
from gr.ops.hstu_attention.reference import hstu_attention_reference

CACHE_DTYPES = (torch.float32, torch.bfloat16)


class CachedKeys(NamedTuple):
    """Keys and values of one layer, float32 or bfloat16, any strides of rows and heads. length: int64 [1], the first so
    many of the N rows are tokens; the others have room for more."""

    k_NHQ: Tensor
    v_NHV: Tensor
    length: Tensor


def hstu_attention_cached(
    q_MHQ: Tensor,
    k_MHQ: Tensor,
    v_MHV: Tensor,
    cache: CachedKeys,
    *,
    candidates: bool,
    divisor: float,
    alpha: float = 1.0,
    mask: AttentionMask | None = None,
    position_bias: Tensor | None = None,
    time_bias: Tensor | None = None,
    bucket_ids: Tensor | None = None,
) -> Tensor:
    """The output of hstu_attention for the newest M tokens of a sequence, [M, H, V] in the dtype of q.

    q_MHQ, k_MHQ, v_MHV: float32 or bfloat16, of the new tokens. cache: of those before them.
    candidates: the new tokens are candidates, each of which sees the cached ones and itself. Otherwise they are the
        next tokens of the history, each of which sees the cached ones and the new ones up to itself.
    mask: as in hstu_attention, without num_targets_B. A prefix, and full attention for the newest tokens, are for
        candidates only: they let older tokens see newer ones, so no cache outlives the next event.
    position_bias: [2 P - 1]; time_bias: [buckets + 1]. bucket_ids: uint8, given with time_bias: [M, N + 1] of each
        candidate with every row of the cache, and itself in the last column; or [M, N + M], by tokens.
    On CPU the bits are those of hstu_attention on the whole sequence, whichever tokens were cached and however the
    candidates are split over calls. A bfloat16 cache is widened as it is read.
    Raises ValueError if shapes, dtypes or the mask do not fit.
    Source: M-FALCON, arXiv 2402.17152, section 3.4 and App. H.
    """
    mask = AttentionMask() if mask is None else mask
    _check(q_MHQ, k_MHQ, v_MHV, cache)
    _check_mask(mask, candidates)
    keys = cache.k_NHQ.shape[0] + (1 if candidates else q_MHQ.shape[0])
    if (time_bias is None) != (bucket_ids is None):
        raise ValueError("time_bias and bucket_ids are given together or not at all")
    if bucket_ids is not None and (bucket_ids.dtype != torch.uint8 or bucket_ids.shape != (q_MHQ.shape[0], keys)):
        raise ValueError(
            f"bucket_ids must be uint8 [{q_MHQ.shape[0]}, {keys}], not {bucket_ids.dtype} {list(bucket_ids.shape)}"
        )
    lengths = (mask.max_attn_len, mask.contextual_len, mask.min_full_attn_seq_len)
    if backend_for(q_MHQ.device) == "native":
        new = (native_operand(x, native_dtype(q_MHQ.dtype)) for x in (q_MHQ, k_MHQ, v_MHV))
        cached = (native_operand(x, x.dtype) for x in (cache.k_NHQ, cache.v_NHV))
        tables = (position_bias, time_bias, bucket_ids)
        return torch.ops.gr.hstu_attention_cached(
            *new, *cached, cache.length, *tables, 1.0 / divisor, alpha, candidates, *lengths
        ).to(q_MHQ.dtype)
    return hstu_attention_cached_reference(
        (q_MHQ, k_MHQ, v_MHV),
        cache,
        candidates=candidates,
        divisor=divisor,
        alpha=alpha,
        mask=mask,
        biases=(position_bias, time_bias, bucket_ids),
    )


def hstu_attention_start(
    q_THQ: Tensor,
    k_THQ: Tensor,
    v_THV: Tensor,
    length: Tensor,
    *,
    divisor: float,
    alpha: float = 1.0,
    mask: AttentionMask | None = None,
    position_bias: Tensor | None = None,
) -> Tensor:
    """hstu_attention of one sequence, whose first `length` rows (int64 [1]) are tokens; the other rows have no result.

    Raises ValueError if the mask does not fit.
    """
    mask = AttentionMask() if mask is None else mask
    if mask.num_targets_B is not None:
        raise ValueError("num_targets_B has no meaning for the start of a sequence, which has no candidates yet")
    if backend_for(q_THQ.device) != "native":
        call = AttentionCall(
            torch.cat([torch.zeros_like(length), length]),
            q_THQ.shape[0],
            q_THQ.new_full((1,), 1.0 / divisor),
            alpha,
            mask,
        )
        rows = int(length)
        out = hstu_attention_reference(Operands(q_THQ[:rows], k_THQ[:rows], v_THV[:rows], position_bias), call)
        return torch.cat([out, torch.zeros_like(v_THV[rows:])])
    q, k, v = (native_operand(x, native_dtype(q_THQ.dtype)) for x in (q_THQ, k_THQ, v_THV))
    offsets, scale = torch.cat([torch.zeros_like(length), length]), torch.full((1,), 1.0 / divisor)
    lengths = (mask.max_attn_len, mask.contextual_len, mask.min_full_attn_seq_len)
    out = torch.ops.gr.hstu_attention(q, k, v, offsets, scale, position_bias, None, None, None, alpha, None, *lengths)
    return out.to(q_THQ.dtype)


def hstu_attention_cached_reference(
    operands: tuple[Tensor, Tensor, Tensor],
    cache: CachedKeys,
    *,
    candidates: bool,
    divisor: float,
    alpha: float,
    mask: AttentionMask,
    biases: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> Tensor:
    """The definition, on any device and in any float dtype. operands, biases: in the order of the arguments above."""
    q_MHQ, k_MHQ, v_MHV = operands
    position_bias, time_bias, bucket_ids = biases
    M, N, device = q_MHQ.shape[0], int(cache.length), q_MHQ.device
    k = torch.cat([cache.k_NHQ[:N].to(q_MHQ.dtype), k_MHQ])
    v = torch.cat([cache.v_NHV[:N].to(q_MHQ.dtype), v_MHV])
    scores_HMK = alpha * torch.einsum("ihd,jhd->hij", q_MHQ, k)
    history = N if candidates else N + M
    if position_bias is not None:
        middle = position_bias.shape[0] // 2
        place_K = torch.arange(N + M, device=device).clamp(max=history)
        scores_HMK = scores_HMK + position_bias[middle + place_K[None] - place_K[N:, None]]
    if time_bias is not None and bucket_ids is not None:
        ids_MK = bucket_ids.long()
        if candidates:  # each has one column for itself, whichever candidate it is
            ids_MK = torch.cat([ids_MK[:, :N], ids_MK[:, -1:].expand(-1, M)], dim=1)
        scores_HMK = scores_HMK + time_bias[ids_MK[:, : N + M]]
    hidden_MK = ~mask.seen(N + M, torch.tensor(history))[N:].to(device)
    weights_HMK = (F.silu(scores_HMK) / divisor).masked_fill(hidden_MK, 0.0)
    return torch.einsum("hij,jhd->ihd", weights_HMK, v)


def _check(q_MHQ: Tensor, k_MHQ: Tensor, v_MHV: Tensor, cache: CachedKeys) -> None:
    if any(x.dim() != 3 for x in (q_MHQ, v_MHV, cache.k_NHQ, cache.v_NHV)) or k_MHQ.shape != q_MHQ.shape:
        raise ValueError(
            f"q, k, v and the cache must be [tokens, H, width], k as q: {list(q_MHQ.shape)}, {list(k_MHQ.shape)}, "
            f"{list(v_MHV.shape)}, {list(cache.k_NHQ.shape)}, {list(cache.v_NHV.shape)}"
        )
    heads = [list(x.shape[1:]) for x in (k_MHQ, v_MHV, cache.k_NHQ, cache.v_NHV)]
    if v_MHV.shape[:2] != q_MHQ.shape[:2] or heads[:2] != heads[2:] or cache.k_NHQ.shape[0] != cache.v_NHV.shape[0]:
        raise ValueError(f"the cache has heads of {heads[2]} and {heads[3]}, k and v of {heads[0]} and {heads[1]}")
    if cache.k_NHQ.dtype not in CACHE_DTYPES or cache.v_NHV.dtype != cache.k_NHQ.dtype:
        raise ValueError(f"the cache must be float32 or bfloat16, not {cache.k_NHQ.dtype} and {cache.v_NHV.dtype}")
    if not q_MHQ.dtype == k_MHQ.dtype == v_MHV.dtype or q_MHQ.dtype not in CACHE_DTYPES:
        raise ValueError(
            f"q, k and v must be all float32 or all bfloat16, not {q_MHQ.dtype}, {k_MHQ.dtype}, {v_MHV.dtype}"
        )
    if cache.length.dtype != torch.int64 or cache.length.shape != (1,):
        raise ValueError(f"the cache's length must be int64 [1], not {cache.length.dtype} {list(cache.length.shape)}")


def _check_mask(mask: AttentionMask, candidates: bool) -> None:
    if mask.num_targets_B is not None:
        raise ValueError("num_targets_B has no meaning against a cache: say candidates=True")
    if not candidates and (mask.contextual_len or mask.min_full_attn_seq_len):
        raise ValueError(
            f"contextual_len={mask.contextual_len} and min_full_attn_seq_len={mask.min_full_attn_seq_len} let older "
            "tokens see newer ones, so nothing can be appended to their cache"
        )
