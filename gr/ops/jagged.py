"""Packed sequences and their padded form. B examples, T packed tokens, N padded length, ... any further dimensions."""

from typing import Any

import torch
from torch import Tensor


def check_offsets(offsets_B1: Tensor, tokens: int, max_length: int) -> None:
    """Raises ValueError unless offsets_B1 cuts `tokens` tokens into sequences of at most `max_length`.

    The values are read on CPU only: reading them from a device would stop its queue at every call. They are not read
    while torch traces the caller, when there are none.
    """
    if offsets_B1.dtype != torch.int64 or offsets_B1.dim() != 1 or offsets_B1.numel() == 0:
        raise ValueError(
            f"offsets_B1 must be int64 of shape [B + 1], not {offsets_B1.dtype} of {list(offsets_B1.shape)}"
        )
    if offsets_B1.device.type != "cpu" or torch.compiler.is_compiling():
        return
    first, last = int(offsets_B1[0]), int(offsets_B1[-1])
    if first != 0 or last != tokens:
        raise ValueError(f"offsets_B1 must start at 0 and end at T = {tokens}; it starts at {first} and ends at {last}")
    if offsets_B1.numel() > 1:
        shortest, longest = (int(length) for length in offsets_B1.diff().aminmax())
        if shortest < 0:
            raise ValueError("offsets_B1 must not decrease")
        if longest > max_length:
            raise ValueError(f"max_length = {max_length}, but a sequence has {longest} tokens")


def padded_rows(offsets_B1: Tensor, tokens: int, padded_length: int) -> Tensor:
    """int64 [T]: the row b * N + i of a padded [B * N, ...] that holds token i of example b, N = padded_length."""
    starts_B = offsets_B1[:-1]
    examples = torch.arange(starts_B.numel(), device=starts_B.device)
    shift_T = torch.repeat_interleave(examples * padded_length - starts_B, offsets_B1.diff(), output_size=tokens)
    return torch.arange(tokens, device=starts_B.device) + shift_T


def jagged_to_padded(values: Tensor, offsets_B1: Tensor, padded_length: int) -> Tensor:
    """Packed [T, ...] to padded [B, N, ...], N = padded_length, with zeros after the end of each sequence.

    offsets_B1: int64, offsets_B1[0] == 0, offsets_B1[-1] == T. Differentiable.
    Raises ValueError if the offsets do not fit T or a sequence is longer than padded_length.
    """
    check_offsets(offsets_B1, values.shape[0], padded_length)
    rows_T = padded_rows(offsets_B1, values.shape[0], padded_length)
    examples = offsets_B1.numel() - 1
    return _Spread.apply(values, rows_T, examples * padded_length).unflatten(0, (examples, padded_length))


def padded_to_jagged(padded: Tensor, offsets_B1: Tensor, tokens: int) -> Tensor:
    """Padded [B, N, ...] to packed [T, ...], T = tokens, without the padding. Differentiable.

    Raises ValueError if the offsets do not fit [B, N] and T.
    """
    if offsets_B1.numel() != padded.shape[0] + 1:
        raise ValueError(f"offsets_B1 has {offsets_B1.numel()} entries; padded has B = {padded.shape[0]}, so B + 1 fit")
    check_offsets(offsets_B1, tokens, padded.shape[1])
    return _Pick.apply(padded.flatten(0, 1), padded_rows(offsets_B1, tokens, padded.shape[1]))


class _Spread(torch.autograd.Function):
    """out[rows[t]] = values[t], zero elsewhere. Rows are distinct, so the gradient is a plain pick and no sum."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rows_T: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(rows_T)
        return values.new_zeros(size, *values.shape[1:]).index_copy_(0, rows_T, values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (rows_T,) = ctx.saved_tensors
        return _Pick.apply(grad, rows_T), None, None


class _Pick(torch.autograd.Function):
    """out[t] = values[rows[t]] with distinct rows: the adjoint of _Spread."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rows_T: Tensor) -> Tensor:
        ctx.save_for_backward(rows_T)
        ctx.size = values.shape[0]
        return values.index_select(0, rows_T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows_T,) = ctx.saved_tensors
        return _Spread.apply(grad, rows_T, ctx.size), None
