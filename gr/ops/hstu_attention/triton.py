"""HSTU attention in Triton, for CUDA tensors; TRITON_INTERPRET=1 runs the kernels on CPU tensors, for tests.

There are a forward kernel and three mirrored backward kernels: queries outer for dq, keys outer for dk and dv,
distances outer for the tables. Every sum has one owner and one order, so results are the same bits each time, and the
results of a sequence do not depend on its batch. Without a softmax only the inputs are saved, and no [n, n] tensor ever
exists.

The score of query i and key j is s; kernels hold h = s / 2, since silu(s) = h tanh(h) + h takes one special-function
instruction. A tile is masked before its activation (silu(0) = 0), since masking the rounded weights costs a scalar
conversion each. Tiles in which every row sees all keys have a loop of their own, without a mask.

Letters as in reference.py; a tile has M queries and N keys. i and j are positions in a sequence of n tokens, the first
`past` of which are no candidates. query_times and key_times are TimeBuckets.seconds.
"""

import functools
import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from gr.ops.hstu_attention.call import AttentionCall, Operands
from gr.ops.hstu_attention.time_buckets import BUCKET_WIDTH

MAX_WIDTH = {2: 256, 4: 128}  # widest head by bytes of an element; wider float32 tiles spill registers
_TABLE_PROGRAMS = 1024  # the fewest programs that share the gradient of the tables
_BUCKETS_PER_OCTAVE = tl.constexpr(math.log(2) / BUCKET_WIDTH)


@triton.jit
def _load_rows(ptr, stride, rows, n, D: tl.constexpr, DP: tl.constexpr, MASK: tl.constexpr, first=0):
    """[len(rows), DP] of a row-major matrix [n, D], from its column `first` on; zero outside of it."""
    columns = first + tl.arange(0, DP)
    at = ptr + rows[:, None] * stride + columns[None, :]
    if MASK and D % DP:
        return tl.load(at, mask=(rows < n)[:, None] & (columns < D)[None, :], other=0.0)
    elif MASK:
        return tl.load(at, mask=(rows < n)[:, None], other=0.0)
    elif D % DP:
        return tl.load(at, mask=(columns < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _store_rows(ptr, stride, rows, n, x, D: tl.constexpr, DP: tl.constexpr):
    columns = tl.arange(0, DP)
    at = ptr + rows[:, None] * stride + columns[None, :]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=(rows < n)[:, None] & (columns < D)[None, :])


@triton.jit
def _activation(h, FAST: tl.constexpr):
    """silu(2 h), and the derivative of silu at 2 h."""
    if FAST:  # absolute error 2^-11: below the rounding of half precision
        t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [h], tl.float32, is_pure=True, pack=1)
    else:
        t = 2.0 * tl.sigmoid(2.0 * h) - 1.0
    weight = h * t + h
    gate = 0.5 * t + 0.5
    return weight, gate + weight * (1.0 - gate)


@triton.jit
def _sequence(offsets, targets, heads, TARGETS: tl.constexpr):
    """The sequence start, n, past and head of this program."""
    sequence = tl.program_id(0) // heads
    start = tl.load(offsets + sequence)
    n = (tl.load(offsets + sequence + 1) - start).to(tl.int32)
    past = n
    if TARGETS:
        past = n - tl.load(targets + sequence).to(tl.int32)
    return start, n, past, (tl.program_id(0) % heads).to(tl.int64)


@triton.jit
def _seen_keys(i, past, WINDOW: tl.constexpr, CONTEXT: tl.constexpr, FULL: tl.constexpr):
    """Query i sees the keys [begin, end), and itself."""
    place = tl.minimum(i, past)
    begin = tl.zeros_like(i)
    end = tl.minimum(i + 1, past)
    if CONTEXT:
        end = tl.where(i < CONTEXT, past, end)
    if WINDOW:
        begin = place - WINDOW
        sees_all = begin < CONTEXT
        if FULL:
            sees_all = sees_all | (place >= past - FULL)
        begin = tl.where(sees_all, 0, begin)
    return begin, end


@triton.jit
def _seen(i, j, past, WINDOW: tl.constexpr, CONTEXT: tl.constexpr, FULL: tl.constexpr):
    begin, end = _seen_keys(i, past, WINDOW, CONTEXT, FULL)
    return ((j >= begin) & (j < end)) | (j == i)


@triton.jit
def _bucket(seconds, edges, last):
    """The bucket id of `seconds`, the number of edges <= seconds as in time_buckets.py.

    A logarithm gives a guess that comparisons with the edges correct. edges[0] is 0, edges[last + 1] is unreachable.
    """
    guess = (tl.log2(tl.maximum(seconds, 1).to(tl.float32)) * _BUCKETS_PER_OCTAVE).to(tl.int32)
    guess = tl.minimum(guess, last)
    guess -= (seconds < tl.load(edges + guess)).to(tl.int32)
    return guess + (seconds >= tl.load(edges + guess + 1)).to(tl.int32)


@triton.jit
def _bucket_range(query_time, key_time, edges, last):
    """The first and the last bucket of a tile, whatever the order of its times."""
    smallest = tl.min(query_time) - tl.max(key_time)
    largest = tl.max(query_time) - tl.min(key_time)
    nearest = tl.maximum(tl.maximum(smallest, -largest), 0)
    return _bucket(nearest, edges, last), _bucket(tl.maximum(largest, -smallest), edges, last)


@triton.jit
def _half_bias(
    h, i, j, n, past, query_times, key_times, edges, last, time, position,
    ORIENTATION: tl.constexpr, MASK: tl.constexpr, TIME: tl.constexpr, POSITION: tl.constexpr, WINDOW: tl.constexpr,
    CONTEXT: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """h plus half of the bias of the vectors of queries i and keys j. ORIENTATION 0: [queries, keys], 1: transposed.

    position points at the entry of distance 0. Far from the diagonal, where buckets are wide, a tile has one bucket.
    """
    i2, j2 = tl.expand_dims(i, 1 - ORIENTATION), tl.expand_dims(j, ORIENTATION)
    if POSITION:
        at = position + tl.minimum(j2, past) - tl.minimum(i2, past)
        if MASK:
            near = _seen(i2, j2, past, WINDOW, CONTEXT, FULL) & (i2 < n)
            h += 0.5 * tl.load(at, mask=near, other=0.0)
        else:
            h += 0.5 * tl.load(at)
    if TIME:
        query_time = tl.load(query_times + tl.minimum(i, n - 1))
        key_time = tl.load(key_times + tl.minimum(j, n - 1))
        first_bucket, last_bucket = _bucket_range(query_time, key_time, edges, last)
        if first_bucket == last_bucket:
            h += 0.5 * tl.load(time + first_bucket)
        else:
            seconds = tl.abs(tl.expand_dims(query_time, 1 - ORIENTATION) - tl.expand_dims(key_time, ORIENTATION))
            h += 0.5 * tl.load(time + _bucket(seconds, edges, last))
    return h


@triton.jit
def _key_tiles(
    first, n, past, M: tl.constexpr, N: tl.constexpr, TARGETS: tl.constexpr, WINDOW: tl.constexpr,
    CONTEXT: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The key tiles of the queries [first, first + M): the starts (lead, plain, tail, own), and the counts of the lead,
    tail and own tiles.

    Tiles from `lead` are masked, tiles from `plain` need no mask, tiles from `tail` are masked, and so are tiles from
    `own`, in which candidates see themselves beyond the end of the history.
    """
    begin, end = _seen_keys(tl.minimum(first + tl.arange(0, M), n - 1), past, WINDOW, CONTEXT, FULL)
    lead = tl.min(begin) // N * N
    plain = tl.cdiv(tl.max(begin), N) * N
    tail = tl.maximum(plain, tl.min(end) // N * N)
    tails = tl.cdiv(tl.maximum(tl.max(end) - tail, 0), N)
    own = tl.maximum(tl.maximum(first, past), tail + tails * N)
    owns = 0
    if TARGETS:
        owns = tl.cdiv(tl.maximum(tl.minimum(first + M, n) - own, 0), N)
    return lead, plain, tail, own, (plain - lead) // N, tails, owns


@triton.jit
def _forward_tile(
    acc, q, i, j0, k_ptr, v_ptr, k_row, v_row, n, past, half_alpha, query_times, key_times, edges, last, time, position,
    Q: tl.constexpr, V: tl.constexpr, QP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, MASK: tl.constexpr,
    TIME: tl.constexpr, POSITION: tl.constexpr, WINDOW: tl.constexpr, CONTEXT: tl.constexpr, FULL: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    j = j0 + tl.arange(0, N)
    k = _load_rows(k_ptr, k_row, j, n, Q, QP, MASK)
    h = tl.dot(q, tl.trans(k), input_precision="tf32x3") * half_alpha
    h = _half_bias(h, i, j, n, past, query_times, key_times, edges, last, time, position, 0, MASK, TIME, POSITION,
                   WINDOW, CONTEXT, FULL)  # fmt: skip
    if MASK:
        h = tl.where(_seen(i[:, None], j[None, :], past, WINDOW, CONTEXT, FULL), h, 0.0)
    weight, _ = _activation(h, FAST)
    v = _load_rows(v_ptr, v_row, j, n, V, VP, MASK)
    return tl.dot(weight.to(v.dtype), v, acc, input_precision="tf32x3")


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, offsets, targets, scale_ptr, query_times, key_times, edges, time, position,
    q_row, k_row, v_row, out_row, q_head, k_head, v_head, out_head, heads, last, half_alpha,
    Q: tl.constexpr, V: tl.constexpr, QP: tl.constexpr, VP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    ROW_SCALE: tl.constexpr, TARGETS: tl.constexpr, TIME: tl.constexpr, POSITION: tl.constexpr, WINDOW: tl.constexpr,
    CONTEXT: tl.constexpr, FULL: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    start, n, past, head = _sequence(offsets, targets, heads, TARGETS)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * M  # the longest rows start first
    if first >= n:
        return
    q_ptr += start * q_row + head * q_head
    k_ptr += start * k_row + head * k_head
    v_ptr += start * v_row + head * v_head
    out_ptr += start * out_row + head * out_head
    if TIME:
        query_times += start
        key_times += start
    i = first + tl.arange(0, M)
    q = _load_rows(q_ptr, q_row, i, n, Q, QP, True)
    acc = tl.zeros([M, VP], tl.float32)
    lead, plain, tail, own, leads, tails, owns = _key_tiles(first, n, past, M, N, TARGETS, WINDOW, CONTEXT, FULL)
    for j0 in range(plain, tail, N):
        acc = _forward_tile(acc, q, i, j0, k_ptr, v_ptr, k_row, v_row, n, past, half_alpha, query_times, key_times,
                            edges, last, time, position, Q, V, QP, VP, N, False, TIME, POSITION, WINDOW, CONTEXT, FULL,
                            FAST)  # fmt: skip
    for t in range(0, leads + tails + owns):
        j0 = tl.where(t < leads, lead + t * N, tail + (t - leads) * N)
        if TARGETS:
            j0 = tl.where(t < leads + tails, j0, own + (t - leads - tails) * N)
        acc = _forward_tile(acc, q, i, j0, k_ptr, v_ptr, k_row, v_row, n, past, half_alpha, query_times, key_times,
                            edges, last, time, position, Q, V, QP, VP, N, True, TIME, POSITION, WINDOW, CONTEXT, FULL,
                            FAST)  # fmt: skip
    if ROW_SCALE:
        acc *= tl.load(scale_ptr + start + i, mask=i < n, other=0.0)[:, None]
    else:
        acc *= tl.load(scale_ptr)
    _store_rows(out_ptr, out_row, i, n, acc, V, VP)


@triton.jit
def _query_gradient_tile(
    acc, q, g, i, j0, k_ptr, v_ptr, k_row, v_row, n, past, half_alpha, query_times, key_times, edges, last, time,
    position, Q: tl.constexpr, V: tl.constexpr, QP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr,
    MASK: tl.constexpr, TIME: tl.constexpr, POSITION: tl.constexpr, WINDOW: tl.constexpr, CONTEXT: tl.constexpr,
    FULL: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    j = j0 + tl.arange(0, N)
    k = _load_rows(k_ptr, k_row, j, n, Q, QP, MASK)
    h = tl.dot(q, tl.trans(k), input_precision="tf32x3") * half_alpha
    h = _half_bias(h, i, j, n, past, query_times, key_times, edges, last, time, position, 0, MASK, TIME, POSITION,
                   WINDOW, CONTEXT, FULL)  # fmt: skip
    _, slope = _activation(h, FAST)
    if MASK:
        slope = tl.where(_seen(i[:, None], j[None, :], past, WINDOW, CONTEXT, FULL), slope, 0.0)
    v = _load_rows(v_ptr, v_row, j, n, V, VP, MASK)
    dscore = tl.dot(g, tl.trans(v), input_precision="tf32x3") * slope
    return tl.dot(dscore.to(k.dtype), k, acc, input_precision="tf32x3")


@triton.jit
def query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, dq_ptr, offsets, targets, scale_ptr, query_times, key_times, edges, time, position,
    q_row, k_row, v_row, g_row, dq_row, q_head, k_head, v_head, g_head, dq_head, heads, last, half_alpha,
    Q: tl.constexpr, V: tl.constexpr, QP: tl.constexpr, VP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    ROW_SCALE: tl.constexpr, TARGETS: tl.constexpr, TIME: tl.constexpr, POSITION: tl.constexpr, WINDOW: tl.constexpr,
    CONTEXT: tl.constexpr, FULL: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    start, n, past, head = _sequence(offsets, targets, heads, TARGETS)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * M
    if first >= n:
        return
    q_ptr += start * q_row + head * q_head
    k_ptr += start * k_row + head * k_head
    v_ptr += start * v_row + head * v_head
    g_ptr += start * g_row + head * g_head
    dq_ptr += start * dq_row + head * dq_head
    if TIME:
        query_times += start
        key_times += start
    i = first + tl.arange(0, M)
    q = _load_rows(q_ptr, q_row, i, n, Q, QP, True)
    g = _load_rows(g_ptr, g_row, i, n, V, VP, True)
    acc = tl.zeros([M, QP], tl.float32)
    lead, plain, tail, own, leads, tails, owns = _key_tiles(first, n, past, M, N, TARGETS, WINDOW, CONTEXT, FULL)
    for j0 in range(plain, tail, N):
        acc = _query_gradient_tile(acc, q, g, i, j0, k_ptr, v_ptr, k_row, v_row, n, past, half_alpha, query_times,
                                   key_times, edges, last, time, position, Q, V, QP, VP, N, False, TIME, POSITION,
                                   WINDOW, CONTEXT, FULL, FAST)  # fmt: skip
    for t in range(0, leads + tails + owns):
        j0 = tl.where(t < leads, lead + t * N, tail + (t - leads) * N)
        if TARGETS:
            j0 = tl.where(t < leads + tails, j0, own + (t - leads - tails) * N)
        acc = _query_gradient_tile(acc, q, g, i, j0, k_ptr, v_ptr, k_row, v_row, n, past, half_alpha, query_times,
                                   key_times, edges, last, time, position, Q, V, QP, VP, N, True, TIME, POSITION,
                                   WINDOW, CONTEXT, FULL, FAST)  # fmt: skip
    if ROW_SCALE:
        acc *= tl.load(scale_ptr + start + i, mask=i < n, other=0.0)[:, None]
    else:
        acc *= tl.load(scale_ptr)
    _store_rows(dq_ptr, dq_row, i, n, acc * (2.0 * half_alpha), Q, QP)


@triton.jit
def _query_tiles(
    first, n, past, M: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr, CONTEXT: tl.constexpr, FULL: tl.constexpr
):
    """The query tiles of the keys [first, first + N): the starts (lead, plain, tail, late), and the counts of prefix,
    lead, tail and late tiles.

    Tiles from 0 are masked, for the prefix; tiles from `lead` are masked, tiles from `plain` need no mask, tiles from
    `tail` are masked, and so are tiles from `late`, for rows that see beyond their window.
    """
    lead = first // M * M
    plain = tl.cdiv(first + N - 1, M) * M
    tail = plain
    stop = n
    if first + N <= past:
        tail = tl.maximum(plain, n // M * M)
        if WINDOW:
            tail = tl.maximum(plain, tl.minimum(past, first + WINDOW + 1) // M * M)
    if WINDOW:
        stop = tl.maximum(first + N, CONTEXT) + WINDOW
        stop = tl.where(stop > past, n, tl.minimum(stop, n))
    if first >= past:  # candidates are seen by themselves alone
        stop = tl.minimum(first + N, n)
    tails = tl.cdiv(tl.maximum(stop - tail, 0), M)
    prefixes = 0
    late = n
    if CONTEXT:
        prefixes = tl.where(first < past, tl.cdiv(tl.minimum(CONTEXT, lead), M), 0)
    if FULL:
        late = tl.maximum(tail + tails * M, tl.maximum(past - FULL, 0) // M * M)
        late = tl.where(first < past, late, n)
    return lead, plain, tail, late, prefixes, (plain - lead) // M, tails, tl.cdiv(tl.maximum(n - late, 0), M)


@triton.jit
def _key_gradient_tile(
    dk, dv, dcandidates, k, v, j, i0, q_ptr, g_ptr, q_row, g_row, n, past, half_alpha, scale_ptr, query_times,
    key_times, edges, last, time, position, Q: tl.constexpr, V: tl.constexpr, QP: tl.constexpr, VP: tl.constexpr,
    M: tl.constexpr, MASK: tl.constexpr, ROW_SCALE: tl.constexpr, TARGETS: tl.constexpr, TIME: tl.constexpr,
    POSITION: tl.constexpr, WINDOW: tl.constexpr, CONTEXT: tl.constexpr, FULL: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The sums of one transposed tile [keys, queries], a layout in which no computed tile is ever transposed."""
    i = i0 + tl.arange(0, M)
    q = _load_rows(q_ptr, q_row, i, n, Q, QP, MASK)
    h = tl.dot(k, tl.trans(q), input_precision="tf32x3") * half_alpha
    h = _half_bias(h, i, j, n, past, query_times, key_times, edges, last, time, position, 1, MASK, TIME, POSITION,
                   WINDOW, CONTEXT, FULL)  # fmt: skip
    if MASK:
        seen = _seen(i[None, :], j[:, None], past, WINDOW, CONTEXT, FULL)
        h = tl.where(seen, h, 0.0)
    weight, slope = _activation(h, FAST)
    if MASK:
        slope = tl.where(seen, slope, 0.0)
    if ROW_SCALE:
        scale = tl.load(scale_ptr + i, mask=i < n, other=0.0)[None, :]
        weight *= scale
        slope *= scale
    g = _load_rows(g_ptr, g_row, i, n, V, VP, MASK)
    dscore = tl.dot(v, tl.trans(g), input_precision="tf32x3") * slope
    if TARGETS and POSITION:
        dcandidates += tl.sum(tl.where(i[None, :] >= past, dscore, 0.0), 1)
    dv = tl.dot(weight.to(g.dtype), g, dv, input_precision="tf32x3")
    dk = tl.dot(dscore.to(q.dtype), q, dk, input_precision="tf32x3")
    return dk, dv, dcandidates


@triton.jit
def key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, dk_ptr, dv_ptr, dcandidates_ptr, offsets, targets, scale_ptr, query_times, key_times,
    edges, time, position, q_row, k_row, v_row, g_row, dk_row, dv_row, q_head, k_head, v_head, g_head, dk_head,
    dv_head, heads, last, half_alpha,
    Q: tl.constexpr, V: tl.constexpr, QP: tl.constexpr, VP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    ROW_SCALE: tl.constexpr, TARGETS: tl.constexpr, TIME: tl.constexpr, POSITION: tl.constexpr, WINDOW: tl.constexpr,
    CONTEXT: tl.constexpr, FULL: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """dcandidates [T, H]: for each key, the sum of d loss / d score over the candidates of its sequence, or None."""
    start, n, past, head = _sequence(offsets, targets, heads, TARGETS)
    first = tl.program_id(1) * N
    if first >= n:
        return
    q_ptr += start * q_row + head * q_head
    k_ptr += start * k_row + head * k_head
    v_ptr += start * v_row + head * v_head
    g_ptr += start * g_row + head * g_head
    dk_ptr += start * dk_row + head * dk_head
    dv_ptr += start * dv_row + head * dv_head
    if TIME:
        query_times += start
        key_times += start
    if ROW_SCALE:
        scale_ptr += start
    j = first + tl.arange(0, N)
    k = _load_rows(k_ptr, k_row, j, n, Q, QP, True)
    v = _load_rows(v_ptr, v_row, j, n, V, VP, True)
    dk, dv = tl.zeros([N, QP], tl.float32), tl.zeros([N, VP], tl.float32)
    dcandidates = tl.zeros([N], tl.float32)
    lead, plain, tail, late, prefixes, leads, tails, lates = _query_tiles(first, n, past, M, N, WINDOW, CONTEXT, FULL)
    for i0 in range(plain, tail, M):
        dk, dv, dcandidates = _key_gradient_tile(
            dk, dv, dcandidates, k, v, j, i0, q_ptr, g_ptr, q_row, g_row, n, past, half_alpha, scale_ptr, query_times,
            key_times, edges, last, time, position, Q, V, QP, VP, M, False, ROW_SCALE, TARGETS, TIME, POSITION,
            WINDOW, CONTEXT, FULL, FAST)  # fmt: skip
    for t in range(0, prefixes + leads + tails + lates):
        i0 = tl.where(t < prefixes + leads, lead + (t - prefixes) * M, tail + (t - prefixes - leads) * M)
        if CONTEXT:
            i0 = tl.where(t < prefixes, t * M, i0)
        if FULL:
            i0 = tl.where(t < prefixes + leads + tails, i0, late + (t - prefixes - leads - tails) * M)
        dk, dv, dcandidates = _key_gradient_tile(
            dk, dv, dcandidates, k, v, j, i0, q_ptr, g_ptr, q_row, g_row, n, past, half_alpha, scale_ptr, query_times,
            key_times, edges, last, time, position, Q, V, QP, VP, M, True, ROW_SCALE, TARGETS, TIME, POSITION,
            WINDOW, CONTEXT, FULL, FAST)  # fmt: skip
    if not ROW_SCALE:
        scale = tl.load(scale_ptr)
        dk *= scale
        dv *= scale
        dcandidates *= scale
    _store_rows(dk_ptr, dk_row, j, n, dk * (2.0 * half_alpha), Q, QP)
    _store_rows(dv_ptr, dv_row, j, n, dv, V, VP)
    if TARGETS and POSITION:
        tl.store(dcandidates_ptr + (start + j) * heads + head, dcandidates, mask=j < n)


@triton.jit
def _add_bucket_sums(
    dscore, i, j, n, query_times, key_times, edges, last, sums,
):  # fmt: skip
    """Adds the sum of dscore over every bucket of the tile to the row of sums that this program owns.

    The atomic serves order, not sharing: one thread makes all additions of a program to an address, one by one.
    """
    query_time = tl.load(query_times + tl.minimum(i, n - 1))
    key_time = tl.load(key_times + tl.minimum(j, n - 1))
    seconds = tl.abs(query_time[:, None] - key_time[None, :])
    first_bucket, last_bucket = _bucket_range(query_time, key_time, edges, last)
    for bucket in range(first_bucket, last_bucket + 1):
        inside = (seconds >= tl.load(edges + bucket)) & (seconds < tl.load(edges + bucket + 1))
        tl.atomic_add(sums + bucket, tl.sum(tl.where(inside, dscore, 0.0)), sem="relaxed")


@triton.jit
def _products(
    x_ptr, x_row, i, y_ptr, y_row, j, n, M: tl.constexpr, C: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """[M, M]: rows i of x times rows j of y, C columns at a time, since whole rows take up to twice the registers."""
    W: tl.constexpr = DP if DP < C else C
    products = tl.zeros([M, M], tl.float32)
    for first in range(0, D, W):
        x = _load_rows(x_ptr, x_row, i, n, D, W, True, first)
        y = _load_rows(y_ptr, y_row, j, n, D, W, True, first)
        products = tl.dot(x, tl.trans(y), products, input_precision="tf32x3")
    return products


@triton.jit
def table_gradient_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, dposition_ptr, dtime_ptr, offsets, targets, scale_ptr, query_times, key_times, edges,
    time, position, q_row, k_row, v_row, g_row, q_head, k_head, v_head, g_head, sequences, ahead, last, half_alpha,
    Q: tl.constexpr, V: tl.constexpr, QP: tl.constexpr, VP: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    ROW_SCALE: tl.constexpr, TARGETS: tl.constexpr, TIME: tl.constexpr, POSITION: tl.constexpr, WINDOW: tl.constexpr,
    CONTEXT: tl.constexpr, FULL: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """A program adds up the M x M tiles at one distance from the diagonal, of one head and of every n-th sequence.

    In such tiles an element always has the same distance, so the tiles are added up whole: dposition [programs, M, M].
    Candidates, whose distances differ between sequences, are summed by key_gradient_kernel. dtime [programs, last + 1]
    starts at zero. ahead: the number of tile distances above the diagonal, where only a prefix looks.
    One loop goes over the tiles of all sequences, since two nested loops would each hold registers for the sum.
    """
    away = tl.program_id(0) - ahead
    head = tl.program_id(2).to(tl.int64)
    program = (head * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    acc = tl.zeros([M, M], tl.float32)
    sequence, i0 = tl.program_id(1), tl.maximum(away, 0) * M
    while sequence < sequences:
        start = tl.load(offsets + sequence)
        n = (tl.load(offsets + sequence + 1) - start).to(tl.int32)
        past = n
        if TARGETS:
            past = n - tl.load(targets + sequence).to(tl.int32)
        stop = n
        if CONTEXT:
            stop = tl.where(away < 0, tl.minimum(n, CONTEXT), n)
        j0 = i0 - away * M
        i, j = i0 + tl.arange(0, M), j0 + tl.arange(0, M)
        begin, end = _seen_keys(tl.minimum(i, n - 1), past, WINDOW, CONTEXT, FULL)
        if (i0 < stop) & ((away == 0) | ((j0 < tl.max(end)) & (j0 + M > tl.min(begin)))):
            q, k = q_ptr + start * q_row + head * q_head, k_ptr + start * k_row + head * k_head
            h = _products(q, q_row, i, k, k_row, j, n, M, C, Q, QP) * half_alpha
            query_at, key_at = query_times, key_times
            if TIME:
                query_at += start
                key_at += start
            h = _half_bias(h, i, j, n, past, query_at, key_at, edges, last, time, position, 0, True, TIME, POSITION,
                           WINDOW, CONTEXT, FULL)  # fmt: skip
            _, slope = _activation(h, FAST)
            slope = tl.where(_seen(i[:, None], j[None, :], past, WINDOW, CONTEXT, FULL), slope, 0.0)
            if ROW_SCALE:
                slope *= tl.load(scale_ptr + start + i, mask=i < n, other=0.0)[:, None]
            else:
                slope *= tl.load(scale_ptr)
            g, v = g_ptr + start * g_row + head * g_head, v_ptr + start * v_row + head * v_head
            dscore = _products(g, g_row, i, v, v_row, j, n, M, C, V, VP) * slope
            if TIME:
                _add_bucket_sums(dscore, i, j, n, query_at, key_at, edges, last, dtime_ptr + program * (last + 1))
            if POSITION:
                acc += tl.where(i[:, None] < past, dscore, 0.0)
        i0 += M
        done = i0 >= stop
        sequence = tl.where(done, sequence + tl.num_programs(1), sequence)
        i0 = tl.where(done, tl.maximum(away, 0) * M, i0)
    if POSITION:
        at = tl.arange(0, M)[:, None] * M + tl.arange(0, M)[None, :]
        tl.store(dposition_ptr + program * (M * M) + at, acc)


class Tiles(NamedTuple):
    """Rows (outer) and columns (inner, along the loop) of a tile of scores, warps and pipeline stages of a program.

    The tiles of the tables are square; their inner is the number of elements of a head multiplied at a time.
    """

    outer: int
    inner: int
    warps: int
    stages: int


# The key is the kernel, the bytes of an element, the largest padded width of a head, and whether there is a bias, which
# takes registers. tests/ops/test_triton_compiled.py compiles them and looks for spills. Not timed on a GPU.
TileKey = tuple[str, int, int, bool]
TILES: dict[TileKey, Tiles] = {
    ("forward", 2, 64, False): Tiles(128, 64, 8, 3),
    ("forward", 2, 64, True): Tiles(128, 64, 8, 3),
    ("forward", 2, 128, False): Tiles(64, 64, 4, 2),
    ("forward", 2, 128, True): Tiles(32, 32, 4, 2),
    ("forward", 2, 256, False): Tiles(64, 16, 4, 2),
    ("forward", 2, 256, True): Tiles(32, 64, 8, 2),
    ("forward", 4, 64, False): Tiles(32, 32, 4, 2),
    ("forward", 4, 64, True): Tiles(32, 32, 8, 2),
    ("forward", 4, 128, False): Tiles(32, 32, 8, 2),
    ("forward", 4, 128, True): Tiles(16, 32, 4, 2),
    ("query_gradient", 2, 64, False): Tiles(128, 64, 8, 3),
    ("query_gradient", 2, 64, True): Tiles(32, 32, 4, 2),
    ("query_gradient", 2, 128, False): Tiles(64, 32, 4, 2),
    ("query_gradient", 2, 128, True): Tiles(64, 64, 8, 2),
    ("query_gradient", 2, 256, False): Tiles(32, 32, 4, 2),
    ("query_gradient", 2, 256, True): Tiles(32, 64, 8, 2),
    ("query_gradient", 4, 64, False): Tiles(32, 32, 4, 2),
    ("query_gradient", 4, 64, True): Tiles(32, 32, 8, 2),
    ("query_gradient", 4, 128, False): Tiles(16, 32, 8, 2),
    ("query_gradient", 4, 128, True): Tiles(16, 32, 8, 2),
    ("key_gradient", 2, 64, False): Tiles(128, 32, 8, 2),
    ("key_gradient", 2, 64, True): Tiles(32, 32, 4, 2),
    ("key_gradient", 2, 128, False): Tiles(32, 32, 4, 2),
    ("key_gradient", 2, 128, True): Tiles(32, 32, 8, 2),
    ("key_gradient", 2, 256, False): Tiles(32, 64, 8, 2),
    ("key_gradient", 2, 256, True): Tiles(32, 32, 8, 2),
    ("key_gradient", 4, 64, False): Tiles(32, 32, 8, 1),
    ("key_gradient", 4, 64, True): Tiles(32, 16, 8, 2),
    ("key_gradient", 4, 128, False): Tiles(16, 16, 8, 1),
    ("key_gradient", 4, 128, True): Tiles(16, 16, 8, 2),
    ("table_gradient", 2, 64, True): Tiles(32, 32, 4, 1),
    ("table_gradient", 2, 128, True): Tiles(32, 64, 4, 1),
    ("table_gradient", 2, 256, True): Tiles(64, 64, 8, 1),
    ("table_gradient", 4, 64, True): Tiles(32, 32, 8, 1),
    ("table_gradient", 4, 128, True): Tiles(32, 32, 8, 1),
}


# Instead of those of TILES on Hopper (sm_90), whose warp-group products take 64 rows a warp group and read an operand
# less often the more rows there are. With triton 3.6 and 3.7 none of them spills.
HOPPER_TILES: dict[TileKey, Tiles] = {
    ("forward", 2, 64, True): Tiles(128, 64, 8, 2),
    ("forward", 2, 128, False): Tiles(128, 64, 8, 2),
    ("forward", 2, 128, True): Tiles(128, 32, 8, 2),
    ("forward", 2, 256, True): Tiles(32, 32, 8, 2),
    ("query_gradient", 2, 64, True): Tiles(128, 64, 8, 2),
    ("query_gradient", 2, 128, False): Tiles(128, 64, 8, 2),
    ("query_gradient", 2, 128, True): Tiles(128, 32, 8, 2),
    ("key_gradient", 2, 64, False): Tiles(128, 64, 8, 2),
    ("key_gradient", 2, 64, True): Tiles(128, 32, 8, 2),
    ("key_gradient", 2, 128, False): Tiles(128, 32, 8, 2),
    ("key_gradient", 2, 128, True): Tiles(64, 32, 8, 2),
    ("table_gradient", 2, 64, True): Tiles(64, 64, 8, 1),
    ("table_gradient", 2, 128, True): Tiles(64, 128, 8, 1),
}


def tiles_on(capability: int) -> dict[TileKey, Tiles]:
    """All tiles for GPUs of a compute capability: 90 for sm_90."""
    return TILES | HOPPER_TILES if capability == 90 else TILES


def tiles_of(kernel: str, dtype: torch.dtype, width: int, biased: bool, capability: int) -> Tiles:
    """The tiles for heads of the padded width `width`. Raises ValueError if there are none."""
    for key, tiles in TILES.items():
        name, size, widest, bias = key
        if (name, size, bias) == (kernel, dtype.itemsize, biased) and width <= widest:
            return HOPPER_TILES.get(key, tiles) if capability == 90 else tiles
    raise ValueError(
        f"q_THQ and v_THV have up to {width} elements a head, padded to a power of two; on a GPU at most "
        f"{MAX_WIDTH[2]} are supported in bfloat16 and float16, {MAX_WIDTH[4]} in float32. Use half precision, more "
        "heads, or gr.ops.backend.force_backend('torch')"
    )


@functools.cache
def capability_of(device: torch.device) -> int:
    """90 for sm_90; 0 for the interpreter's CPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def padded_width(width: int) -> int:
    """The width of a tile for heads of `width`: a power of two that tensor cores take."""
    return max(16, triton.next_power_of_2(width))


def _features(
    call: AttentionCall, q: Tensor, v: Tensor, position: Tensor | None, time: Tensor | None
) -> dict[str, Any]:
    """The compile-time arguments of a launch."""
    mask = call.mask
    return {
        **{"Q": q.shape[2], "V": v.shape[2], "QP": padded_width(q.shape[2]), "VP": padded_width(v.shape[2])},
        **{"ROW_SCALE": call.scale_T.numel() > 1, "TARGETS": mask.num_targets_B is not None},
        **{"TIME": time is not None, "POSITION": position is not None},
        **{"WINDOW": mask.max_attn_len, "CONTEXT": mask.contextual_len, "FULL": mask.min_full_attn_seq_len},
        "FAST": q.dtype.itemsize == 2 and not triton.knobs.runtime.interpret,
    }


def _inputs(call: AttentionCall, position: Tensor | None, time: Tensor | None) -> tuple[Tensor | None, ...]:
    """Offsets, targets, scale, both times in int32 seconds, edges, time bias, position bias from distance 0 on."""
    middle = None if position is None else position[position.numel() // 2 :]
    shared = (call.offsets_B1, call.mask.num_targets_B, call.scale_T)
    if call.time_buckets is None or time is None:
        return *shared, None, None, None, None, middle
    return *shared, *call.time_buckets.seconds, time, middle


def _tiles(kernel: str, q: Tensor, v: Tensor, *tables: Tensor | None) -> Tiles:
    biased = any(table is not None for table in tables)
    width = max(padded_width(q.shape[2]), padded_width(v.shape[2]))
    return tiles_of(kernel, q.dtype, width, biased, capability_of(q.device))


def _last_bucket(time: Tensor | None) -> int:
    return 0 if time is None else time.numel() - 1


def hstu_attention_triton(operands: Operands, call: AttentionCall) -> Tensor:
    """hstu_attention_reference for float32, bfloat16 and float16; the same bits every time.

    The grids depend on call.max_length and not on the offsets, so that nothing waits for the device.
    """
    targets_B = call.mask.num_targets_B
    if targets_B is not None:
        call = replace(call, mask=replace(call.mask, num_targets_B=targets_B.contiguous()))
    return _Triton.apply(*operands, call)


def _operand(x_THD: Tensor) -> Tensor:
    """Rows and heads may be strided; the elements of a head must be neighbours."""
    return x_THD if x_THD.stride(2) == 1 else x_THD.contiguous()


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return *(x.stride(0) for x in tensors), *(x.stride(1) for x in tensors)


class _Triton(torch.autograd.Function):
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
        return forward(call, (q, k, v), position, time)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, position, time = ctx.saved_tensors
        operands = tuple(_operand(x) for x in (q, k, v, grad))
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        dposition, dtime = (None if x is None else torch.zeros_like(x) for x in (position, time))
        if q.numel():
            with torch.cuda.device_of(q):
                query_gradient(ctx.call, operands, position, time, dq)
                dcandidates_TH = key_gradient(ctx.call, operands, position, time, dk, dv)
                if position is not None or time is not None:
                    dposition, dtime = table_gradients(ctx.call, operands, position, time, dcandidates_TH)
        return dq, dk, dv, dposition, dtime, None, None


_Operands = tuple[Tensor, ...]  # q, k, v and, backwards, the gradient of the output


def forward(call: AttentionCall, operands: _Operands, position: Tensor | None, time: Tensor | None) -> Tensor:
    q, k, v = (_operand(x) for x in operands)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    tiles, heads = _tiles("forward", q, v, position, time), q.shape[1]
    grid = (call.sequences * heads, triton.cdiv(call.max_length, tiles.outer))
    if q.numel():
        with torch.cuda.device_of(q):
            forward_kernel[grid](
                *(q, k, v, out, *_inputs(call, position, time)),
                *(*_strides(q, k, v, out), heads, _last_bucket(time), call.alpha / 2),
                **{"M": tiles.outer, "N": tiles.inner, **_features(call, q, v, position, time)},
                num_warps=tiles.warps,
                num_stages=tiles.stages,
            )
    return out


def query_gradient(
    call: AttentionCall, operands: _Operands, position: Tensor | None, time: Tensor | None, dq: Tensor
) -> None:
    """Fills dq."""
    q, _, v, _ = operands
    tiles, heads = _tiles("query_gradient", q, v, position, time), q.shape[1]
    grid = (call.sequences * heads, triton.cdiv(call.max_length, tiles.outer))
    query_gradient_kernel[grid](
        *(*operands, dq, *_inputs(call, position, time)),
        *(*_strides(*operands, dq), heads, _last_bucket(time), call.alpha / 2),
        **{"M": tiles.outer, "N": tiles.inner, **_features(call, q, v, position, time)},
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def key_gradient(
    call: AttentionCall, operands: _Operands, position: Tensor | None, time: Tensor | None, dk: Tensor, dv: Tensor
) -> Tensor | None:
    """Fills dk and dv, and returns dcandidates [T, H] of key_gradient_kernel, or None."""
    q, _, v, _ = operands
    tiles, heads = _tiles("key_gradient", q, v, position, time), q.shape[1]
    shifted = position is not None and call.mask.num_targets_B is not None
    dcandidates_TH = q.new_empty(q.shape[:2], dtype=torch.float32) if shifted else None
    grid = (call.sequences * heads, triton.cdiv(call.max_length, tiles.outer))
    key_gradient_kernel[grid](
        *(*operands, dk, dv, dcandidates_TH, *_inputs(call, position, time)),
        *(*_strides(*operands, dk, dv), heads, _last_bucket(time), call.alpha / 2),
        **{"M": tiles.inner, "N": tiles.outer, **_features(call, q, v, position, time)},
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return dcandidates_TH


def table_gradients(
    call: AttentionCall,
    operands: _Operands,
    position: Tensor | None,
    time: Tensor | None,
    dcandidates_TH: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    q, _, v, _ = operands
    tiles, heads = _tiles("table_gradient", q, v, position, time), q.shape[1]
    below = triton.cdiv(call.max_length, tiles.outer)
    ahead = below - 1 if call.mask.contextual_len else 0
    parts = min(call.sequences, triton.cdiv(_TABLE_PROGRAMS, (below + ahead) * heads))
    grid = (below + ahead, parts, heads)
    squares = None if position is None else q.new_empty(*reversed(grid), tiles.outer, tiles.outer, dtype=torch.float32)
    sums = None if time is None else q.new_zeros(*reversed(grid), time.numel(), dtype=torch.float32)
    table_gradient_kernel[grid](
        *(*operands, squares, sums, *_inputs(call, position, time)),
        *(*_strides(*operands), call.sequences, ahead, _last_bucket(time), call.alpha / 2),
        **{"M": tiles.outer, "C": tiles.inner, **_features(call, q, v, position, time)},
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    dtime = None if sums is None else sums.sum((0, 1, 2), dtype=torch.float64).float()
    if position is None or squares is None:
        return None, dtime
    return _along_diagonals(call, position, squares.sum((0, 1), dtype=torch.float64), ahead, dcandidates_TH), dtime


def _along_diagonals(
    call: AttentionCall, position: Tensor, squares_AMM: Tensor, ahead: int, dcandidates_TH: Tensor | None
) -> Tensor:
    """The gradient of the position table. squares_AMM: the summed tiles at each of A distances from the diagonal."""
    away = torch.arange(squares_AMM.shape[0], device=position.device)[:, None, None] - ahead
    m = torch.arange(squares_AMM.shape[1], device=position.device)
    middle = position.numel() // 2
    # Elements beyond the table are zero. index_put_ with accumulate sorts, so its sums have one order.
    index_AMM = (middle - away * m.numel() + m[None, :] - m[:, None]).clamp(0, position.numel() - 1)
    total = squares_AMM.new_zeros(position.numel()).index_put_((index_AMM,), squares_AMM, accumulate=True)
    if dcandidates_TH is not None and call.mask.num_targets_B is not None:
        offsets, tokens = call.offsets_B1, dcandidates_TH.shape[0]
        lengths_B = offsets.diff()
        history_B = lengths_B - call.mask.num_targets_B
        # The distance of key j from the candidates of its sequence is j - history; a candidate is at distance 0.
        ends_T = (offsets[:-1] + history_B).repeat_interleave(lengths_B, output_size=tokens)
        from_end_T = (torch.arange(tokens, device=offsets.device) - ends_T).clamp(max=0)
        total.index_put_((middle + from_end_T,), dcandidates_TH.sum(1, dtype=torch.float64), accumulate=True)
    return total.float()
