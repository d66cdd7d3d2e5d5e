"""Row updates: the C++ against the definition and the formulas in fp64, and what stochastic rounding promises."""

import pytest
import torch
from torch import Tensor

from gr.ops.backend import Backend, force_backend
from gr.ops.row_update import StochasticRounding, reference, row_update
from gr.ops.row_update.reference import RowRule

E, D = 50, 20
ADAM = {"eps": 1e-8, "beta1": 0.9, "beta2": 0.98}
# Each rule with its numbers, and the dimensions of its states.
RULES: list[tuple[RowRule, dict, dict]] = [
    (reference.sgd, {}, {}),
    (reference.rowwise_adagrad, {"eps": 1e-8}, {"sum": 1}),
    (reference.adagrad, {"eps": 1e-8}, {"sum": 2}),
    (reference.adam, ADAM, {"exp_avg": 2, "exp_avg_sq": 2}),
    (reference.rowwise_adamw, {**ADAM, "weight_decay": 0.1}, {"exp_avg": 2, "exp_avg_sq": 1}),
]
each_rule = pytest.mark.parametrize(
    ("rule", "numbers", "shapes"), RULES, ids=lambda value: getattr(value, "__name__", "")
)


def trained(
    backend: Backend, rule: RowRule, numbers: dict, shapes: dict, dtype: torch.dtype, count: int = 60
) -> dict[str, Tensor]:
    """Weight and states after 8 steps over ids below 40, most of them repeated."""
    random = torch.Generator().manual_seed(1)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.randn(E, D, generator=random).to(dtype)
    states = {name: torch.zeros((E, D)[:dims], dtype=exact) for name, dims in shapes.items()}
    for step in range(1, 9):
        ids = torch.randint(0, 40, (count,), generator=random)
        gradient = torch.randn(count, D, generator=random).to(exact)
        with force_backend(backend):
            row_update(rule, weight, states, ids, gradient, lr=0.01, steps=step, **numbers)
    return {"weight": weight, **states}


@each_rule
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 2e-3)])
def test_native_equals_the_definition(
    rule: RowRule, numbers: dict, shapes: dict, dtype: torch.dtype, tolerance: float
) -> None:
    native, plain = (trained(backend, rule, numbers, shapes, dtype) for backend in ("native", "torch"))
    for name in plain:
        torch.testing.assert_close(native[name], plain[name], atol=tolerance, rtol=tolerance)


def test_rowwise_adamw_is_its_formula(backend: Backend) -> None:
    """In fp64, number by number, on rows of which one comes three times and one comes only in the second step."""
    weight, exp_avg, exp_avg_sq = torch.randn(4, 3).double(), torch.zeros(4, 3).double(), torch.zeros(4).double()
    expected, mean, square = weight.tolist(), exp_avg.tolist(), exp_avg_sq.tolist()
    for step, ids in enumerate(([2, 0, 2, 2], [1, 2]), start=1):
        gradient = torch.randn(len(ids), 3).double()
        with force_backend(backend):
            row_update(
                reference.rowwise_adamw,
                weight,
                {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq},
                torch.tensor(ids),
                gradient,
                lr=0.1,
                steps=step,
                eps=1e-3,
                beta1=0.8,
                beta2=0.7,
                weight_decay=0.5,
            )
        for row in set(ids):
            g = [sum(float(gradient[i, d]) for i, each in enumerate(ids) if each == row) for d in range(3)]
            square[row] = 0.7 * square[row] + 0.3 * sum(each**2 for each in g) / 3
            for d in range(3):
                mean[row][d] = 0.8 * mean[row][d] + 0.2 * g[d]
                root = (square[row] / (1 - 0.7**step)) ** 0.5 + 1e-3
                expected[row][d] -= 0.1 * (mean[row][d] / (1 - 0.8**step) / root + 0.5 * expected[row][d])
    for got, want in ((weight, expected), (exp_avg, mean), (exp_avg_sq, square)):
        torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), atol=1e-12, rtol=0)


@each_rule
def test_rows_that_were_not_looked_up_stay(backend: Backend, rule: RowRule, numbers: dict, shapes: dict) -> None:
    start = torch.randn(E, D, generator=torch.Generator().manual_seed(1))
    after = trained(backend, rule, numbers, shapes, torch.float32)
    assert torch.equal(after["weight"][40:], start[40:]) and not torch.equal(after["weight"][:40], start[:40])
    assert all((after[name][40:] == 0).all() for name in shapes)
    none = trained(backend, rule, numbers, shapes, torch.float32, count=0)
    assert torch.equal(none["weight"], start)


@each_rule
def test_any_number_of_threads_gives_the_same_bits(rule: RowRule, numbers: dict, shapes: dict) -> None:
    outcomes, threads = [], torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            outcomes.append(trained("native", rule, numbers, shapes, torch.float32, count=2000))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(outcomes[0][name], outcomes[1][name]) for name in outcomes[0])


def test_the_order_of_the_ids_changes_no_bit(backend: Backend) -> None:
    """Ranks send ids in another order at another world size: gradients of one row are summed in float64."""
    ids, gradient = torch.randint(0, 40, (4000,)), torch.randn(4000, D)
    order = torch.randperm(4000)
    weights = [torch.zeros(E, D), torch.zeros(E, D)]
    with force_backend(backend):
        for weight, own in zip(weights, (slice(None), order), strict=True):
            row_update(reference.sgd, weight, {}, ids[own], gradient[own], lr=0.1, steps=1)
    assert torch.equal(*weights)


def numbers_of_every_size() -> Tensor:
    x = torch.randn(300, 64) * torch.logspace(-9, 2, 300)[:, None]
    x[0, :5] = torch.tensor([torch.inf, torch.nan, 0.0, 65519.0, -65519.0])
    return x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_stochastic_rounding_is_the_same_bits_in_every_shard(backend: Backend, dtype: torch.dtype) -> None:
    """Whole, and cut into rows and columns: the draw belongs to the row and column of the table."""
    x, whole = numbers_of_every_size(), torch.zeros(300, 64, dtype=dtype)
    cut = torch.zeros_like(whole)
    with force_backend(backend):
        row_update(
            reference.sgd, whole, {}, torch.arange(300), -x, StochasticRounding(-5, 9, 0, 0, 64), lr=1.0, steps=1
        )
        for row, column in ((0, 0), (100, 0), (0, 32), (100, 32)):
            rows, columns = slice(row, row + (200 if row else 100)), slice(column, column + 32)
            part, own = cut[rows, columns].contiguous(), x[rows, columns]
            draws = StochasticRounding(-5, 9, row, column, 64)
            row_update(reference.sgd, part, {}, torch.arange(len(part)), -own, draws, lr=1.0, steps=1)
            cut[rows, columns] = part
    assert torch.equal(whole.view(torch.int16), cut.view(torch.int16))
    # A neighbour, and not always the nearer one.
    finite = x.abs() < 60000
    below, above = (torch.nextafter(whole, torch.full_like(whole, end)).float() for end in (-torch.inf, torch.inf))
    assert ((below < x) & (x < above))[finite].all()
    assert (whole != x.to(dtype))[finite].any()
    assert torch.equal(whole, StochasticRounding(-5, 9, 0, 0, 64)(x, torch.arange(300), dtype)) or whole.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_stochastic_rounding_has_no_bias(dtype: torch.dtype) -> None:
    """The mean over 400 draws is within 4 standard errors, for numbers below the least normal fp16, too."""
    for size in (1.0, 1e-3, 2e-5, 3e-8):
        x = torch.full((1, 4096), size) * 1.037
        draws = [StochasticRounding(7, step, 0, 0, 4096)(x, torch.tensor([0]), dtype).double() for step in range(100)]
        rounded = torch.cat(draws).flatten()
        error = float(rounded.std()) / len(rounded) ** 0.5
        assert abs(float(rounded.mean()) - float(x[0, 0])) <= 4 * error, size


def test_small_steps_are_not_lost(backend: Backend) -> None:
    """100 steps of 1e-5 from 1.0 in fp16, where fp16's step is 5e-4: nearest rounding stays at 1."""
    weight, nearest, one = torch.ones(4, 1024).half(), torch.ones(4, 1024).half(), torch.ones(4, 1024)
    with force_backend(backend):
        for step in range(100):
            draws = StochasticRounding(3, step, 0, 0, 1024)
            row_update(reference.sgd, weight, {}, torch.arange(4), one, draws, lr=1e-5, steps=step + 1)
            row_update(reference.sgd, nearest, {}, torch.arange(4), one, lr=1e-5, steps=step + 1)
    values = weight.double().flatten()
    assert abs(float(values.mean()) - 0.999) < 3 * float(values.std()) / len(values) ** 0.5
    assert (nearest == 1).all()


def test_what_is_refused() -> None:
    weight, ids = torch.zeros(4, 3), torch.tensor([1, 2])
    with pytest.raises(ValueError, match=r"gradient_TD must be \[2, 3\]"):
        row_update(reference.sgd, weight, {}, ids, torch.zeros(3, 3), lr=1.0, steps=1)
    with pytest.raises(ValueError, match=r"gradient_TD must be torch\.float32"):
        row_update(reference.sgd, weight, {}, ids, torch.zeros(2, 3).double(), lr=1.0, steps=1)
    with force_backend("native"), pytest.raises(IndexError, match=r"\[0, 4\).*found 4"):
        row_update(reference.sgd, weight, {}, torch.tensor([0, 4]), torch.zeros(2, 3), lr=1.0, steps=1)
