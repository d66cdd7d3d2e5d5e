"""The definition of HSTU attention. T packed tokens, H heads, Q width of q and k, V width of v, n length."""

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from gr.ops.hstu_attention.time_buckets import TimeBuckets


def hstu_attention_reference(
    q_THQ: Tensor,
    k_THQ: Tensor,
    v_THV: Tensor,
    offsets_B1: Tensor,
    *,
    scale_T: Tensor,
    position_bias: Tensor | None = None,
    time_bias: Tensor | None = None,
    time_buckets: TimeBuckets | None = None,
) -> Tensor:
    """Eq. 2 of arXiv 2402.17152 on each sequence: (silu(Q K^T + rab^{p,t}) / divisor, masked to j <= i) V.

    scale_T: 1 / divisor of each query, [T], or [1] for one of all. Differentiable; any float dtype.
    """
    outputs = [v_THV[:0]]
    bounds = offsets_B1.tolist()
    for b, (start, end) in enumerate(itertools.pairwise(bounds)):
        n = end - start
        i_n1, j_1n = torch.arange(n, device=q_THQ.device)[:, None], torch.arange(n, device=q_THQ.device)[None, :]
        scores_Hnn = torch.einsum("ihd,jhd->hij", q_THQ[start:end], k_THQ[start:end])
        if position_bias is not None:
            middle = position_bias.shape[0] // 2  # the entry of distance 0
            scores_Hnn = scores_Hnn + position_bias[middle + j_1n - i_n1]
        if time_bias is not None and time_buckets is not None:
            pair_nn = time_buckets.pair_offsets_B1[b] + i_n1 * (i_n1 + 1) // 2 + j_1n
            buckets_nn = time_buckets.ids_P[pair_nn.where(j_1n <= i_n1, 0)].long()
            scores_Hnn = scores_Hnn + time_bias[buckets_nn]
        scale_n1 = (scale_T if scale_T.numel() == 1 else scale_T[start:end]).to(q_THQ.dtype)[:, None]
        weights_Hnn = (F.silu(scores_Hnn) * scale_n1).tril()
        outputs.append(torch.einsum("hij,jhd->ihd", weights_Hnn, v_THV[start:end]))
    return torch.cat(outputs)
