"""norm_mul_dropout_linear: every path and every gradient against the definition in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gr.ops.backend import Backend, force_backend
from gr.ops.norm_linear import norm_linear
from gr.ops.norm_mul_dropout import norm_mul_dropout_linear
from gr.ops.norm_mul_dropout.reference import (
    Gate,
    keep_mask,
    norm_mul_dropout_linear_reference,
    norm_mul_dropout_reference,
)
from tests.support.operators import draw, gradients
from tests.support.tolerances import assert_near, relative_error

GATE = Gate(groups=1, eps=1e-6, silu=False, concat=False, dropout=0.0)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def gate_case(gate: Gate, tokens: int, width: int, affine: bool, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """u, a, weight, bias and the affine map of the norm in float64, and the gradient of the output."""
    columns = width * (3 if gate.concat else 1)
    inputs = [draw(tokens, width, dtype=dtype), draw(tokens, width, dtype=dtype) + 1]
    inputs += [draw(columns, 7, dtype=dtype) / columns**0.5, draw(7, dtype=dtype)]
    inputs += [draw(width, dtype=torch.float32) for _ in range(2)] if affine else []
    return inputs, draw(tokens, 7, dtype=dtype)


def run_gate(gate: Gate, inputs: list[Tensor], grad: Tensor, dtype: torch.dtype, backend: Backend) -> list[Tensor]:
    values = [x.to(dtype if index < 4 else torch.float32).requires_grad_() for index, x in enumerate(inputs)]
    u, a, weight, bias, *affine = values
    with force_backend(backend):
        torch.manual_seed(gate.seed)
        out = norm_mul_dropout_linear(
            u,
            a,
            weight,
            bias_D=bias,
            norm_weight_U=affine[0] if affine else None,
            norm_bias_U=affine[1] if affine else None,
            groups=gate.groups,
            eps=gate.eps,
            silu=gate.silu,
            concat=gate.concat,
            dropout=gate.dropout,
        )
        return gradients(out, values, grad)


def assert_gate(gate: Gate, tokens: int, width: int, affine: bool, dtype: torch.dtype, backend: Backend) -> None:
    inputs, grad = gate_case(gate, tokens, width, affine, dtype)
    torch.manual_seed(gate.seed)
    exact = [x.requires_grad_() for x in inputs]
    reference = norm_mul_dropout_linear_reference(*exact[:4], *(exact[4:] or (None, None)), gate.seeded())
    names = ("out", "du", "da", "dweight", "dbias", "dnorm_weight", "dnorm_bias")
    actual = run_gate(gate, inputs, grad, dtype, backend)
    for name, value, expected in zip(names, actual, gradients(reference, exact, grad), strict=False):
        assert_near(value, expected, dtype, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("concat", [False, True], ids=["", "concat"])
@pytest.mark.parametrize("silu", [False, True], ids=["", "silu"])
@pytest.mark.parametrize("groups", [1, 3])
def test_gate_matches_definition(backend: Backend, groups: int, silu: bool, concat: bool, dtype: torch.dtype) -> None:
    gate = replace(GATE, groups=groups, silu=silu, concat=concat, dropout=0.3, seed=5)
    assert_gate(gate, 9 if backend == "triton" else 70, 48, groups == 1, dtype, backend)
    assert_gate(replace(gate, dropout=0.0), 5, 27, groups == 3, dtype, backend)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(backend: Backend, tokens: int) -> None:
    assert_gate(replace(GATE, concat=True, dropout=0.5), tokens, 50, True, torch.float32, backend)


@pytest.mark.parametrize("tokens", [63, 64, 65, 1000])
def test_tokens_of_one_task_and_of_many(backend: Backend, tokens: int) -> None:
    assert_gate(replace(GATE, concat=True, dropout=0.5), tokens, 50, True, torch.float32, backend)


@pytest.mark.parametrize("concat", [False, True], ids=["", "concat"])
@pytest.mark.parametrize("width", [1, 3, 4, 7, 12, 17])
def test_rows_narrower_than_a_vector(backend: Backend, width: int, concat: bool) -> None:
    """Rows are written in whole vectors, which must not reach beyond the tensor: that would damage the heap.

    The norm of so few elements loses digits on every path.
    """
    gate = replace(GATE, concat=concat, dropout=0.5)
    for tokens in (1, 2, 5, 65):
        inputs, grad = gate_case(gate, tokens, width, True, torch.float32)
        expected = run_gate(gate, [x.detach() for x in inputs], grad, torch.float64, "torch")
        for value, exact in zip(run_gate(gate, inputs, grad, torch.float32, backend), expected, strict=True):
            assert relative_error(value, exact) < 1e-5


def test_gate_is_the_formula_written_out() -> None:
    u, a, weight, bias = torch.randn(2, 4), torch.randn(2, 4), torch.randn(4), torch.randn(4)
    y = norm_mul_dropout_reference(u, a, weight, bias, replace(GATE, groups=2, silu=True, concat=True))
    for t in range(2):
        for c in range(4):
            part = a[t, c // 2 * 2 : c // 2 * 2 + 2]
            normed = (a[t, c] - part.mean()) / (part.var(unbiased=False) + 1e-6).sqrt() * weight[c] + bias[c]
            gate = u[t, c] * torch.sigmoid(u[t, c])
            assert torch.allclose(y[t, [c, 4 + c, 8 + c]], torch.stack([gate, a[t, c], gate * normed]), atol=1e-6)


def test_mask_has_the_rate_of_the_dropout_and_depends_on_the_seed() -> None:
    gate = replace(GATE, dropout=0.3, seed=1)
    mask = keep_mask(gate, 2000, 500, torch.device("cpu"))
    deviation = (0.3 * 0.7 / mask.numel()) ** 0.5
    assert abs(1 - mask.double().mean() - 0.3) < 4 * deviation
    for means, count in ((mask.double().mean(0), 2000), (mask.double().mean(1), 500)):
        assert ((means - 0.7).abs() < 5 * (0.21 / count) ** 0.5).all()
    other = keep_mask(replace(gate, seed=2), 2000, 500, torch.device("cpu"))
    for pair in ((mask, other), (mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])):
        assert abs((pair[0] & pair[1]).double().mean() - 0.49) < 0.003


def test_paths_draw_the_same_mask(backend: Backend) -> None:
    """The columns of u, all ones, are zero exactly where the mask drops them."""
    u, a = torch.ones(20, 40), torch.rand(20, 40)
    gate = replace(GATE, concat=True, dropout=0.25)
    with force_backend(backend):
        torch.manual_seed(3)
        out = norm_mul_dropout_linear(u, a, torch.eye(120), eps=1e-6, concat=True, dropout=0.25)
    torch.manual_seed(3)
    assert torch.equal(out[:, :40] != 0, keep_mask(gate.seeded(), 20, 120, u.device)[:, :40])


def test_rows_of_a_wider_buffer_and_expanded_gradient(backend: Backend) -> None:
    buffer = torch.full((9, 100), float("nan"))
    buffer[:, 10:42] = torch.randn(9, 32)
    a, weight = torch.randn(32, 9).T, torch.randn(5, 32).T
    inputs = [buffer[:, 10:42].requires_grad_(), a.requires_grad_(), weight.requires_grad_()]
    with force_backend(backend):
        actual = torch.autograd.grad(norm_mul_dropout_linear(*inputs, eps=1e-6).sum(), inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(norm_mul_dropout_linear_reference(*exact, None, None, None, GATE).sum(), exact)
    for value, reference in zip(actual, expected, strict=True):
        assert_near(value, reference, torch.float32, "gradient")


def test_same_bits_every_time_and_on_two_threads(backend: Backend) -> None:
    gate = replace(GATE, concat=True, dropout=0.3, silu=True)
    inputs, grad = gate_case(gate, 20 if backend == "triton" else 700, 32, True, torch.float32)
    torch.set_num_threads(1)
    first, again = (run_gate(gate, inputs, grad, torch.float32, backend) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    if backend == "native":
        torch.set_num_threads(2)
        other = run_gate(gate, inputs, grad, torch.float32, backend)
        # The matrix products of weights are MKL's, whose sums depend on the threads.
        assert all(torch.equal(first[i], other[i]) for i in (0, 1, 2, 5, 6))


def test_autocast_projects_in_its_dtype(backend: Backend) -> None:
    """Weights stay in float32, with gradients in float32; products are in bfloat16."""
    x, uvqk, weight = (torch.randn(*shape, requires_grad=True) for shape in ((20, 16), (16, 32), (16, 16)))
    with force_backend(backend), torch.autocast("cpu", torch.bfloat16):
        u, a = norm_linear(x, uvqk, eps=1e-6, silu=True, splits=[16, 16])
        out = norm_mul_dropout_linear(u, a, weight, eps=1e-6)
    assert out.dtype == torch.bfloat16
    actual = torch.autograd.grad(out.float().sum(), [x, uvqk, weight])
    exact = [t.detach().double().requires_grad_() for t in (x, uvqk, weight)]
    u, a = F.silu(F.layer_norm(exact[0], (16,), eps=1e-6) @ exact[1]).split(16, dim=1)
    expected = torch.autograd.grad((u * F.layer_norm(a, (16,), eps=1e-6) @ exact[2]).sum(), exact)
    for value, reference in zip(actual, expected, strict=True):
        assert value.dtype == torch.float32
        assert (value.double() - reference).norm() < 0.02 * reference.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u_TU": torch.zeros(3)}, "u_TU must have 2 dimensions"),
        ({"u_TU": torch.zeros(3, 4, dtype=torch.int64)}, "u_TU .* it is torch.int64"),
        ({"a_TU": torch.zeros(3, 5)}, r"a_TU must be \[3, 4\], not \[3, 5\]"),
        ({"a_TU": torch.zeros(3, 4).double()}, "u_TU and a_TU differ in dtype"),
        ({"weight_YD": torch.zeros(5, 2)}, r"weight_YD must be \[4, any\], not \[5, 2\]"),
        ({"concat": True}, r"weight_YD must be \[12, any\], not \[4, 2\]"),
        ({"bias_D": torch.zeros(3)}, r"bias_D must be \[2\], not \[3\]"),
        ({"norm_weight_U": torch.zeros(4)}, "given together"),
        ({"norm_weight_U": torch.zeros(4).long()}, "norm_weight_U must be of a float dtype"),
        ({"groups": 3}, "groups must divide U = 4"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), not 1.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_wrong_arguments_of_the_gate(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"u_TU": torch.zeros(3, 4), "a_TU": torch.zeros(3, 4), "weight_YD": torch.zeros(4, 2)}
    with pytest.raises(ValueError, match=message):
        norm_mul_dropout_linear(**(good | {"eps": 1e-6} | change))
