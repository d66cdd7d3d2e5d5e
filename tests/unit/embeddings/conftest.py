"""One table, sharded over this process alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from gr.config.tree import ExperimentConfig
from gr.dist import World
from gr.embeddings import build_collection, initialise_tables, shard_tables
from gr.planner.run import make_plan
from tests.support.tiny import tiny_config

ROWS = 12


class Holder(nn.Module):
    """A model that is nothing but its tables."""

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__()
        self.tables = build_collection(ROWS, config.model.dim, config.embeddings)


@pytest.fixture
def make_table(alone: World) -> Callable[..., nn.Module]:
    """make_table(dim=..., sharding=..., dtype=..., **optimizer): the sharded and filled model."""

    def make(*, dim: int = 8, sharding: str = "row_wise", dtype: str = "fp32", **optimizer: object) -> nn.Module:
        config = tiny_config(
            Path("unused"),
            Path("unused"),
            model={"dim": dim},
            planner={"sharding": sharding},
            embeddings={"dtype": dtype, "optimizer": optimizer or {"kind": "sgd"}},
        )
        with torch.device("meta"):
            model = Holder(config)
        _, sharding_plan = make_plan(model, config, ROWS, alone)
        sharded = shard_tables(model, sharding_plan, config.embeddings, alone.device)
        initialise_tables(sharded, seed=1, std=0.02, dim=dim)
        return sharded

    return make
