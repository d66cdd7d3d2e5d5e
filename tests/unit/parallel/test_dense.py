"""The dense part by one rank: what it refuses, and what recomputing and clipping leave as they are."""

import copy
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from gr.config.run import DenseConfig
from gr.config.towers import HSTUConfig, LlamaConfig, TowerConfig
from gr.dist import World
from gr.errors import ConfigError
from gr.experiment import build
from gr.parallel.dense import by_mesh, clip_gradients, parallelise_dense
from gr.parallel.mesh import build_mesh
from gr.parallel.tensor import split_tower
from gr.recipes.base import open_recipe
from gr.towers import build_tower
from gr.training.module import TrainModule
from tests.support.tiny import tiny_config, write_tiny

CPU = torch.device("cpu")


def test_one_rank_shares_with_no_other() -> None:
    config = tiny_config("data", "run", dense={"strategy": "fsdp"})
    config.check_ranks(2)
    with pytest.raises(ConfigError, match=r"^dense.strategy=fsdp, but this run has 1 rank, .* dense.strategy=ddp$"):
        config.check_ranks(1)


@pytest.mark.parametrize(
    ("dense", "ranks", "fault"),
    [
        ({"tensor_parallel": 2}, 3, "does not divide the 3 ranks of this run"),
        ({"tensor_parallel": 2}, 4, "on 4 ranks makes 2 groups: set dense.strategy=fsdp"),
    ],
)
def test_groups_that_the_ranks_do_not_make_are_refused(dense: dict, ranks: int, fault: str) -> None:
    DenseConfig(**dense).check_ranks(2)
    with pytest.raises(ConfigError, match=fault):
        DenseConfig(**dense).check_ranks(ranks)


@pytest.mark.parametrize(
    ("tower", "fault"),
    [
        (
            LlamaConfig(heads=4, kv_heads=2),
            r"tensor_parallel=4 does not divide tower.kv_heads=2: .* heads=4, kv",
        ),
        (HSTUConfig(), "only tower.kind=llama can be split"),
    ],
)
def test_a_tower_that_cannot_be_split_is_refused(tower: TowerConfig, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        split_tower(build_tower(tower, dim=16, max_length=8), Mock(size=lambda: 4))


@pytest.mark.parametrize(
    ("sections", "fault"),
    [
        ({"dense": {"gathered": "bf16"}}, "gathered=bf16, but strategy=ddp gathers no layer"),
        ({"dense": {"gathered": "bf16", "strategy": "fsdp"}}, "but trainer.precision=fp32 computes in fp32"),
    ],
)
def test_a_dtype_that_nothing_is_gathered_in_is_refused(sections: dict, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        tiny_config("data", "run", **sections)


@pytest.mark.parametrize(
    ("dense", "fault"),
    [
        ({"strategy": "fsdp"}, "dense.strategy=fsdp: Sequential names no module to shard in fsdp_modules"),
        (
            {"activation_checkpointing": "layer"},
            "checkpointing=layer: Sequential has no tower of layers",
        ),
    ],
)
def test_a_model_that_names_no_layers_is_refused(alone: World, dense: dict, fault: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=fault):
        parallelise_dense(model, build_mesh(alone), DenseConfig(**dense), CPU)


def losses_of(data: Path, alone: World, checkpointing: str) -> list[float]:
    dropping = {"tower": {"kind": "hstu", "layers": 2, "heads": 2, "qk_dim": 4, "v_dim": 4, "dropout": 0.3}}
    dense = {"activation_checkpointing": checkpointing}
    recipe = open_recipe(tiny_config(data, data / "run", model=dropping, dense=dense))
    module = TrainModule(build(recipe, alone).model, recipe.objective(alone), recipe.config, alone)
    losses, loader = [], recipe.loader(alone)
    for step in range(3):
        loss = module.forward(module.prepare(next(loader), step))
        module.backward(loss, step)
        losses.append(float(loss.total))
    loader.close()
    return losses


def test_a_layer_computed_again_has_the_same_gradients(tmp_path: Path, alone: World) -> None:
    """With dropout, whose mask must be drawn again."""
    data = write_tiny(tmp_path / "data")
    assert losses_of(data, alone, "layer") == losses_of(data, alone, "none")


def test_gradients_are_clipped_as_torch_clips_them() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model(torch.arange(8.0).view(2, 4)).square().sum().backward()
    other = copy.deepcopy(model)
    for mine, torchs in zip(model.parameters(), other.parameters(), strict=True):
        torchs.grad = mine.grad.clone()
    norm = clip_gradients(by_mesh(model.parameters()), 0.5)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(other.parameters(), 0.5))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), other.parameters(), strict=True))
