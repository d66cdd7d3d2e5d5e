"""Lookups of bags with the update of their rows: the C++ against the definition, and the definition by hand."""

import pytest
import torch
from torch import Tensor

from gr.ops.backend import Backend, force_backend
from gr.ops.pooled_lookup import BagUpdate, pooled_lookup
from gr.ops.row_update import reference
from gr.ops.row_update.reference import RowRule

# Table 1 is read by two features, and table 2 by none in between; widths are no powers of two.
SIZES, TABLES, B = [(30, 20), (3000, 7), (1, 4)], [0, 1, 2, 1], 9
RULES: list[tuple[RowRule, dict, dict]] = [
    (reference.sgd, {}, {}),
    (reference.rowwise_adagrad, {"eps": 1e-8}, {"sum": 1}),
    (reference.adagrad, {"eps": 1e-8}, {"sum": 2}),
]


def bags(random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids and offsets: of 0 to 5 ids a bag, and none for all bags of one feature."""
    lengths = torch.randint(0, 6, (len(TABLES), B), generator=random)
    lengths[2, ::2] = 0
    lengths[3, :] *= torch.randint(0, 2, (B,), generator=random)
    rows = [SIZES[table][0] for table in TABLES]
    ids = [torch.randint(0, E, (int(own.sum()),), generator=random) for E, own in zip(rows, lengths, strict=True)]
    return torch.cat(ids), torch.cat([torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)])


def trained(
    backend: Backend, rule: RowRule, numbers: dict, shapes: dict, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The outputs of 4 steps, and the tables and their states after them."""
    random = torch.Generator().manual_seed(1)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    weights = [torch.randn(*size, generator=random).to(dtype) for size in SIZES]
    states = [{name: torch.zeros(size[:dims], dtype=exact) for name, dims in shapes.items()} for size in SIZES]
    outputs = []
    for _ in range(4):
        ids, offsets = bags(random)
        with force_backend(backend):
            update = BagUpdate(rule, states, {"lr": 0.1, "steps": 0, **numbers})
            out = pooled_lookup(weights, TABLES, ids, offsets, update)
            (out * torch.randn(out.shape, generator=random)).sum().backward()
        outputs.append(out.detach())
    return outputs, weights, [state[name] for state in states for name in shapes]


@pytest.mark.parametrize(("rule", "numbers", "shapes"), RULES, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 4e-2)],
    ids=str,
)
def test_native_equals_the_definition(
    rule: RowRule, numbers: dict, shapes: dict, dtype: torch.dtype, tolerance: float
) -> None:
    native, plain = (trained(backend, rule, numbers, shapes, dtype) for backend in ("native", "torch"))
    for got, expected in zip(native, plain, strict=True):
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


def test_by_hand(backend: Backend) -> None:
    """Two features of one table; row 2 comes twice in a bag and once in another feature; empty bags are zero."""
    weight = torch.tensor([[1.0, 10], [2, 20], [4, 40]])
    ids, offsets = torch.tensor([2, 2, 0, 2]), torch.tensor([0, 3, 3, 3, 4])
    with force_backend(backend):
        out = pooled_lookup([weight], [0, 0], ids, offsets, BagUpdate(reference.sgd, [{}], {"lr": 1.0, "steps": 1}))
        assert out.tolist() == [[9, 90, 0, 0], [0, 0, 4, 40]]
        (out * torch.tensor([[1.0, 1, 5, 5], [7, 7, 3, 3]])).sum().backward()
    assert weight.tolist() == [[0, 9], [2, 20], [-1, 35]]


def test_without_gradients_or_an_update_tables_stay(backend: Backend) -> None:
    weight, ids, offsets = torch.ones(3, 4), torch.tensor([1]), torch.tensor([0, 1])
    update = BagUpdate(reference.sgd, [{}], {"lr": 1.0, "steps": 1})
    with force_backend(backend):
        assert not pooled_lookup([weight], [0], ids, offsets).requires_grad
        with torch.no_grad():
            assert not pooled_lookup([weight], [0], ids, offsets, update).requires_grad
        assert pooled_lookup([weight], [0], ids[:0], torch.tensor([0]), update).shape == (0, 4)
    assert (weight == 1).all()


def test_rows_and_examples_next_to_numbers_that_are_none(backend: Backend) -> None:
    """Rows of NaN that are not looked up reach nothing; a gradient of NaN reaches the rows of its bag alone."""
    weight = torch.full((6, 5), torch.nan)
    weight[1::2] = 1.0
    ids, offsets = torch.tensor([1, 3, 5]), torch.tensor([0, 2, 2, 3])
    with force_backend(backend):
        out = pooled_lookup([weight], [0], ids, offsets, BagUpdate(reference.sgd, [{}], {"lr": 1.0, "steps": 1}))
        assert out[:, 0].tolist() == [2, 0, 1]
        out.backward(torch.tensor([1.0, torch.nan, 2.0])[:, None].expand(3, 5))
    assert weight[1::2, 0].tolist() == [0, 0, -1]


def test_any_number_of_threads_gives_the_same_bits() -> None:
    outcomes, threads = [], torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            outcomes.append(trained("native", *RULES[1], torch.float32))
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*outcomes, strict=True):
        assert all(map(torch.equal, one, three))


def test_what_is_refused() -> None:
    weight, ids, offsets = torch.zeros(4, 3), torch.tensor([1, 4]), torch.tensor([0, 2])
    with force_backend("native"):
        with pytest.raises(IndexError, match=r"\[0, 4\).*found 4"):
            pooled_lookup([weight], [0], ids, offsets)
        with pytest.raises(IndexError, match=r"found -1"):
            pooled_lookup([weight], [0], torch.tensor([3, -1]), offsets)
        with pytest.raises(ValueError, match=r"offsets_FB must lie in \[0, 2\]"):
            pooled_lookup([weight], [0], ids, torch.tensor([0, 3]))
        with pytest.raises(ValueError, match="offsets_FB must not fall"):
            pooled_lookup([weight], [0], ids, torch.tensor([0, 2, 1, 2]))
        with pytest.raises(ValueError, match="no lookup in a table of"):
            pooled_lookup([weight.long()], [0], ids[:1], torch.tensor([0, 1]))
