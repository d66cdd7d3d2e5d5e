"""Packed and padded forms, over random lengths."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from gr.ops.jagged import check_offsets, jagged_to_padded, padded_to_jagged

lengths_lists = st.lists(st.integers(0, 9), max_size=8)


def offsets_of(lengths: list[int]) -> Tensor:
    return F.pad(torch.tensor(lengths, dtype=torch.int64).cumsum(0), (1, 0))


@given(lengths=lengths_lists, extra=st.integers(0, 3), width=st.integers(1, 4))
def test_padding_is_where_it_should_be(lengths: list[int], extra: int, width: int) -> None:
    offsets, longest = offsets_of(lengths), max(lengths, default=0) + extra
    values = torch.randn(int(offsets[-1]), width)
    padded = jagged_to_padded(values, offsets, longest)
    assert padded.shape == (len(lengths), longest, width)
    for row, sequence in zip(padded, values.split(lengths) if lengths else [], strict=True):
        assert torch.equal(row[: len(sequence)], sequence)
        assert not row[len(sequence) :].any()


@given(lengths=lengths_lists, extra=st.integers(0, 3))
def test_round_trip_and_its_gradient(lengths: list[int], extra: int) -> None:
    offsets = offsets_of(lengths)
    values = torch.randn(int(offsets[-1]), 2, 3, requires_grad=True)
    padded = jagged_to_padded(values, offsets, max(lengths, default=0) + extra)
    back = padded_to_jagged(padded, offsets, values.shape[0])
    assert torch.equal(back, values)
    grad = torch.randn_like(values)
    assert torch.equal(torch.autograd.grad(back, values, grad)[0], grad)


@given(lengths=lengths_lists)
def test_the_two_are_adjoint(lengths: list[int]) -> None:
    """<pad(x), y> == <x, unpad(y)>, and autograd agrees: so padding gets no gradient and tokens get all of it."""
    offsets, longest = offsets_of(lengths), max(lengths, default=0)
    x = torch.randn(int(offsets[-1]), 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(len(lengths), longest, 2, dtype=torch.float64, requires_grad=True)
    left = (jagged_to_padded(x, offsets, longest) * y).sum()
    right = (x * padded_to_jagged(y, offsets, x.shape[0])).sum()
    torch.testing.assert_close(left, right)
    for a, b in zip(torch.autograd.grad(left, (x, y)), torch.autograd.grad(right, (x, y)), strict=True):
        assert torch.equal(a, b)


def test_second_derivatives() -> None:
    offsets = torch.tensor([0, 2, 2, 5])
    x, y = torch.randn(5, 2).double().requires_grad_(), torch.randn(3, 3, 2).double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda a: jagged_to_padded(a, offsets, 3) ** 2, x)
    assert torch.autograd.gradgradcheck(lambda a: padded_to_jagged(a, offsets, 5) ** 2, y)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        (torch.tensor([0.0, 3.0]), "int64"),
        (torch.tensor([], dtype=torch.int64), "int64 of shape"),
        (torch.tensor([1, 3]), "starts at 1"),
        (torch.tensor([0, 2]), "ends at 2"),
        (torch.tensor([0, 3, 1, 3]), "decrease"),
        (torch.tensor([0, 0, 3]), "max_length = 2, but a sequence has 3"),
    ],
)
def test_bad_offsets(offsets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_offsets(offsets, tokens=3, max_length=2)
