"""Sampled logits: every path and both gradients against the gathered definition in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from gr.ops.backend import Backend, force_backend
from gr.ops.sampled_logits import chunked, sampled_logits
from gr.ops.sampled_logits.reference import sampled_logits_reference
from gr.ops.sampled_logits.softmax import sampled_softmax
from tests.support.tolerances import assert_near

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(
    queries: Tensor, items: Tensor, index: Tensor, grad: Tensor, dtype: torch.dtype, backend: Backend
) -> list[Tensor]:
    queries, items = (x.to(dtype).requires_grad_() for x in (queries, items))
    with force_backend(backend):
        out = sampled_logits(queries, items, index)
        return [out.detach(), *torch.autograd.grad(out, [queries, items], grad.to(dtype))]


def assert_path(shape: tuple[int, int, int, int], dtype: torch.dtype, backend: Backend) -> None:
    """shape: tokens, samples, items, width. The logits and both gradients against the definition."""
    tokens, samples, items, width = shape
    queries, table = (torch.randn(rows, width).to(dtype).double() for rows in (tokens, items))
    index = torch.randint(0, items, (tokens, samples))
    grad = torch.randn(tokens, samples).to(dtype).double()
    reference = run(queries, table, index, grad, torch.float64, backend)
    actual = run(queries, table, index, grad, dtype, backend)
    for name, value, expected in zip(("logits", "dqueries", "ditems"), actual, reference, strict=True):
        assert_near(value, expected, dtype, name)


@pytest.mark.parametrize("shape", [(40, 33, 40, 50), (20, 9, 100, 16), (9, 1, 3, 128), (7, 130, 5, 300), (5, 3, 4, 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_path_matches_reference(backend: Backend, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    assert_path(shape, dtype, backend)


@pytest.mark.parametrize("shape", [(0, 4, 5, 8), (6, 0, 5, 8)], ids=["no tokens", "no samples"])
def test_empty(backend: Backend, shape: tuple[int, int, int, int]) -> None:
    assert_path(shape, torch.float32, backend)


@pytest.mark.parametrize(
    "shape",
    [
        (300, 33, 77, 50),  # a small table: in one pass over the pairs, or one block of items
        (70, 9, 5000, 16),  # several blocks of items; gathered without the C++ operators
        (40, 128, 300, 25),
        (33, 17, 40, 100),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_ways_to_sum_the_gradient_of_items(
    backend: Backend, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    assert_path(shape, dtype, backend)


@pytest.mark.parametrize("multiplies_all", [True, False])
def test_both_chunked_ways_over_many_chunks(monkeypatch: pytest.MonkeyPatch, multiplies_all: bool) -> None:
    monkeypatch.setattr(chunked, "_CHUNK_ELEMENTS", 500)
    monkeypatch.setattr(chunked, "_multiplies_all", lambda items, index: multiplies_all)
    queries, table = torch.randn(37, 12).double(), torch.randn(90, 12).double()
    index, grad = torch.randint(0, 90, (37, 11)), torch.randn(37, 11).double()
    reference = run(queries, table, index, grad, torch.float64, "torch")
    for actual, expected in zip(run(queries, table, index, grad, torch.float32, "torch"), reference, strict=True):
        assert_near(actual, expected, torch.float32, "chunked")


def test_reference_is_the_formula_written_out() -> None:
    queries, items, index = torch.randn(3, 2), torch.randn(4, 2), torch.tensor([[0, 3], [1, 1], [2, 0]])
    logits = sampled_logits_reference(queries, items, index)
    for t in range(3):
        for s in range(2):
            assert torch.isclose(logits[t, s], queries[t] @ items[index[t, s]])


def test_views_repeated_indices_and_expanded_gradient(backend: Backend) -> None:
    buffer = torch.full((64, 3, 60), float("nan"))
    buffer[:, 1, 5:55] = torch.randn(64, 50)
    queries = buffer[:, 1, 5:55].requires_grad_()
    items = torch.randn(50, 20).T.requires_grad_()
    index = torch.full((4, 64), 7).T
    with force_backend(backend):
        out = sampled_logits(queries, items, index)
        dqueries, ditems = torch.autograd.grad(out.sum(), [queries, items])
    assert_near(dqueries, 4 * items[7].detach().double().expand(64, 50), torch.float32, "dqueries")
    expected = torch.zeros(20, 50).double()
    expected[7] = 4 * queries.detach().double().sum(0)
    assert_near(ditems, expected, torch.float32, "ditems")


@pytest.mark.parametrize("items", [40, 9000], ids=["one block", "many blocks"])
def test_same_bits_every_time_and_on_two_threads(backend: Backend, items: int) -> None:
    tokens, items = (30, 40) if backend == "triton" else (500, items)
    queries, table = torch.randn(tokens, 50), torch.randn(items, 50)
    index, grad = torch.randint(0, items, (tokens, 20)), torch.randn(tokens, 20)
    torch.set_num_threads(1)
    first, again = (run(queries, table, index, grad, torch.float32, backend) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    if backend == "native":
        torch.set_num_threads(2)
        other = run(queries, table, index, grad, torch.float32, backend)
        assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize("wrong", [-1, 5])
def test_index_out_of_range(backend: Backend, wrong: int) -> None:
    index = torch.tensor([[0, 4], [wrong, 2]])
    with force_backend(backend), pytest.raises((IndexError, RuntimeError), match=r"index|range|bounds"):
        sampled_logits(torch.zeros(2, 3), torch.zeros(5, 3), index)


def test_wrong_arguments() -> None:
    queries, items, index = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"items_KD must be \[K, D\] with D = 3, not \[5, 4\]"):
        sampled_logits(queries, torch.zeros(5, 4), index)
    with pytest.raises(ValueError, match="share a dtype"):
        sampled_logits(queries, items.double(), index)
    with pytest.raises(ValueError, match="index_TS must be int64"):
        sampled_logits(queries, items, index.int())
    with pytest.raises(ValueError, match="queries_TD"):
        sampled_logits(queries[0], items, index)


def softmax_run(
    queries: Tensor, items: Tensor, positive: Tensor, negative: Tensor, dtype: torch.dtype, backend: Backend
) -> list[Tensor]:
    queries, items = (x.to(dtype).requires_grad_() for x in (queries, items))
    with force_backend(backend):
        losses = sampled_softmax(queries, items, positive, negative, scale=20.0)
        grad = torch.arange(1.0, len(losses) + 1, dtype=losses.dtype)
        return [losses.detach(), *torch.autograd.grad(losses, [queries, items], grad)]


@pytest.mark.parametrize("shape", [(40, 33, 12, 50), (20, 9, 100, 16), (9, 1, 3, 128), (7, 130, 5, 300), (4, 0, 3, 8)])
def test_softmax_against_cross_entropy_without_the_hits(backend: Backend, shape: tuple[int, int, int, int]) -> None:
    tokens, samples, items, width = shape
    queries = normalize(torch.randn(tokens, width)).double().requires_grad_()
    table = normalize(torch.randn(items, width)).double().requires_grad_()
    positive, negative = torch.randint(0, items, (tokens,)), torch.randint(0, items, (tokens, samples))
    losses = []
    for query, target, drawn in zip(queries, positive, negative, strict=True):
        counted = torch.cat([target[None], drawn[drawn != target]])
        losses.append(-(20.0 * table[counted] @ query).log_softmax(0)[0])
    expected = torch.stack(losses)
    wanted = torch.autograd.grad(expected, [queries, table], torch.arange(1.0, tokens + 1).double())
    actual = softmax_run(queries.detach(), table.detach(), positive, negative, torch.float32, backend)
    for name, value, exact in zip(("loss", "dqueries", "ditems"), actual, (expected.detach(), *wanted), strict=True):
        assert torch.allclose(value.double(), exact, rtol=1e-5, atol=2e-5 * float(exact.abs().max())), name


def test_softmax_has_the_same_bits_on_two_threads_and_shows_nan() -> None:
    queries, table = torch.randn(500, 50), torch.randn(9000, 50)
    positive, negative = torch.randint(0, 9000, (500,)), torch.randint(0, 9000, (500, 20))
    torch.set_num_threads(1)
    first = softmax_run(queries, table, positive, negative, torch.float32, "native")
    torch.set_num_threads(2)
    assert all(map(torch.equal, first, softmax_run(queries, table, positive, negative, torch.float32, "native")))
    table = table.detach().index_fill(0, negative[3, 4], float("nan"))
    assert softmax_run(queries, table, positive, negative, torch.float32, "native")[0][3].isnan()
    with pytest.raises(IndexError, match="index_TS must lie in"):
        softmax_run(queries, table, positive, negative - 9000, torch.float32, "native")
