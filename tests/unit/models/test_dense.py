"""Initial values of the dense part: what fills them, and what nothing fills."""

import pytest
import torch
from torch import nn

from gr.errors import TrainingError
from gr.models.dense import dense_parameters, initialise_dense


class Gain(nn.Module):
    """A parameter whose value is given in __init__ alone, as one would write RMSNorm by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class FilledGain(Gain):
    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)


class Table(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("angles", torch.arange(6).to(dtype), persistent=False)


def on_meta(*modules: type[nn.Module] | nn.Module) -> nn.Module:
    return nn.Sequential(*(module() if isinstance(module, type) else module for module in modules)).to_empty(
        device="cpu"
    )


def test_a_parameter_that_nothing_fills_is_named() -> None:
    with pytest.raises(TrainingError, match=r"^nothing fills 1.weight of Gain: .* fill it in the class's reset_param"):
        initialise_dense(on_meta(nn.Linear(2, 2), Gain), seed=1)
    model = on_meta(nn.Linear(2, 2), FilledGain)
    initialise_dense(model, seed=1)
    assert torch.equal(dense_parameters(model)["1.weight"].detach(), torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.uint8])
def test_a_buffer_that_nothing_fills_is_named(dtype: torch.dtype) -> None:
    with pytest.raises(TrainingError, match=r"^nothing fills 0.angles of Table"):
        initialise_dense(on_meta(Table(dtype)), seed=1)


def test_a_buffer_of_zeros_is_filled() -> None:
    class Zeros(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("flags", torch.zeros(3, dtype=torch.uint8))

        def reset_parameters(self) -> None:
            self.flags.zero_()

    model = on_meta(Zeros())
    initialise_dense(model, seed=1)
    assert model[0].flags.tolist() == [0, 0, 0]


def test_the_seed_alone_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    first, again, other = (nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5)) for _ in range(3))
    for model, seed in ((first, 7), (again, 7), (other, 8)):
        torch.rand(seed)
        initialise_dense(model, seed)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first[0].weight, other[0].weight)


def test_no_way_of_cutting_changes_a_draw() -> None:
    """Whole, and row by row through views: the same values, of the asked distribution."""

    class Rows(nn.Linear):
        def reset_parameters(self) -> None:
            for row in self.weight:
                nn.init.normal_(row, mean=1.0, std=0.5)

    class Whole(nn.Linear):
        def reset_parameters(self) -> None:
            nn.init.normal_(self.weight, mean=1.0, std=0.5)

    whole = nn.Sequential(Whole(400, 50, bias=False))
    initialise_dense(whole, seed=1)
    weight = whole[0].weight.detach()
    assert float(weight.mean()) == pytest.approx(1.0, abs=0.02) and float(weight.std()) == pytest.approx(0.5, rel=0.02)
    rows = nn.Sequential(Rows(400, 50, bias=False))
    initialise_dense(rows, seed=1)
    assert torch.equal(rows[0].weight[0], whole[0].weight[0]), "draw 0"
    assert not torch.equal(rows[0].weight[1], rows[0].weight[0])


def test_what_came_before_in_the_model_does_not_matter() -> None:
    """A layer has its values by its name, not by its turn."""
    alone, together = nn.ModuleDict({"b": nn.Linear(4, 4)}), nn.ModuleDict({"a": nn.Linear(9, 9), "b": nn.Linear(4, 4)})
    for model in (alone, together):
        initialise_dense(model, seed=1)
    assert torch.equal(alone["b"].weight, together["b"].weight)


@pytest.mark.parametrize(
    "fill", [nn.init.orthogonal_, lambda w: w.data.random_(5), lambda w: w.data.copy_(torch.rand(4, 4))]
)
def test_draws_that_no_counter_gives_are_refused(fill) -> None:
    class Odd(nn.Linear):
        def reset_parameters(self) -> None:
            fill(self.weight)

    model = nn.Linear(4, 4, bias=False)
    model.__class__ = Odd
    with pytest.raises(TrainingError, match=r"reset_parameters draws random values by aten.*only what normal_"):
        initialise_dense(model, seed=1)
