"""The Triton kernels of HSTU attention against the definition in float64: values and every gradient.

The interpreter's time is by the operation, not by the element: large tiles and short sequences keep it in seconds.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gr.ops.backend import force_backend
from gr.ops.hstu_attention import hstu_attention
from gr.ops.hstu_attention import triton as kernels
from gr.ops.hstu_attention.triton import Tiles
from tests.ops.test_hstu_attention import (
    DTYPES,
    MAX_LENGTH,
    NAMES,
    Case,
    make_case,
    offsets_of,
    run,
    test_a_known_output_is_returned_with_its_gradients,
    test_few_tokens,
)
from tests.ops.test_hstu_masks import mask_of, masked_case
from tests.support.tolerances import assert_near

__all__ = ["test_a_known_output_is_returned_with_its_gradients", "test_few_tokens"]

LENGTHS = [98, 0, 1, 63, 64, 65]
TARGETS = [40, 0, 1, 5, 0, 64]
MASKS = [
    (prefix, *seen, TARGETS if (row + column) % 2 == 0 else None)
    for row, prefix in enumerate((0, 1, 70))
    for column, seen in enumerate([(0, 0), (40, 0), (40, 70)])
]


def use_tiles(monkeypatch: pytest.MonkeyPatch, outer: int, inner: int) -> None:
    monkeypatch.setattr(kernels, "tiles_of", lambda kernel, dtype, width, biased, capability: Tiles(outer, inner, 4, 1))


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, 64, 64)


def assert_kernels(case: Case, dtype: torch.dtype) -> None:
    names = [*NAMES[:4], *(["dposition"] if case.position_bias is not None else []), "dtime"]
    reference = run(case, torch.float64, "torch")
    for name, actual, expected in zip(names, run(case, dtype, "triton"), reference, strict=False):
        assert_near(actual, expected, dtype, f"{name} under {case.mask}")


@pytest.mark.parametrize("widths", [(1, 16, 16), (2, 25, 50), (1, 72, 128)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shipped_tiles(widths: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert_kernels(make_case([65, 0, 1, 34], widths, dtype), dtype)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_widest_heads(dtype: torch.dtype, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precisions use the shipped tiles; float32, which has none so wide, shows that the kernels are exact."""
    if dtype == torch.float32:
        use_tiles(monkeypatch, 32, 64)
    assert_kernels(make_case([65, 0, 1, 34], (1, 200, 256), dtype, biased=biased), dtype)


@pytest.mark.parametrize(("prefix", "window", "full", "targets"), MASKS, ids=str)
@pytest.mark.usefixtures("large_tiles")
def test_masks(prefix: int, window: int, full: int, targets: list[int] | None) -> None:
    """Every pair of a prefix, a window and targets; tests/ops has every triple, on a GPU for these kernels too."""
    lengths = [98, 0, 70, 128] if prefix > 1 else LENGTHS
    if targets is not None and prefix:
        targets = [min(count, max(0, length - prefix)) for count, length in zip(targets, lengths, strict=False)]
    assert_kernels(masked_case(mask_of(targets, window, prefix, full), lengths, heads=1), torch.float32)


@pytest.mark.parametrize("tiles", [(32, 64), (64, 32), (128, 64)], ids=str)
def test_tiles_that_are_not_square(tiles: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, *tiles)
    assert_kernels(masked_case(mask_of([60, 0, 33], 40, 0, 20), [130, 33, 64], heads=1), torch.float32)
    assert_kernels(masked_case(mask_of([60, 0, 33], 0, 31), [130, 33, 64], heads=1), torch.float32)


@pytest.mark.parametrize(("window", "prefix"), [(0, 0), (40, 0), (0, 70)], ids=str)
@pytest.mark.usefixtures("large_tiles")
def test_tables_summed_over_many_sequences(window: int, prefix: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program of the tables takes all sequences in turn, among them empty and short ones."""
    monkeypatch.setattr(kernels, "_TABLE_PROGRAMS", 1)
    assert_kernels(masked_case(mask_of([0, 0, 28, 0], window, prefix), [70, 0, 98, 0], heads=1), torch.float32)


@pytest.mark.parametrize("removed", ["position_bias", "time_bias", "both"])
@pytest.mark.usefixtures("large_tiles")
def test_a_divisor_of_each_row_and_fewer_biases(removed: str) -> None:
    case = make_case([70, 5], (2, 16, 16), torch.float32, per_row=True)
    if removed != "time_bias":
        case = replace(case, position_bias=None)
    if removed != "position_bias":
        case = replace(case, time_bias=None, buckets=None)
    assert_kernels(case, torch.float32)


def test_a_thousand_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, 128, 128)
    case = make_case([1000], (1, 64, 64), torch.float16, biased=False)
    values = [x.half().requires_grad_() for x in (case.q, case.k, case.v)]
    exact = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    outs = []
    for inputs, backend in ((values, "triton"), (exact, "torch")):
        with force_backend(backend):
            out = hstu_attention(*inputs, case.offsets, max_length=1000, divisor=211.0)
            outs.append([out, *torch.autograd.grad(out, inputs, case.grad.to(out.dtype))])
    for name, actual, expected in zip(NAMES, *outs, strict=False):
        assert_near(actual, expected, torch.float16, name)


@pytest.mark.usefixtures("large_tiles")
def test_times_in_any_order_and_at_the_edges_of_buckets() -> None:
    """Queries earlier than their keys, and differences of exactly an edge and of one less."""
    case = make_case([70, 65], (1, 16, 16), torch.float32)
    assert case.buckets is not None
    edges = torch.tensor([0, 1, 2, 3, 4, 5, 10**6, 2**30, 412, 411, 410])  # 412 = ceil(exp(20 x .301))
    times = edges[torch.randint(0, len(edges), (135,))]
    buckets = replace(case.buckets, timestamps_T=times, query_timestamps_T=times.flip(0))
    assert_kernels(replace(case, buckets=buckets), torch.float32)


def test_times_that_do_not_fit() -> None:
    case = make_case([3], (1, 16, 16), torch.float32)
    assert case.buckets is not None
    buckets = replace(case.buckets, timestamps_T=torch.tensor([0, 5, 2**31 - 1]))
    with pytest.raises(ValueError, match="68 years or more"):
        run(replace(case, buckets=buckets), torch.float32, "triton")


@pytest.mark.usefixtures("large_tiles")
def test_views_of_a_poisoned_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN fills everything around q, k, v and the gradient, and every output before it is written."""
    case = make_case([70, 0, 5], (2, 25, 16), torch.float32)
    empty = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x, **options: empty(x, **options).fill_(float("nan")))

    def in_poison(x: Tensor) -> Tensor:
        tokens, heads, width = x.shape
        buffer = torch.full((tokens + 4, heads + 2, width + 7), float("nan"), dtype=torch.float32)
        view = buffer[2:-2, 1:-1, 3:-4]
        view.copy_(x)
        return view

    q, k, v, grad = (in_poison(x) for x in (case.q, case.k, case.v, case.grad))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert case.position_bias is not None and case.time_bias is not None
    position, time = (x.float().requires_grad_() for x in (case.position_bias, case.time_bias))
    with force_backend("triton"):
        out = hstu_attention(
            *inputs,
            case.offsets,
            max_length=MAX_LENGTH,
            divisor=211.0,
            position_bias=position,
            time_bias=time,
            time_buckets=case.buckets,
        )
        actual = [out, *torch.autograd.grad(out, [*inputs, position, time], grad)]
        turned = [x.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_() for x in inputs]
        out = hstu_attention(*turned, case.offsets, max_length=MAX_LENGTH, divisor=211.0)
        expanded = torch.autograd.grad(out.sum(), turned)
    for value, expected in zip(actual, run(case, torch.float32, "triton"), strict=True):
        assert torch.equal(value, expected)
    plain = replace(case, position_bias=None, time_bias=None, buckets=None, grad=torch.ones_like(case.grad))
    for value, expected in zip(expanded, run(plain, torch.float64, "torch")[1:], strict=True):
        assert_near(value, expected, torch.float32, "gradient")


@pytest.mark.usefixtures("large_tiles")
def test_same_bits_every_time_and_whatever_the_batch() -> None:
    case = masked_case(mask_of([9, 0, 3], 40), [100, 63, 65])
    whole, again = run(case, torch.float32, "triton"), run(case, torch.float32, "triton")
    assert all(torch.equal(x, y) for x, y in zip(whole, again, strict=True))
    alone = replace(
        masked_case(mask_of([3], 40), [65], position=False, time=False),
        **{name: getattr(case, name)[163:] for name in ("q", "k", "v", "grad")},
    )
    batched = run(replace(case, position_bias=None, time_bias=None, buckets=None), torch.float32, "triton")
    for together, single in zip(batched, run(alone, torch.float32, "triton"), strict=True):
        assert torch.equal(together[163:], single)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 129), (torch.bfloat16, 257)], ids=str)
def test_heads_too_wide_for_a_gpu(dtype: torch.dtype, width: int) -> None:
    x = torch.zeros(3, 1, width, dtype=dtype)
    with force_backend("triton"), pytest.raises(ValueError, match=r"q_THQ and v_THV .* at most 256 .* 128 in float32"):
        hstu_attention(x, x, x, offsets_of([3]), max_length=3, divisor=1.0)
