"""Softmax attention on packed sequences against a loop over them in float64."""

from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import gr.ops.softmax_attention as attention
from gr.ops.backend import force_backend
from gr.ops.hstu_attention import AttentionMask
from gr.ops.norm_mul_dropout.reference import Gate, keep_mask
from gr.ops.softmax_attention import softmax_attention
from tests.support.tolerances import assert_near


def definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    mask: AttentionMask | None = None,
    factors_THN: Tensor | None = None,
) -> Tensor:
    """Sequence by sequence, every query head with its own copy of the keys and values that it shares.

    factors_THN: what dropout multiplies the weights by, of each query, its head and the key's place.
    """
    outputs = []
    factors = [None] * len(lengths) if factors_THN is None else factors_THN.split(lengths)
    for index, parts in enumerate(zip(*(x.split(lengths) for x in (q, k, v)), strict=True)):
        a, b, c = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in parts)
        n = a.shape[0]
        scores = torch.einsum("ihd,jhd->hij", a, b) / q.shape[2] ** 0.5
        targets_B = None if mask is None else mask.num_targets_B
        history = torch.tensor(n if targets_B is None else n - int(targets_B[index]))
        scores = scores.masked_fill(~(mask or AttentionMask()).seen(n, history), float("-inf"))
        weights = F.softmax(scores, dim=-1)
        if (factor := factors[index]) is not None:
            weights = weights * factor[:, :, :n].transpose(0, 1)
        outputs.append(torch.einsum("hij,jhd->ihd", weights, c))
    return torch.cat(outputs)


LENGTHS = [65, 0, 1, 2, 64, 0]


def check_against_definition(
    dtype: torch.dtype, widths: tuple[int, int, int, int], mask: AttentionMask | None = None
) -> None:
    offsets = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0))
    H, G, Q, V = widths
    shapes = [(132, H, Q), (132, G, Q), (132, G, V), (132, H, V)]
    *references, grad = [torch.randn(shape).to(dtype).double().requires_grad_() for shape in shapes]
    q, k, v = references
    expected = definition(q, k, v, LENGTHS, mask)
    values = [x.detach().to(dtype).requires_grad_() for x in references]
    q, k, v = values
    out = softmax_attention(q, k, v, offsets, max_length=100, mask=mask)
    actual = [out, *torch.autograd.grad(out, values, grad.to(dtype))]
    for value, reference in zip(actual, [expected, *torch.autograd.grad(expected, references, grad)], strict=True):
        assert_near(value, reference, dtype, "softmax attention")


@pytest.mark.parametrize("widths", [(1, 1, 50, 50), (2, 2, 25, 16), (4, 2, 16, 16), (6, 1, 8, 12)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_matches_definition(dtype: torch.dtype, widths: tuple[int, int, int, int]) -> None:
    """H query heads, G key and value heads, their widths Q and V."""
    check_against_definition(dtype, widths)


@pytest.mark.parametrize("targets", [None, [60, 0, 0, 1, 5, 0]], ids=["no candidates", "candidates"])
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("window", [0, 7])
def test_masks_are_those_of_hstu_attention(targets: list[int] | None, prefix: int, window: int) -> None:
    num_targets = None if targets is None else torch.tensor(targets)
    check_against_definition(torch.float32, (4, 2, 16, 16), AttentionMask(num_targets, window, prefix))


@pytest.mark.gpu
@pytest.mark.parametrize("widths", [(4, 4, 64), (4, 2, 64), (8, 1, 128)], ids=str)
def test_the_kernel_for_packed_sequences(widths: tuple[int, int, int]) -> None:
    """On CUDA in bfloat16, beside the padded computation in float32 on CPU, values and gradients."""
    heads, groups, width = widths
    offsets = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0))
    values = [torch.randn(132, each, width).bfloat16() for each in (heads, groups, groups)]
    grad = torch.randn(132, heads, width).bfloat16()
    results = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        own = [x.to(device, dtype).requires_grad_() for x in values]
        assert attention._packed_kernel_computes(tuple(own), None, 0.0) == (device == "cuda")
        out = softmax_attention(*own, offsets.to(device), max_length=100)
        results.append([out, *torch.autograd.grad(out, own, grad.to(device, dtype))])
    for actual, expected in zip(*results, strict=True):
        assert_near(actual.cpu(), expected.double(), torch.bfloat16, "varlen_attn")


def test_what_the_kernel_for_packed_sequences_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the kernel is replaced by one that computes what torch's documentation says of its arguments."""

    def documented(q, k, v, starts_q, starts_k, max_q, max_k, *, window_size, enable_gqa):
        assert starts_q.dtype == starts_k.dtype == torch.int32 and (max_q, max_k) == (100, 100)
        assert window_size == (-1, 0) and enable_gqa
        return definition(q, k, v, starts_q.diff().tolist())

    monkeypatch.setattr(attention, "_packed_kernel_computes", lambda *_: True)
    monkeypatch.setattr(attention, "varlen_attn", documented)
    check_against_definition(torch.float32, (4, 2, 16, 16))


@pytest.mark.parametrize("mask", [None, AttentionMask(torch.tensor([60, 0, 0, 1, 5, 0]), 7, 1)], ids=["past", "mask"])
def test_dropout_of_the_operator_is_a_hash_of_the_query_its_head_and_the_key(mask: AttentionMask | None) -> None:
    offsets = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0))
    H, probability = 4, 0.3
    references = [torch.randn(132, heads, 16, dtype=torch.float64, requires_grad=True) for heads in (H, 2, 2)]
    torch.manual_seed(7)
    gate = Gate(1, 1e-6, False, False, probability, seed=int(torch.randint(1 << 31, ())))
    kept_THN = keep_mask(gate, 132 * H, max(LENGTHS), torch.device("cpu")).unflatten(0, (132, H))
    assert 0.69 < kept_THN.double().mean() < 0.71
    expected = definition(*references, LENGTHS, mask, kept_THN / (1 - probability))
    values = [x.detach().float().requires_grad_() for x in references]
    torch.manual_seed(7)
    with force_backend("native"):
        out = softmax_attention(*values, offsets, max_length=100, mask=mask, dropout=probability)
    grad = torch.randn(132, H, 16)
    actual = [out, *torch.autograd.grad(out, values, grad)]
    for value, reference in zip(
        actual, [expected, *torch.autograd.grad(expected, references, grad.double())], strict=True
    ):
        assert_near(value, reference, torch.float32, "softmax attention")


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_both_ways_of_a_cpu_equal_the_definition(backend: Literal["native", "torch"]) -> None:
    with force_backend(backend):
        check_against_definition(torch.float32, (6, 2, 12, 20), AttentionMask(torch.tensor([60, 0, 0, 1, 5, 0]), 7, 1))


def test_a_sequence_has_the_same_bits_in_any_batch_and_on_any_number_of_threads() -> None:
    q, k, v = (torch.randn(240, 2, 8) for _ in range(3))
    grad = torch.randn(240, 2, 8)

    def run(stop: int, offsets: list[int]) -> list[Tensor]:
        own = [x[:stop].clone().requires_grad_() for x in (q, k, v)]
        out = softmax_attention(*own, torch.tensor(offsets), max_length=200)
        return [out, *torch.autograd.grad(out, own, grad[:stop])]

    alone, threads = run(70, [0, 70]), torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for one, beside in zip(alone, run(240, [0, 70, 70, 75, 240]), strict=True):
                assert torch.equal(one, beside[:70])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((5, 4, 8), (5, 3, 8), (5, 3, 8)), "k_TGQ has 3 heads, which do not divide the 4 of q_THQ"),
        (((5, 4, 8), (5, 2, 6), (5, 2, 8)), "must be"),
        (((5, 4, 8), (5, 2, 8), (5, 4, 8)), "v_TGV must be"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    q, k, v = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        softmax_attention(q, k, v, torch.tensor([0, 5]), max_length=5)


@pytest.mark.parametrize("offsets", [[0], [0, 0, 0]])
def test_no_tokens(offsets: list[int]) -> None:
    x = torch.zeros(0, 2, 4)
    assert softmax_attention(x, x, x, torch.tensor(offsets), max_length=3).shape == (0, 2, 4)


def test_too_long() -> None:
    x = torch.zeros(5, 1, 4)
    with pytest.raises(ValueError, match="max_length = 4, but a sequence has 5 tokens"):
        softmax_attention(x, x, x, torch.tensor([0, 5]), max_length=4)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_dropout_of_almost_nothing_changes_nothing(backend: Literal["native", "torch"]) -> None:
    """A probability that rounds to zero takes the path with dropout and gives the same numbers as no dropout."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(9, 2, 4) for _ in range(3))
    offsets = torch.tensor([0, 3, 3, 9])
    with force_backend(backend):
        plain = softmax_attention(q, k, v, offsets, max_length=8)
        dropped = softmax_attention(q, k, v, offsets, max_length=8, dropout=1e-10)
        torch.testing.assert_close(dropped, plain)
        assert not torch.allclose(softmax_attention(q, k, v, offsets, max_length=8, dropout=0.5), plain)
