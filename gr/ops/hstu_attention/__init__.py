"""HSTU attention on packed sequences: the pointwise (SiLU, no softmax) attention of arXiv 2402.17152.

T packed tokens, B sequences, H heads, Q width of q and k per head, V width of v per head, N max_length.
"""

import torch
from torch import Tensor

from gr.ops.backend import backend_for
from gr.ops.checks import FLOAT_DTYPES
from gr.ops.hstu_attention.blocked import hstu_attention_blocked
from gr.ops.hstu_attention.cached import CachedKeys, hstu_attention_cached, hstu_attention_start
from gr.ops.hstu_attention.call import AttentionCall, Operands
from gr.ops.hstu_attention.mask import AttentionMask
from gr.ops.hstu_attention.native import hstu_attention_native
from gr.ops.hstu_attention.reference import hstu_attention_reference
from gr.ops.hstu_attention.time_buckets import TimeBuckets, time_bucket_ids
from gr.ops.jagged import check_offsets

__all__ = [
    "AttentionMask",
    "CachedKeys",
    "TimeBuckets",
    "hstu_attention",
    "hstu_attention_cached",
    "hstu_attention_start",
    "time_bucket_ids",
]


def hstu_attention(
    q_THQ: Tensor,
    k_THQ: Tensor,
    v_THV: Tensor,
    offsets_B1: Tensor,
    *,
    max_length: int,
    divisor: float | Tensor,
    alpha: float = 1.0,
    mask: AttentionMask | None = None,
    output: Tensor | None = None,
    position_bias: Tensor | None = None,
    time_bias: Tensor | None = None,
    time_buckets: TimeBuckets | None = None,
) -> Tensor:
    """out_i = sum over the j <= i of the same sequence of silu(alpha q_i . k_j + bias_ij) / divisor_i * v_j.

    q_THQ, k_THQ [T, H, Q] and v_THV [T, H, V]: float32, bfloat16, float16 or float64, any strides.
    offsets_B1: int64 [B + 1], the bounds of the sequences; empty ones are fine.
    max_length: no sequence is longer, in tokens.
    divisor: positive; one number, or a float tensor [T] with one value a query. It gets no gradient.
    alpha: the factor of q_i . k_j; 1/sqrt(Q) in the production layer.
    mask: the keys that a query sees, where these are not all j <= i.
    output: the result of an earlier call with the same arguments. It is returned with gradients and not computed again
        (except in float64): for layers that rebuild their activations in the backward pass.
    position_bias: [2 N - 1], N = max_length. Entry (N - 1) + (j - i) is added to score (i, j); all candidates of a mask
        count as the token after the history.
    time_bias: [num_buckets + 1]. Entry time_buckets[i, j] is added to score (i, j). Heads share both tables.
    time_buckets: from time_bucket_ids, once a batch; given if and only if time_bias is. They do not combine with a
        contextual prefix, which sees keys ahead of itself.
    Returns [T, H, V] in the dtype of q. Gradients: q, k, v, position_bias, time_bias.
    C++ and Triton give the same bits every time, on any number of threads, whatever the other sequences of the batch.
    float64 runs the definition (reference.py), which is slow and meant for checks.
    Raises ValueError if shapes, dtypes or lengths do not fit.
    Source: arXiv 2402.17152, Eq. 2, with rab^{p,t} of App. A; the divisor follows the public code.
    """
    _check_values(q_THQ, k_THQ, v_THV)
    _check_devices(q_THQ.device, offsets_B1, divisor, position_bias, time_bias)
    check_offsets(offsets_B1, q_THQ.shape[0], max_length)
    _check_biases(position_bias, time_bias, time_buckets, max_length)
    _check_buckets(time_buckets, offsets_B1)
    if mask is not None:
        mask.check(offsets_B1)
        if mask.contextual_len and time_bias is not None:
            raise ValueError("contextual_len and time_bias do not combine: the prefix sees keys ahead, without buckets")
    if output is not None and (output.shape, output.dtype) != (v_THV.shape, v_THV.dtype):
        raise ValueError(f"output must be {v_THV.dtype} {list(v_THV.shape)}, not {output.dtype} {list(output.shape)}")
    call = AttentionCall(
        offsets_B1.contiguous(),
        max_length,
        _scale(divisor, q_THQ),
        alpha,
        AttentionMask() if mask is None or mask.causal else mask,
        time_buckets,
    )
    return _compute(Operands(q_THQ, k_THQ, v_THV, position_bias, time_bias, output), call)


def _compute(operands: Operands, call: AttentionCall) -> Tensor:
    if operands.q_THQ.dtype == torch.float64:
        return hstu_attention_reference(operands, call)
    position, time = (
        None if table is None else table.float().contiguous() for table in (operands.position_bias, operands.time_bias)
    )
    operands = operands._replace(position_bias=position, time_bias=time)
    match backend_for(operands.q_THQ.device):
        case "native":
            return hstu_attention_native(operands, call)
        case "triton":
            from gr.ops.hstu_attention.triton import hstu_attention_triton  # CPU machines have no triton

            return hstu_attention_triton(operands, call)
        case "torch":
            return hstu_attention_blocked(operands, call)


def _check_values(q_THQ: Tensor, k_THQ: Tensor, v_THV: Tensor) -> None:
    if q_THQ.dim() != 3 or v_THV.dim() != 3:
        raise ValueError(f"q_THQ and v_THV must have 3 dimensions, not {list(q_THQ.shape)} and {list(v_THV.shape)}")
    if k_THQ.shape != q_THQ.shape:
        raise ValueError(f"k_THQ must have the shape of q_THQ, {list(q_THQ.shape)}, not {list(k_THQ.shape)}")
    if v_THV.shape[:2] != q_THQ.shape[:2]:
        raise ValueError(f"v_THV must start with [T, H] = {list(q_THQ.shape[:2])}, not {list(v_THV.shape)}")
    if min(*q_THQ.shape[1:], *v_THV.shape[1:]) == 0:
        raise ValueError(f"H, Q and V must be positive: q_THQ is {list(q_THQ.shape)}, v_THV is {list(v_THV.shape)}")
    if q_THQ.dtype not in FLOAT_DTYPES:
        raise ValueError(f"q_THQ must be one of {', '.join(map(str, FLOAT_DTYPES))}, not {q_THQ.dtype}")
    if not q_THQ.dtype == k_THQ.dtype == v_THV.dtype:
        raise ValueError(f"q_THQ, k_THQ and v_THV differ in dtype: {q_THQ.dtype}, {k_THQ.dtype}, {v_THV.dtype}")
    if not q_THQ.device == k_THQ.device == v_THV.device:
        raise ValueError(f"q_THQ, k_THQ and v_THV differ in device: {q_THQ.device}, {k_THQ.device}, {v_THV.device}")


def _check_devices(device: torch.device, *others: object) -> None:
    for name, value in zip(("offsets_B1", "divisor", "position_bias", "time_bias"), others, strict=True):
        if isinstance(value, Tensor) and value.device != device:
            raise ValueError(f"{name} is on {value.device}, q_THQ on {device}")


def _check_biases(
    position_bias: Tensor | None,
    time_bias: Tensor | None,
    time_buckets: TimeBuckets | None,
    max_length: int,
) -> None:
    if position_bias is not None and position_bias.shape != (2 * max_length - 1,):
        raise ValueError(
            f"position_bias must be [2 * max_length - 1] = [{2 * max_length - 1}], not {list(position_bias.shape)}"
        )
    if (time_bias is None) != (time_buckets is None):
        raise ValueError("time_bias and time_buckets are given together or not at all")
    entries = 0 if time_buckets is None else time_buckets.num_buckets + 1
    if time_bias is not None and time_bias.shape != (entries,):
        raise ValueError(f"time_bias must be [num_buckets + 1] = [{entries}], not {list(time_bias.shape)}")


def _check_buckets(time_buckets: TimeBuckets | None, offsets_B1: Tensor) -> None:
    """Raise ValueError for the buckets of another batch, which would be read out of bounds."""
    if time_buckets is None:
        return
    bucket_offsets_B1 = time_buckets.offsets_B1
    if bucket_offsets_B1.device != offsets_B1.device:
        raise ValueError(f"time_buckets are on {bucket_offsets_B1.device}, offsets_B1 on {offsets_B1.device}")
    if bucket_offsets_B1.shape != offsets_B1.shape:
        raise ValueError(
            f"time_buckets have {bucket_offsets_B1.numel() - 1} sequences, offsets_B1 {offsets_B1.numel() - 1}"
        )
    if offsets_B1.device.type == "cpu" and not torch.equal(bucket_offsets_B1, offsets_B1):
        raise ValueError("time_buckets were made for sequences of other lengths than offsets_B1 has")


def _scale(divisor: float | Tensor, q_THQ: Tensor) -> Tensor:
    """1 / divisor, [1] or [T], in float32 or better, contiguous. Raises ValueError for a divisor that does not fit."""
    dtype = torch.promote_types(q_THQ.dtype, torch.float32)
    if not isinstance(divisor, Tensor):
        if not divisor > 0:
            raise ValueError(f"divisor must be positive, not {divisor}")
        return torch.full((1,), 1.0 / divisor, dtype=dtype, device=q_THQ.device)
    if divisor.shape != (q_THQ.shape[0],) or not divisor.is_floating_point():
        raise ValueError(
            f"divisor must be a number or a float tensor [T] = [{q_THQ.shape[0]}], "
            f"not {divisor.dtype} of {list(divisor.shape)}"
        )
    if divisor.requires_grad:
        raise ValueError("divisor gets no gradient: pass divisor.detach()")
    if divisor.device.type == "cpu" and divisor.numel() and not bool((divisor > 0).all()):
        raise ValueError(f"divisor must be positive; its smallest entry is {float(divisor.min())}")
    return divisor.to(dtype).reciprocal().contiguous()
