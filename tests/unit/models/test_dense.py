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


def test_the_seed_alone_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    first, again, other = (nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5)) for _ in range(3))
    for model, seed in ((first, 7), (again, 7), (other, 8)):
        torch.rand(seed)
        initialise_dense(model, seed)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first[0].weight, other[0].weight)
