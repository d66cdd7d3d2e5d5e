"""The definition of HSTU attention. T packed tokens, H heads, Q width of q and k, V width of v, n length."""

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from gr.ops.hstu_attention.call import AttentionCall, Operands


def hstu_attention_reference(operands: Operands, call: AttentionCall) -> Tensor:
    """Eq. 2 of arXiv 2402.17152 on each sequence: (silu(alpha Q K^T + rab^{p,t}) / divisor, masked) V.

    Differentiable; any float dtype. operands.output is ignored.
    """
    q_THQ, k_THQ, v_THV, position_bias, time_bias, _ = operands
    outputs = [v_THV[:0]]
    for b, (start, end) in enumerate(itertools.pairwise(call.offsets_B1.tolist())):
        n, targets_B = end - start, call.mask.num_targets_B
        history = n if targets_B is None else n - int(targets_B[b])
        i_n1, j_1n = torch.arange(n, device=q_THQ.device)[:, None], torch.arange(n, device=q_THQ.device)[None, :]
        scores_Hnn = call.alpha * torch.einsum("ihd,jhd->hij", q_THQ[start:end], k_THQ[start:end])
        if position_bias is not None:
            middle = position_bias.shape[0] // 2  # the entry of distance 0
            distance_nn = j_1n.clamp(max=history) - i_n1.clamp(max=history)
            scores_Hnn = scores_Hnn + position_bias[middle + distance_nn]
        if time_bias is not None and call.time_buckets is not None:
            pair_nn = call.time_buckets.pair_offsets_B1[b] + i_n1 * (i_n1 + 1) // 2 + j_1n
            buckets_nn = call.time_buckets.ids_P[pair_nn.where(j_1n <= i_n1, 0)].long()
            scores_Hnn = scores_Hnn + time_bias[buckets_nn]
        scale_n1 = (call.scale_T if call.scale_T.numel() == 1 else call.scale_T[start:end]).to(q_THQ.dtype)[:, None]
        hidden_nn = ~call.mask.seen(n, torch.tensor(history, device=q_THQ.device))
        weights_Hnn = (F.silu(scores_Hnn) * scale_n1).masked_fill(hidden_nn, 0.0)
        outputs.append(torch.einsum("hij,jhd->ihd", weights_Hnn, v_THV[start:end]))
    return torch.cat(outputs)
