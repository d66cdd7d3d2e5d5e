"""The Triton kernels of sampled logits against the gathered definition in float64."""

import pytest
import torch

from gr.ops.backend import force_backend
from gr.ops.sampled_logits import sampled_logits
from tests.ops.test_sampled_logits import run
from tests.support.tolerances import assert_near


@pytest.mark.parametrize(
    ("tokens", "samples", "items", "width"),
    [(30, 33, 40, 50), (20, 9, 100, 16), (9, 1, 3, 128), (7, 130, 5, 300), (5, 3, 4, 1), (0, 4, 5, 8), (6, 0, 5, 8)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernels_match_reference(tokens: int, samples: int, items: int, width: int, dtype: torch.dtype) -> None:
    queries, table = (torch.randn(rows, width).to(dtype).double() for rows in (tokens, items))
    index = torch.randint(0, items, (tokens, samples))
    grad = torch.randn(tokens, samples).to(dtype).double()
    reference = run(queries, table, index, grad, torch.float64, "torch")
    actual = run(queries, table, index, grad, dtype, "triton")
    for name, value, expected in zip(("logits", "dqueries", "ditems"), actual, reference, strict=True):
        assert_near(value, expected, dtype, name)
    again = run(queries, table, index, grad, dtype, "triton")
    assert all(torch.equal(x, y) for x, y in zip(actual, again, strict=True))


def test_views_repeated_indices_and_expanded_gradient() -> None:
    buffer = torch.full((64, 3, 60), float("nan"))
    buffer[:, 1, 5:55] = torch.randn(64, 50)
    queries = buffer[:, 1, 5:55].requires_grad_()
    items = torch.randn(50, 20).T.requires_grad_()
    index = torch.full((4, 64), 7).T
    with force_backend("triton"):
        out = sampled_logits(queries, items, index)
        dqueries, ditems = torch.autograd.grad(out.sum(), [queries, items])
    assert_near(dqueries, 4 * items[7].detach().double().expand(64, 50), torch.float32, "dqueries")
    expected = torch.zeros(20, 50).double()
    expected[7] = 4 * queries.detach().double().sum(0)
    assert_near(ditems, expected, torch.float32, "ditems")


@pytest.mark.parametrize("wrong", [-1, 5])
def test_index_out_of_range(wrong: int) -> None:
    index = torch.tensor([[0, 4], [wrong, 2]])
    with force_backend("triton"), pytest.raises(IndexError, match=r"index_TS must lie in \[0, 5\)"):
        sampled_logits(torch.zeros(2, 3), torch.zeros(5, 3), index)
