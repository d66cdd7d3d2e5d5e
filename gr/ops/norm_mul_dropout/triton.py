"""norm_mul_dropout in Triton, for CUDA tensors; TRITON_INTERPRET=1 runs the kernels on CPU tensors, for tests.

A program of the forward pass takes one row. A program of the backward pass takes every n-th row, n programs, and sums
the gradients of the norm in its own row of partial sums, so that sums have one order. A row is a tile [G, V] of groups
of the norm and elements of a group, padded to powers of two [GP, VP].
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from gr.ops.norm_mul_dropout.reference import FIRST, SECOND, STEP, Gate

_PROGRAMS = 1024  # the most programs of the backward pass
_MAX_TILE = 16384  # elements of a row, padded
_C_STEP, _C_FIRST, _C_SECOND = tl.constexpr(STEP), tl.constexpr(FIRST), tl.constexpr(SECOND)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * tl.full((), _C_FIRST, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), _C_SECOND, tl.uint32)
    return x ^ (x >> 15)


@triton.jit
def _keep(x, row, columns, seed, dropped, scale):
    """x times scale, or zero where keep_mask of reference.py is False."""
    key = _mix(_mix(row.to(tl.uint32)) ^ seed.to(tl.uint32))
    hashed = _mix(key + columns.to(tl.uint32) * tl.full((), _C_STEP, tl.uint32))
    return tl.where(hashed.to(tl.int64) >= dropped, x * scale, 0.0)


@triton.jit
def _prepare(
    u_ptr, a_ptr, weight, bias, row, u_row, a_row, eps, G: tl.constexpr, V: tl.constexpr, GP: tl.constexpr,
    VP: tl.constexpr, SILU: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """A tuple: u after its activation, the derivative of that activation, a, normed a before and after the affine map,
    the weight of that map, 1 / deviation, the offsets of the tile's elements in a row, and which of them exist.
    """
    g, v = tl.arange(0, GP)[:, None], tl.arange(0, VP)[None, :]
    inside = (g < G) & (v < V)
    at = g * V + v
    u = tl.load(u_ptr + row * u_row + at, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + row * a_row + at, mask=inside, other=0.0).to(tl.float32)
    slope = tl.full([GP, VP], 1.0, tl.float32)
    if SILU:
        gate = tl.sigmoid(u)
        u = u * gate
        slope = gate + u * (1.0 - gate)
    centred = tl.where(inside, a - (tl.sum(a, 1) / V)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / V + eps)
    hat = centred * rstd[:, None]
    normed = hat
    scale = tl.full([GP, VP], 1.0, tl.float32)
    if AFFINE:
        scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        normed = hat * scale + tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    return u, slope, a, hat, normed, scale, rstd, at, inside


@triton.jit
def forward_kernel(
    u_ptr, a_ptr, weight, bias, y_ptr, u_row, a_row, eps, seed, dropped, keep_scale, G: tl.constexpr, V: tl.constexpr,
    GP: tl.constexpr, VP: tl.constexpr, SILU: tl.constexpr, AFFINE: tl.constexpr, CONCAT: tl.constexpr,
    DROP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    u, _, a, _, normed, _, _, at, inside = _prepare(
        u_ptr, a_ptr, weight, bias, row, u_row, a_row, eps, G, V, GP, VP, SILU, AFFINE
    )
    U: tl.constexpr = G * V
    last = u * normed
    if CONCAT:
        y_ptr += row * (3 * U)
        if DROP:
            u = _keep(u, row, at, seed, dropped, keep_scale)
            a = _keep(a, row, at + U, seed, dropped, keep_scale)
            last = _keep(last, row, at + 2 * U, seed, dropped, keep_scale)
        tl.store(y_ptr + at, u.to(y_ptr.dtype.element_ty), mask=inside)
        tl.store(y_ptr + U + at, a.to(y_ptr.dtype.element_ty), mask=inside)
        tl.store(y_ptr + 2 * U + at, last.to(y_ptr.dtype.element_ty), mask=inside)
    else:
        if DROP:
            last = _keep(last, row, at, seed, dropped, keep_scale)
        tl.store(y_ptr + row * U + at, last.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    dy_ptr, u_ptr, a_ptr, weight, bias, du_ptr, da_ptr, sums, rows, u_row, a_row, eps, seed, dropped, keep_scale,
    G: tl.constexpr, V: tl.constexpr, GP: tl.constexpr, VP: tl.constexpr, SILU: tl.constexpr, AFFINE: tl.constexpr,
    CONCAT: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """sums [programs, 2, U]: the gradients of the norm's weight and bias, summed over the rows of each program."""
    U: tl.constexpr = G * V
    dweight = tl.zeros([GP, VP], tl.float32)
    dbias = tl.zeros([GP, VP], tl.float32)
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        u, slope, _, hat, normed, scale, rstd, at, inside = _prepare(
            u_ptr, a_ptr, weight, bias, row, u_row, a_row, eps, G, V, GP, VP, SILU, AFFINE
        )
        if CONCAT:
            grads = dy_ptr + row * (3 * U)
            du = tl.load(grads + at, mask=inside, other=0.0).to(tl.float32)
            da = tl.load(grads + U + at, mask=inside, other=0.0).to(tl.float32)
            dlast = tl.load(grads + 2 * U + at, mask=inside, other=0.0).to(tl.float32)
            if DROP:
                du = _keep(du, row, at, seed, dropped, keep_scale)
                da = _keep(da, row, at + U, seed, dropped, keep_scale)
                dlast = _keep(dlast, row, at + 2 * U, seed, dropped, keep_scale)
        else:
            du = tl.zeros([GP, VP], tl.float32)
            da = tl.zeros([GP, VP], tl.float32)
            dlast = tl.load(dy_ptr + row * U + at, mask=inside, other=0.0).to(tl.float32)
            if DROP:
                dlast = _keep(dlast, row, at, seed, dropped, keep_scale)
        dnormed = dlast * u
        du = (du + dlast * normed) * slope
        dweight += dnormed * hat
        dbias += dnormed
        dhat = dnormed * scale
        mean = tl.sum(dhat, 1) / V
        along = tl.sum(dhat * hat, 1) / V
        da += rstd[:, None] * (dhat - mean[:, None] - hat * along[:, None])
        tl.store(du_ptr + row * U + at, du.to(du_ptr.dtype.element_ty), mask=inside)
        tl.store(da_ptr + row * U + at, da.to(da_ptr.dtype.element_ty), mask=inside)
    if AFFINE:
        g, v = tl.arange(0, GP)[:, None], tl.arange(0, VP)[None, :]
        sums += tl.program_id(0).to(tl.int64) * (2 * U) + g * V + v
        tl.store(sums, dweight, mask=(g < G) & (v < V))
        tl.store(sums + U, dbias, mask=(g < G) & (v < V))


def shape_of(width: int, affine: bool, gate: Gate) -> dict[str, int | bool]:
    """The compile-time arguments of a launch. Raises ValueError if a row does not fit into a program."""
    part = width // gate.groups
    padded = {"GP": triton.next_power_of_2(gate.groups), "VP": triton.next_power_of_2(part)}
    if padded["GP"] * padded["VP"] > _MAX_TILE:
        raise ValueError(
            f"u_TU has {width} columns, in {gate.groups} groups; on a GPU at most {_MAX_TILE} are supported"
        )
    flags = {"SILU": gate.silu, "AFFINE": affine, "CONCAT": gate.concat, "DROP": gate.dropped > 0}
    return {"G": gate.groups, "V": part, **padded, **flags}


def warps_of(shape: Mapping[str, int]) -> int:
    """Warps for eight elements a thread, which spill no register; at most 16, so rows beyond 4096 columns do spill."""
    return min(max(shape["GP"] * shape["VP"] // 256, 4), 16)


def _numbers(u: Tensor, a: Tensor, gate: Gate) -> tuple[int | float, ...]:
    return u.stride(0), a.stride(0), gate.eps, gate.seed, gate.dropped, 1 / (1 - gate.dropout)


def norm_mul_dropout_triton(u: Tensor, a: Tensor, affine: tuple[Tensor | None, Tensor | None], gate: Gate) -> Tensor:
    """norm_mul_dropout_reference, computed in float32."""
    y = u.new_empty(u.shape[0], u.shape[1] * (3 if gate.concat else 1))
    if u.numel():
        shape = shape_of(u.shape[1], affine[0] is not None, gate)
        with torch.cuda.device_of(u):
            forward_kernel[(u.shape[0],)](u, a, *affine, y, *_numbers(u, a, gate), **shape, num_warps=warps_of(shape))
    return y


def norm_mul_dropout_backward_triton(
    dy: Tensor, u: Tensor, a: Tensor, affine: tuple[Tensor | None, Tensor | None], gate: Gate
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of u and of a, and [2, U] of the norm's weight and bias, zero without an affine map."""
    rows, width = u.shape
    du, da = (torch.empty_like(u, memory_format=torch.contiguous_format) for _ in range(2))
    programs = min(rows, _PROGRAMS)
    sums = u.new_zeros(programs if affine[0] is not None else 0, 2, width, dtype=torch.float32)
    if u.numel():
        shape = shape_of(width, affine[0] is not None, gate)
        with torch.cuda.device_of(u):
            backward_kernel[(programs,)](
                *(dy, u, a, *affine, du, da, sums, rows, *_numbers(u, a, gate)), **shape, num_warps=warps_of(shape)
            )
    return du, da, sums.sum(0, dtype=torch.float64)
