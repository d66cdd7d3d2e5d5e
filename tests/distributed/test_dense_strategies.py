"""Every strategy of the dense part trains the model that one process trains, beside sharded tables.

Row-wise and table-wise tables, clipped gradients, batches in which a rank has no token. fp32: equal up to the order of
sums.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from gr.config.run import RunConfig
from gr.dist import World
from gr.experiment import build
from gr.models.dense import local_part
from gr.recipes.base import open_recipe
from gr.training.module import TrainModule
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_config, write_groups
from tests.support.tiny_histories import tiny_ranking_config, write_histories
from tests.support.tiny_tabular import tiny_click_config, write_tiny_tabular

STEPS = 5
LOSS = 2e-6  # absolute; losses are 1 to 4 nats
COMMON: dict = {
    "embeddings": {"optimizer": {"kind": "rowwise_adagrad", "lr": 0.05}},
    "optimizer": {"kind": "adamw", "lr": 3e-3, "clip_grad_norm": 1.0, "weight_decay": 0.1},
    "planner": {"sharding": "table_wise", "tables": {"item_id": "row_wise"}},
    "trainer": {"global_batch_size": 4},
}
SASREC = {"kind": "sasrec", "layers": 2, "heads": 2, "ffn_dim": 12, "dropout": 0.0}


@dataclass
class Outcome:
    """initial: values of the dense parameters, whole. norms: of the gradient. bytes: that this rank has of the dense
    weights, gradients and optimizer states. tokens: of this rank's batches.
    """

    losses: list[float]
    norms: list[float]
    initial: dict[str, torch.Tensor]
    bytes: tuple[int, int, int]
    tokens: list[int]
    sharded: list[str]


@cache
def data(folder: Path, kind: str) -> Path:
    path = folder / kind
    {"hstu": write_groups, "stu": write_histories, "click": write_tiny_tabular}[kind](path)
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Callable[..., RunConfig]:
    folder = tmp_path_factory.mktemp("data")

    def configured(kind: str, **sections) -> RunConfig:
        sections = {**COMMON, **sections}
        match kind:
            case "hstu" | "sasrec":
                sections["data"] = {"train_holdout": 8}  # so that some users have nothing to train on
                if kind == "sasrec":
                    sections["model"] = {"tower": SASREC}
                return tiny_config(data(folder, "hstu"), folder / "run", **sections)
            case "stu":
                return tiny_ranking_config(data(folder, "stu"), folder / "run", **sections)
        planner = {"sharding": "table_wise", "tables": {"c2": "row_wise"}}
        return tiny_click_config(data(folder, "click"), folder / "run", **{**sections, "planner": planner})

    return configured


def trained(world: World, config: RunConfig) -> Outcome:
    recipe = open_recipe(config)
    built = build(recipe, world)
    module = TrainModule(built.model, recipe.objective(world), config, world)
    initial = {name: _whole(parameter) for name, parameter in module.dense.items()}
    gradients = []
    module.dense_optimizer.register_step_pre_hook(
        lambda *_: gradients.append(sum(_bytes(p.grad) for p in module.dense.values()))
    )
    losses, norms, tokens, loader = [], [], [], recipe.loader(world)
    for step in range(STEPS):
        batch = next(loader)
        tokens.append(module.objective.losses(batch))
        loss = module.forward(module.prepare(batch, step))
        module.backward(loss, step)
        losses.append(world.all_reduce_sum([float(loss.total)])[0] / loss.tokens)
        norms.append(float(module.gradient_norm))
    loader.close()
    states = [state for each in module.dense_optimizer.state.values() for state in each.values() if state.dim()]
    sizes = sum(map(_bytes, module.dense.values())), gradients[-1], sum(map(_bytes, states))
    sharded = [name for name, parameter in module.dense.items() if isinstance(parameter, DTensor)]
    return Outcome(losses, norms, {name: x.numpy() for name, x in initial.items()}, sizes, tokens, sharded)


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    return (parameter.detach().full_tensor() if isinstance(parameter, DTensor) else parameter.detach()).clone()


def _bytes(tensor: torch.Tensor) -> int:
    return local_part(tensor).nbytes


@pytest.fixture(scope="module")
def alone(config) -> Callable[[str], Outcome]:
    return cache(lambda kind: run_ranks(trained, 1, config(kind))[0])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["hstu", "sasrec", "stu", "click"])
def test_a_strategy_trains_what_one_process_trains(config, alone, kind: str, strategy: str, size: int) -> None:
    ranks, expected = run_ranks(trained, size, config(kind, dense={"strategy": strategy})), alone(kind)
    for outcome in ranks:
        assert outcome.losses == pytest.approx(expected.losses, abs=LOSS)
        assert outcome.norms == pytest.approx(expected.norms, rel=1e-5)
        assert outcome.initial.keys() == expected.initial.keys()
        for name, value in outcome.initial.items():
            assert (value == expected.initial[name]).all(), f"initial {name}"
    if size == 4 and kind != "click":
        assert min(min(outcome.tokens) for outcome in ranks) == 0, "a rank has a batch without a token"
    heads = {"hstu": "tower", "sasrec": "tower", "stu": ("tower", "head"), "click": ("bottom", "top")}[kind]
    shown = [name for name in expected.initial if name.startswith(heads)] if strategy == "fsdp" else []
    assert ranks[0].sharded == shown
