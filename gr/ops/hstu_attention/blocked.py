"""HSTU attention in plain torch, for machines without a compiler and for other devices. Letters as in reference.py.

Sequences with the same number of blocks share one batched product, and a block of queries meets only the keys up to its
own end: no work is spent on padding beyond the edge of a block. Scores are recomputed in the backward pass.
G sequences of a group, n their length padded to whole blocks, r rows of one block of queries, c the keys it sees.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gr.ops.hstu_attention.time_buckets import TimeBuckets

_BLOCK = 64


def hstu_attention_blocked(
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
    """As hstu_attention_reference, on any device. Half precisions are computed in float32: the bias needs it."""
    compute = torch.float64 if q_THQ.dtype == torch.float64 else torch.float32
    position = None if position_bias is None else position_bias.to(compute)
    time = None if time_bias is None else time_bias.to(compute)
    out_THV = _Blocked.apply(
        q_THQ.to(compute),
        k_THQ.to(compute),
        v_THV.to(compute),
        position,
        time,
        offsets_B1,
        scale_T.to(compute),
        time_buckets,
    )
    return out_THV.to(q_THQ.dtype)


@dataclass(frozen=True)
class _Group:
    """Sequences with the same number of blocks. Tokens past the end of a sequence point at row T, which is zero."""

    tokens_Gn: Tensor
    lengths_G: Tensor
    pair_starts_G: Tensor | None

    def take(self, x_THD: Tensor) -> Tensor:
        """[T, H, D] to [G, H, n, D]."""
        return F.pad(x_THD, (0, 0, 0, 0, 0, 1))[self.tokens_Gn].transpose(1, 2).contiguous()

    def put(self, x_GHnD: Tensor, out_THD: Tensor) -> None:
        """The inverse of take, into an output with one row more than there are tokens."""
        out_THD[self.tokens_Gn] = x_GHnD.transpose(1, 2).to(out_THD.dtype)


def _groups(offsets_B1: Tensor, time_buckets: TimeBuckets | None) -> Iterator[_Group]:
    lengths_B = offsets_B1.diff()
    blocks_B = (lengths_B + _BLOCK - 1) // _BLOCK
    for blocks in blocks_B.unique().tolist():
        if blocks == 0:
            continue
        members_G = (blocks_B == blocks).nonzero().flatten()
        position_n = torch.arange(blocks * _BLOCK, device=offsets_B1.device)
        inside_Gn = position_n < lengths_B[members_G][:, None]
        tokens_Gn = (offsets_B1[members_G][:, None] + position_n).where(inside_Gn, offsets_B1[-1])
        pair_starts_G = None if time_buckets is None else time_buckets.pair_offsets_B1[members_G]
        yield _Group(tokens_Gn, lengths_B[members_G], pair_starts_G)


@dataclass(frozen=True)
class _Bias:
    """The two tables, and where the scores of a block of queries [start, start + r) find their entries."""

    position: Tensor | None
    time: Tensor | None
    time_buckets: TimeBuckets | None

    def position_index(self, start: int, device: torch.device) -> Tensor:
        """int64 [r, c]. Clamped for pairs outside the mask, whose scores are not used."""
        assert self.position is not None
        i_r1, j_1c = _pairs(start, device)
        return (self.position.shape[0] // 2 + j_1c - i_r1).clamp(0, self.position.shape[0] - 1)

    def time_index(self, group: _Group, start: int) -> Tensor:
        """uint8 [G, r, c]; the first pair of the batch stands in for pairs outside the mask."""
        assert self.time_buckets is not None and group.pair_starts_G is not None
        i_r1, j_1c = _pairs(start, group.tokens_Gn.device)
        visible_Grc = (j_1c <= i_r1) & (i_r1 < group.lengths_G[:, None, None])
        pair_Grc = group.pair_starts_G[:, None, None] + i_r1 * (i_r1 + 1) // 2 + j_1c
        return self.time_buckets.ids_P[pair_Grc.where(visible_Grc, 0)]

    def add_to(self, scores_GHrc: Tensor, group: _Group, start: int) -> None:
        if self.position is not None:
            scores_GHrc += self.position[self.position_index(start, scores_GHrc.device)]
        if self.time is not None:
            scores_GHrc += self.time[self.time_index(group, start).long()][:, None]

    def add_gradients(self, dscores_GHrc: Tensor, group: _Group, start: int, dposition: Tensor, dtime: Tensor) -> None:
        if self.position is not None:
            index_rc = self.position_index(start, dscores_GHrc.device)
            dposition.index_add_(0, index_rc.flatten(), dscores_GHrc.sum((0, 1)).flatten().to(dposition.dtype))
        if self.time is not None:
            ids = self.time_index(group, start).flatten()
            weights = dscores_GHrc.sum(1).flatten().to(dtime.dtype)
            dtime += torch.bincount(ids, weights, minlength=dtime.numel())


def _pairs(start: int, device: torch.device) -> tuple[Tensor, Tensor]:
    end = start + _BLOCK
    return torch.arange(start, end, device=device)[:, None], torch.arange(end, device=device)[None, :]


def _scales(group: _Group, scale_T: Tensor) -> Tensor:
    """1 / divisor as [G, 1, n, 1], zero past the end of a sequence; [1, 1, 1, 1] if one serves all."""
    if scale_T.numel() == 1:
        return scale_T.view(1, 1, 1, 1)
    return F.pad(scale_T, (0, 1))[group.tokens_Gn][:, None, :, None]


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position: Tensor | None,
        time: Tensor | None,
        offsets_B1: Tensor,
        scale_T: Tensor,
        time_buckets: TimeBuckets | None,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, position, time, offsets_B1, scale_T)
        ctx.time_buckets = time_buckets
        bias = _Bias(position, time, time_buckets)
        out = v.new_empty(v.shape[0] + 1, *v.shape[1:])
        for group in _groups(offsets_B1, time_buckets):
            q_GHnQ, k_GHnQ, v_GHnV = (group.take(x) for x in (q, k, v))
            out_GHnV = torch.empty_like(v_GHnV)
            for start in range(0, q_GHnQ.shape[2], _BLOCK):
                end = start + _BLOCK
                scores_GHrc = q_GHnQ[:, :, start:end] @ k_GHnQ[:, :, :end].transpose(2, 3)
                bias.add_to(scores_GHrc, group, start)
                weights_GHrc = F.silu(scores_GHrc, inplace=True)
                weights_GHrc[..., start:].tril_()
                torch.matmul(weights_GHrc, v_GHnV[:, :, :end], out=out_GHnV[:, :, start:end])
            group.put(out_GHnV.mul_(_scales(group, scale_T)), out)
        return out[:-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, position, time, offsets_B1, scale_T = ctx.saved_tensors
        bias = _Bias(position, time, ctx.time_buckets)
        dq, dk, dv = (x.new_empty(x.shape[0] + 1, *x.shape[1:]) for x in (q, k, v))
        dposition, dtime = (torch.zeros_like(q.new_empty(0) if x is None else x).double() for x in (position, time))
        for group in _groups(offsets_B1, ctx.time_buckets):
            q_GHnQ, k_GHnQ, v_GHnV, g_GHnV = (group.take(x) for x in (q, k, v, grad))
            g_GHnV *= _scales(group, scale_T)
            dq_GHnQ, dk_GHnQ, dv_GHnV = torch.empty_like(q_GHnQ), torch.zeros_like(k_GHnQ), torch.zeros_like(v_GHnV)
            for start in range(0, q_GHnQ.shape[2], _BLOCK):
                rows, keys = slice(start, start + _BLOCK), slice(0, start + _BLOCK)
                scores_GHrc = q_GHnQ[:, :, rows] @ k_GHnQ[:, :, keys].transpose(2, 3)
                bias.add_to(scores_GHrc, group, start)
                weights_GHrc = F.silu(scores_GHrc)
                weights_GHrc[..., start:].tril_()
                dv_GHnV[:, :, keys] += weights_GHrc.transpose(2, 3) @ g_GHnV[:, :, rows]
                dweights_GHrc = g_GHnV[:, :, rows] @ v_GHnV[:, :, keys].transpose(2, 3)
                dscores_GHrc = torch.ops.aten.silu_backward(dweights_GHrc, scores_GHrc)
                dscores_GHrc[..., start:].tril_()
                dq_GHnQ[:, :, rows] = dscores_GHrc @ k_GHnQ[:, :, keys]
                dk_GHnQ[:, :, keys] += dscores_GHrc.transpose(2, 3) @ q_GHnQ[:, :, rows]
                bias.add_gradients(dscores_GHrc, group, start, dposition, dtime)
            for x, dx in ((dq_GHnQ, dq), (dk_GHnQ, dk), (dv_GHnV, dv)):
                group.put(x, dx)
        dtables = (None if x is None else dx.to(x.dtype) for x, dx in ((position, dposition), (time, dtime)))
        return dq[:-1], dk[:-1], dv[:-1], *dtables, None, None, None
