"""HSTU attention: every path and every gradient against the definition in float64.

T packed tokens, B examples, H heads, Q and V widths per head.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gr.ops.backend import Backend, force_backend
from gr.ops.hstu_attention import AttentionMask, TimeBuckets, hstu_attention, time_bucket_ids
from gr.ops.hstu_attention import native as native_path
from gr.ops.hstu_attention.call import AttentionCall, Operands
from gr.ops.hstu_attention.reference import hstu_attention_reference
from tests.support.operators import bfloat16_products
from tests.support.tolerances import assert_near

LENGTHS = [200, 0, 1, 64, 2, 63, 130, 0, 65]
MAX_LENGTH = 200
NUM_BUCKETS = 128
WIDTHS = [(1, 50, 50), (2, 25, 25), (1, 16, 16), (1, 64, 64), (2, 16, 50), (1, 50, 25)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("out", "dq", "dk", "dv", "dposition_bias", "dtime_bias")


@dataclass(frozen=True)
class Case:
    """The inputs of one call, in float64; run() rounds them to its dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    offsets: Tensor
    position_bias: Tensor | None
    time_bias: Tensor | None
    buckets: TimeBuckets | None
    divisor: float | Tensor
    alpha: float = 1.0
    mask: AttentionMask | None = None


def offsets_of(lengths: list[int]) -> Tensor:
    return F.pad(torch.tensor(lengths, dtype=torch.int64).cumsum(0), (1, 0))


def random_buckets(offsets: Tensor, backend: Backend = "torch") -> TimeBuckets:
    timestamps = torch.randint(0, 10**6, (int(offsets[-1]),)).sort().values
    with force_backend(backend):
        return time_bucket_ids(timestamps, timestamps + 1000, offsets, num_buckets=NUM_BUCKETS)


def make_case(
    lengths: list[int], widths: tuple[int, int, int], dtype: torch.dtype, *, biased: bool = True, per_row: bool = False
) -> Case:
    offsets, (heads, width, value_width) = offsets_of(lengths), widths
    tokens = int(offsets[-1])
    q, k, v, grad = (torch.randn(tokens, heads, w).to(dtype).double() for w in (width, width, value_width, value_width))
    return Case(
        q,
        k,
        v,
        grad,
        offsets,
        position_bias=torch.randn(2 * MAX_LENGTH - 1).double() if biased else None,
        time_bias=torch.randn(NUM_BUCKETS + 1).double() if biased else None,
        buckets=random_buckets(offsets) if biased else None,
        divisor=torch.rand(tokens) * 300 + 1 if per_row else 211.0,
    )


def run(case: Case, dtype: torch.dtype, backend: Backend) -> list[Tensor]:
    """The output, then the gradients of q, k, v and of the bias tables, if any."""
    q, k, v = (x.to(dtype).requires_grad_() for x in (case.q, case.k, case.v))
    table_dtype = torch.promote_types(dtype, torch.float32)
    position, time = (
        None if x is None else x.to(table_dtype).requires_grad_() for x in (case.position_bias, case.time_bias)
    )
    inputs = [x for x in (q, k, v, position, time) if x is not None]
    with force_backend(backend):
        out = hstu_attention(
            q,
            k,
            v,
            case.offsets,
            max_length=MAX_LENGTH,
            divisor=case.divisor,
            alpha=case.alpha,
            mask=case.mask,
            position_bias=position,
            time_bias=time,
            time_buckets=case.buckets,
        )
        grads = torch.autograd.grad(out, inputs, case.grad.to(dtype), allow_unused=True, materialize_grads=True)
        return [out.detach(), *grads]


def assert_case(case: Case, dtype: torch.dtype, backend: Backend) -> None:
    reference = run(case, torch.float64, backend)
    for name, actual, expected in zip(NAMES, run(case, dtype, backend), reference, strict=False):
        assert_near(actual, expected, dtype, name)


@pytest.fixture
def bfloat16_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forces the tiles of bfloat16, also on CPUs where the faster float32 tiles are the default."""
    if not bfloat16_products():
        pytest.skip("this CPU has no bfloat16 products")
    monkeypatch.setattr(native_path, "native_dtype", lambda dtype: dtype)


def test_reference_is_the_formula_written_out() -> None:
    case = make_case([3, 2], (1, 4, 4), torch.float64)
    q, k, v = (x[:, 0] for x in (case.q, case.k, case.v))
    assert case.position_bias is not None and case.time_bias is not None and case.buckets is not None
    expected = torch.zeros_like(v)
    for b, (first, length) in enumerate([(0, 3), (3, 2)]):
        for i in range(length):
            for j in range(i + 1):
                bucket = case.buckets.ids_P[int(case.buckets.pair_offsets_B1[b]) + i * (i + 1) // 2 + j]
                bias = case.position_bias[MAX_LENGTH - 1 + j - i] + case.time_bias[int(bucket)]
                weight = F.silu(q[first + i] @ k[first + j] + bias) / 211
                expected[first + i] += weight * v[first + j]
    assert_near(run(case, torch.float64, "torch")[0][:, 0], expected, torch.float64, "out")


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_path_matches_reference(backend: Backend, widths: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert_case(make_case(LENGTHS, widths, dtype), dtype, backend)


@pytest.mark.parametrize("widths", [(1, 50, 50), (2, 25, 16), (1, 16, 64)], ids=str)
@pytest.mark.usefixtures("bfloat16_kernel")
def test_bfloat16_kernel_matches_reference(widths: tuple[int, int, int]) -> None:
    assert_case(make_case(LENGTHS, widths, torch.bfloat16), torch.bfloat16, "native")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_thousand_tokens(backend: Backend, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "MAX_LENGTH", 1000)
    assert_case(make_case([1000, 200, 0, 1], (1, 32, 32), dtype), dtype, backend)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("per_row", [False, True], ids=["divisor", "divisor_T"])
def test_divisors_and_biases(backend: Backend, biased: bool, per_row: bool) -> None:
    assert_case(make_case(LENGTHS, (2, 25, 25), torch.float32, biased=biased, per_row=per_row), torch.float32, backend)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_alpha_scales_the_products_and_not_the_bias(backend: Backend, biased: bool) -> None:
    case = replace(make_case(LENGTHS, (2, 25, 16), torch.float32, biased=biased), alpha=0.3)
    assert_case(case, torch.float32, backend)
    scaled = run(replace(case, alpha=1.0, q=case.q * 0.3), torch.float64, backend)
    assert_near(run(case, torch.float64, backend)[0], scaled[0], torch.float64, "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_known_output_is_returned_with_its_gradients(backend: Backend, dtype: torch.dtype) -> None:
    case = make_case([70, 5], (2, 16, 16), dtype, biased=False)
    values = [x.to(dtype).requires_grad_() for x in (case.q, case.k, case.v)]
    with force_backend(backend):
        first = hstu_attention(*values, case.offsets, max_length=MAX_LENGTH, divisor=211.0)
        marked = first.detach() + 1
        again = hstu_attention(*values, case.offsets, max_length=MAX_LENGTH, divisor=211.0, output=marked)
        assert torch.equal(again, marked)
        expected_gradients, actual_gradients = (
            torch.autograd.grad(out, values, case.grad.to(dtype)) for out in (first, again)
        )
    assert all(torch.equal(x, y) for x, y in zip(expected_gradients, actual_gradients, strict=True))


@pytest.mark.parametrize("removed", ["position_bias", "time_bias"])
def test_one_bias_alone(backend: Backend, removed: str) -> None:
    case = make_case([70, 5], (1, 16, 16), torch.float32)
    if removed == "position_bias":
        case = replace(case, position_bias=None)
    else:
        case = replace(case, time_bias=None, buckets=None)
    reference, actual = run(case, torch.float64, backend), run(case, torch.float32, backend)
    for expected, value in zip(reference, actual, strict=True):
        assert_near(value, expected, torch.float32, f"without {removed}")


@pytest.mark.parametrize("lengths", [[], [0, 0], [1], [0, 200]], ids=str)
def test_few_tokens(backend: Backend, lengths: list[int]) -> None:
    assert_case(make_case(lengths, (1, 16, 16), torch.float32), torch.float32, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.usefixtures("bfloat16_kernel")
def test_views_of_a_poisoned_buffer(backend: Backend, dtype: torch.dtype) -> None:
    """q, k and v are strided views; NaN fills everything around them, and the gradient is not contiguous either."""
    case = make_case(LENGTHS, (2, 25, 50), dtype)

    def in_poison(x: Tensor) -> Tensor:
        tokens, heads, width = x.shape
        buffer = torch.full((tokens + 4, heads + 2, width + 7), float("nan"), dtype=x.dtype)
        view = buffer[2:-2, 1:-1, 3:-4]
        view.copy_(x)
        return view

    q, k, v = (in_poison(x.to(dtype)).requires_grad_() for x in (case.q, case.k, case.v))
    grad = in_poison(case.grad.to(dtype))
    assert case.position_bias is not None and case.time_bias is not None
    position, time = (x.float().requires_grad_() for x in (case.position_bias, case.time_bias))
    with force_backend(backend):
        out = hstu_attention(
            q,
            k,
            v,
            case.offsets,
            max_length=MAX_LENGTH,
            divisor=211.0,
            position_bias=position,
            time_bias=time,
            time_buckets=case.buckets,
        )
        actual = [out, *torch.autograd.grad(out, [q, k, v, position, time], grad)]
        for value, expected in zip(actual, run(case, dtype, backend), strict=True):
            assert torch.equal(value, expected)


def test_transposed_inputs_and_expanded_gradient(backend: Backend) -> None:
    case = make_case([65, 3], (2, 16, 16), torch.float32, biased=False)
    q, k, v = (
        x.float().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_() for x in (case.q, case.k, case.v)
    )
    with force_backend(backend):
        out = hstu_attention(q, k, v, case.offsets, max_length=MAX_LENGTH, divisor=211.0)
        actual = torch.autograd.grad(out.sum(), [q, k, v])
    expected = run(replace(case, grad=torch.ones_like(case.grad)), torch.float64, backend)[1:]
    for value, reference in zip(actual, expected, strict=True):
        assert_near(value, reference, torch.float32, "gradient")


def test_same_bits_every_time_and_on_two_threads(backend: Backend) -> None:
    case = make_case(LENGTHS * 2, (2, 25, 25), torch.float32)
    torch.set_num_threads(1)
    first, again = run(case, torch.float32, backend), run(case, torch.float32, backend)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    if backend == "native":
        torch.set_num_threads(2)
        assert all(torch.equal(x, y) for x, y in zip(first, run(case, torch.float32, backend), strict=True))


def test_an_example_does_not_depend_on_its_batch(backend: Backend) -> None:
    """The output and gradients of a sequence are equal bit for bit, since the same tiles are computed."""
    case = make_case([130, 200, 63], (1, 50, 50), torch.float32, biased=False)
    whole = run(case, torch.float32, backend)
    alone = replace(
        case, **{x: getattr(case, x)[130:330] for x in ("q", "k", "v", "grad")}, offsets=torch.tensor([0, 200])
    )
    for batched, single in zip(whole, run(alone, torch.float32, backend), strict=True):
        assert torch.equal(batched[130:330], single) or backend == "torch"
        assert_near(batched[130:330], single.double(), torch.float32, "alone")


def test_nan_in_an_input_is_not_hidden(backend: Backend) -> None:
    case = make_case([10, 10], (1, 16, 16), torch.float32, biased=False)
    case.k[3] = float("nan")
    out = run(case, torch.float32, backend)[0]
    assert not out[:3].isnan().any() and out[3:10].isnan().all() and not out[10:].isnan().any()


def test_double_runs_the_definition(backend: Backend) -> None:
    case = make_case([5, 9], (1, 8, 8), torch.float64, biased=False)
    call = AttentionCall(case.offsets, MAX_LENGTH, torch.tensor([1 / 211], dtype=torch.float64))
    direct = hstu_attention_reference(Operands(case.q, case.k, case.v), call)
    assert torch.equal(run(case, torch.float64, backend)[0], direct)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_THQ": torch.zeros(5, 1, 3)}, r"k_THQ .* \[5, 1, 4\].*\[5, 1, 3\]"),
        ({"v_THV": torch.zeros(4, 1, 4)}, "v_THV"),
        ({"q_THQ": torch.zeros(5, 1, 4, dtype=torch.int64)}, "q_THQ must be one of"),
        ({"q_THQ": torch.zeros(5, 1, 4).double()}, "differ in dtype"),
        ({"offsets_B1": torch.tensor([0, 5], device="meta")}, "offsets_B1 is on meta, q_THQ on cpu"),
        ({"divisor": torch.ones(5, device="meta")}, "divisor is on meta"),
        ({"position_bias": torch.zeros(9, device="meta")}, "position_bias is on meta"),
        ({"offsets_B1": torch.tensor([0, 4])}, "end at T = 5"),
        ({"offsets_B1": torch.tensor([0, 6, 5])}, "decrease"),
        ({"offsets_B1": torch.tensor([0, 5], dtype=torch.int32)}, "int64"),
        ({"max_length": 4}, "max_length = 4, but a sequence has 5"),
        ({"divisor": 0.0}, "divisor must be positive"),
        ({"divisor": torch.ones(4)}, "divisor must be a number or"),
        ({"divisor": torch.tensor([1.0, 1, 0, 1, 1])}, "divisor must be positive"),
        ({"position_bias": torch.zeros(8)}, "position_bias"),
        ({"time_bias": torch.zeros(129)}, "together"),
        ({"output": torch.zeros(5, 1, 4).double()}, "output must be torch.float32"),
        ({"output": torch.zeros(5, 4)}, r"output must be .* \[5, 1, 4\], not .* \[5, 4\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_wrong_arguments(change: dict, message: str) -> None:
    good: dict[str, Any] = {name: torch.zeros(5, 1, 4) for name in ("q_THQ", "k_THQ", "v_THV")}
    good |= {"offsets_B1": torch.tensor([0, 5]), "max_length": 5, "divisor": 1.0}
    with pytest.raises(ValueError, match=message):
        hstu_attention(**(good | change))


def test_buckets_of_another_batch() -> None:
    buckets = random_buckets(torch.tensor([0, 2, 5]))
    x = torch.zeros(5, 1, 4)
    with pytest.raises(ValueError, match="other lengths"):
        hstu_attention(
            x,
            x,
            x,
            torch.tensor([0, 3, 5]),
            max_length=5,
            divisor=1.0,
            time_bias=torch.zeros(NUM_BUCKETS + 1),
            time_buckets=buckets,
        )


@pytest.mark.gpu
def test_cuda_tensors_take_the_torch_path() -> None:
    """Forward only, without the tolerance of TF32: the definition on CPU in float64 is the judge."""
    torch.manual_seed(0)
    offsets = offsets_of(LENGTHS)
    tokens, bias = int(offsets[-1]), torch.randn(2 * MAX_LENGTH - 1)
    q, k, v = (torch.randn(tokens, 2, 32) for _ in range(3))
    out = hstu_attention(
        *(x.cuda() for x in (q, k, v, offsets)), max_length=MAX_LENGTH, divisor=211.0, position_bias=bias.cuda()
    )
    exact = hstu_attention(
        *(x.double() for x in (q, k, v)), offsets, max_length=MAX_LENGTH, divisor=211.0, position_bias=bias.double()
    )
    assert_near(out.cpu(), exact, torch.float32, "out")
