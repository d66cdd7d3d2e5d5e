"""HSTU attention in plain torch, for machines without a compiler and for other devices. Letters as in reference.py.

Sequences with the same number of blocks share one batched product, and a block of queries meets only the keys from the
first to the last that one of its rows sees: without a mask, the keys up to its own end. No work is spent on padding
beyond the edge of a block. Scores are recomputed in the backward pass.
G sequences of a group, n their length padded to whole blocks, r rows of one block of queries, c the keys it meets.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gr.ops.hstu_attention.call import AttentionCall, Operands
from gr.ops.hstu_attention.mask import AttentionMask
from gr.ops.hstu_attention.time_buckets import TimeBuckets

_BLOCK = 64


def hstu_attention_blocked(operands: Operands, call: AttentionCall) -> Tensor:
    """hstu_attention_reference on any device. Half precisions are computed in float32, which the bias needs."""
    return _Blocked.apply(*operands, call)


@dataclass(frozen=True)
class _Group:
    """Sequences with the same number of blocks. Tokens past the end of a sequence point at row T, which is zero."""

    tokens_Gn: Tensor
    lengths_G: Tensor
    history_G: Tensor
    pair_starts_G: Tensor | None

    def take(self, x_THD: Tensor) -> Tensor:
        """[T, H, D] to [G, H, n, D], in float32."""
        padded = F.pad(x_THD, (0, 0, 0, 0, 0, 1))[self.tokens_Gn].transpose(1, 2)
        return padded.float().contiguous()

    def put(self, x_GHnD: Tensor, out_THD: Tensor) -> None:
        """The inverse of take, into an output with one row more than there are tokens."""
        out_THD[self.tokens_Gn] = x_GHnD.transpose(1, 2).to(out_THD.dtype)


@dataclass(frozen=True)
class _Block:
    """Rows of queries, the keys they meet, and which of these keys are hidden (None: the keys after the query)."""

    rows: slice
    keys: slice
    hidden_G1rc: Tensor | None

    def hide(self, x_GHrc: Tensor) -> None:
        if self.hidden_G1rc is None:
            x_GHrc[..., self.rows.start :].tril_()
        else:
            x_GHrc.masked_fill_(self.hidden_G1rc, 0.0)


def _groups(call: AttentionCall) -> Iterator[_Group]:
    """The sequences of a call by their number of blocks; empty ones are left out."""
    offsets_B1, targets_B, buckets = call.offsets_B1, call.mask.num_targets_B, call.time_buckets
    lengths_B = offsets_B1.diff()
    history_B = lengths_B if targets_B is None else lengths_B - targets_B
    blocks_B = (lengths_B + _BLOCK - 1) // _BLOCK
    for blocks in blocks_B.unique().tolist():
        if blocks == 0:
            continue
        members_G = (blocks_B == blocks).nonzero().flatten()
        position_n = torch.arange(blocks * _BLOCK, device=offsets_B1.device)
        inside_Gn = position_n < lengths_B[members_G][:, None]
        tokens_Gn = (offsets_B1[members_G][:, None] + position_n).where(inside_Gn, offsets_B1[-1])
        pair_starts_G = None if buckets is None else buckets.pair_offsets_B1[members_G]
        yield _Group(tokens_Gn, lengths_B[members_G], history_B[members_G], pair_starts_G)


def _blocks(mask: AttentionMask, group: _Group) -> Iterator[_Block]:
    """The blocks of queries of a group, in order."""
    count = group.tokens_Gn.shape[1]
    if mask.causal:
        for start in range(0, count, _BLOCK):
            yield _Block(slice(start, start + _BLOCK), slice(0, start + _BLOCK), None)
        return
    i_n = torch.arange(count, device=group.tokens_Gn.device)
    first_Gn, end_Gn = _key_ranges(mask, i_n, group.history_G[:, None])
    firsts = first_Gn.view(-1, count // _BLOCK, _BLOCK).amin((0, 2)).tolist()
    ends = end_Gn.view(-1, count // _BLOCK, _BLOCK).amax((0, 2)).tolist()
    for start, first, end in zip(range(0, count, _BLOCK), firsts, ends, strict=True):
        rows, keys = slice(start, start + _BLOCK), slice(first, max(end, start + _BLOCK))
        j_c = i_n[keys]
        seen_Grc = (j_c >= first_Gn[:, rows, None]) & (j_c < end_Gn[:, rows, None])
        yield _Block(rows, keys, ~(seen_Grc | (j_c == i_n[rows, None]))[:, None])


def _key_ranges(mask: AttentionMask, i_n: Tensor, history_G1: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [G, n] twice: query i sees the keys [first, end) of its sequence, and itself."""
    place_Gn = i_n.minimum(history_G1)
    end_Gn = (i_n + 1).minimum(history_G1).where(i_n >= mask.contextual_len, history_G1)
    if not mask.max_attn_len:
        return torch.zeros_like(end_Gn), end_Gn
    first_Gn = place_Gn - mask.max_attn_len
    all_Gn = first_Gn < mask.contextual_len
    if mask.min_full_attn_seq_len:
        all_Gn |= place_Gn >= history_G1 - mask.min_full_attn_seq_len
    return first_Gn.where(~all_Gn, 0), end_Gn


@dataclass(frozen=True)
class _Bias:
    """The two bias tables, and the index of the entry of every score."""

    position: Tensor | None
    time: Tensor | None
    time_buckets: TimeBuckets | None

    def position_index(self, group: _Group, block: _Block) -> Tensor:
        """int64 [r, c], or [G, r, c] under a mask. Clamped for hidden pairs, whose scores are not used."""
        assert self.position is not None
        i_r1, j_1c = _pairs(block, group.tokens_Gn.device)
        if block.hidden_G1rc is not None:
            history_G11 = group.history_G[:, None, None]
            i_r1, j_1c = i_r1.minimum(history_G11), j_1c.minimum(history_G11)
        return (self.position.shape[0] // 2 + j_1c - i_r1).clamp(0, self.position.shape[0] - 1)

    def time_index(self, group: _Group, block: _Block) -> Tensor:
        """uint8 [G, r, c]; the first pair of the batch stands in for pairs outside the mask."""
        assert self.time_buckets is not None and group.pair_starts_G is not None
        i_r1, j_1c = _pairs(block, group.tokens_Gn.device)
        visible_Grc = (j_1c <= i_r1) & (i_r1 < group.lengths_G[:, None, None])
        pair_Grc = group.pair_starts_G[:, None, None] + i_r1 * (i_r1 + 1) // 2 + j_1c
        return self.time_buckets.ids_P[pair_Grc.where(visible_Grc, 0)]

    def add_to(self, scores_GHrc: Tensor, group: _Group, block: _Block) -> None:
        if self.position is not None:
            bias = self.position[self.position_index(group, block)]
            scores_GHrc += bias if bias.dim() == 2 else bias[:, None]
        if self.time is not None:
            scores_GHrc += self.time[self.time_index(group, block).long()][:, None]

    def add_gradients(
        self, dscores_GHrc: Tensor, group: _Group, block: _Block, dposition: Tensor, dtime: Tensor
    ) -> None:
        if self.position is not None:
            index = self.position_index(group, block)
            sums = dscores_GHrc.sum((0, 1) if index.dim() == 2 else 1)
            dposition.index_add_(0, index.flatten(), sums.flatten().to(dposition.dtype))
        if self.time is not None:
            ids = self.time_index(group, block).flatten()
            weights = dscores_GHrc.sum(1).flatten().to(dtime.dtype)
            dtime += torch.bincount(ids, weights, minlength=dtime.numel())


def _pairs(block: _Block, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, keys = block.rows, block.keys
    return (
        torch.arange(rows.start, rows.stop, device=device)[:, None],
        torch.arange(keys.start, keys.stop, device=device)[None, :],
    )


def _scales(group: _Group, scale_T: Tensor) -> Tensor:
    """1 / divisor as [G, 1, n, 1], zero past the end of a sequence; [1, 1, 1, 1] for one divisor."""
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
        output: Tensor | None,
        call: AttentionCall,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, position, time)
        ctx.call = call
        if output is not None:
            return output.view_as(output)
        bias = _Bias(position, time, call.time_buckets)
        out = v.new_empty(v.shape[0] + 1, *v.shape[1:])
        for group in _groups(call):
            q_GHnQ, k_GHnQ, v_GHnV = (group.take(x) for x in (q, k, v))
            out_GHnV = torch.empty_like(v_GHnV)
            for block in _blocks(call.mask, group):
                scores_GHrc = _scores(q_GHnQ, k_GHnQ, block, call.alpha)
                bias.add_to(scores_GHrc, group, block)
                weights_GHrc = F.silu(scores_GHrc, inplace=True)
                block.hide(weights_GHrc)
                torch.matmul(weights_GHrc, v_GHnV[:, :, block.keys], out=out_GHnV[:, :, block.rows])
            group.put(out_GHnV.mul_(_scales(group, call.scale_T)), out)
        return out[:-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, position, time = ctx.saved_tensors
        call: AttentionCall = ctx.call
        bias = _Bias(position, time, call.time_buckets)
        dq, dk, dv = (x.new_empty(x.shape[0] + 1, *x.shape[1:]) for x in (q, k, v))
        dposition, dtime = (torch.zeros_like(q.new_empty(0) if x is None else x).double() for x in (position, time))
        for group in _groups(call):
            q_GHnQ, k_GHnQ, v_GHnV, g_GHnV = (group.take(x) for x in (q, k, v, grad))
            g_GHnV *= _scales(group, call.scale_T)
            dq_GHnQ, dk_GHnQ, dv_GHnV = torch.empty_like(q_GHnQ), torch.zeros_like(k_GHnQ), torch.zeros_like(v_GHnV)
            for block in _blocks(call.mask, group):
                rows, keys = block.rows, block.keys
                scores_GHrc = _scores(q_GHnQ, k_GHnQ, block, call.alpha)
                bias.add_to(scores_GHrc, group, block)
                weights_GHrc = F.silu(scores_GHrc)
                block.hide(weights_GHrc)
                dv_GHnV[:, :, keys] += weights_GHrc.transpose(2, 3) @ g_GHnV[:, :, rows]
                dweights_GHrc = g_GHnV[:, :, rows] @ v_GHnV[:, :, keys].transpose(2, 3)
                dscores_GHrc = torch.ops.aten.silu_backward(dweights_GHrc, scores_GHrc)
                block.hide(dscores_GHrc)
                dq_GHnQ[:, :, rows] = dscores_GHrc @ k_GHnQ[:, :, keys]
                dk_GHnQ[:, :, keys] += dscores_GHrc.transpose(2, 3) @ q_GHnQ[:, :, rows]
                bias.add_gradients(dscores_GHrc, group, block, dposition, dtime)
            if call.alpha != 1.0:
                dq_GHnQ, dk_GHnQ = dq_GHnQ.mul_(call.alpha), dk_GHnQ.mul_(call.alpha)
            for x, dx in ((dq_GHnQ, dq), (dk_GHnQ, dk), (dv_GHnV, dv)):
                group.put(x, dx)
        dtables = (None if x is None else dx.to(x.dtype) for x, dx in ((position, dposition), (time, dtime)))
        return dq[:-1], dk[:-1], dv[:-1], *dtables, None, None


def _scores(q_GHnQ: Tensor, k_GHnQ: Tensor, block: _Block, alpha: float) -> Tensor:
    scores_GHrc = q_GHnQ[:, :, block.rows] @ k_GHnQ[:, :, block.keys].transpose(2, 3)
    return scores_GHrc if alpha == 1.0 else scores_GHrc.mul_(alpha)
