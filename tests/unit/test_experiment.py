"""What build() hands over, as opposed to what a layer by itself is."""

from pathlib import Path

import pytest
import torch

from gr.dist import World
from gr.experiment import build
from gr.parallel.dense import unwrapped
from gr.recipes.base import open_recipe
from tests.support.tiny import tiny_config, write_tiny


@pytest.mark.parametrize("tower", ["hstu", "sasrec"])
def test_a_built_model_has_the_initial_values_of_its_layers(tmp_path: Path, alone: World, tower: str) -> None:
    """Xavier-uniform output maps with zero bias (facts of arXiv 2402.17152's code), not nn.Linear's own default."""
    model = {} if tower == "hstu" else {"tower": {"kind": "sasrec", "layers": 2, "heads": 2, "ffn_dim": 12}}
    built = build(open_recipe(tiny_config(write_tiny(tmp_path / "data"), tmp_path / "run", model=model)), alone)
    linears = [m for m in unwrapped(built.model).tower.modules() if isinstance(m, torch.nn.Linear)]
    assert linears
    for linear in linears:
        bound = (6 / sum(linear.weight.shape)) ** 0.5
        assert 0.7 * bound < float(linear.weight.abs().max()) <= bound
        assert torch.equal(linear.bias, torch.zeros_like(linear.bias))
    assert not torch.equal(linears[0].weight, linears[-1].weight)


def test_the_seed_decides_the_initial_values(tmp_path: Path, alone: World) -> None:
    data = write_tiny(tmp_path / "data")
    first, again, other = (
        unwrapped(build(open_recipe(tiny_config(data, tmp_path / "run", seed=seed)), alone).model).state_dict()
        for seed in (1, 1, 2)
    )
    dense = [name for name in first if not name.startswith("tables")]
    assert all(torch.equal(first[name], again[name]) for name in dense)
    assert not all(torch.equal(first[name], other[name]) for name in dense)
