"""Pooled tables on 1, 2 and 4 gloo ranks train as one plain PyTorch process does, and go from one plan to another.

The global batch is the same at every world size, and the loss is its mean. A row-wise optimizer keeps statistics of its
own in every block of columns: it is compared with that definition.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor
from torchrec.distributed.model_parallel import get_unwrapped_module

from gr.checkpoint import CheckpointFolder, CheckpointStore, ModelState, load_state
from gr.config.inventory import AnyShardingType, TableConfig
from gr.config.optim import DenseAdamW
from gr.config.run import DenseConfig, EmbeddingsConfig
from gr.dist import World
from gr.embeddings import TableOptimizer, initialise_tables, pooled_lookup
from gr.embeddings.init import key_of, uniform
from gr.parallel.dense import parallelise_dense
from gr.parallel.mesh import build_mesh
from gr.parallel.tables import shard_tables
from gr.planner.placement import Placement, Plan, column_blocks
from gr.planner.sharding_plan import to_sharding_plan
from tests.distributed.test_parity import OPTIMIZERS, LookedUpRows, optimizer_settings, unsharded_optimizer
from tests.support.plans import hand_made, machine
from tests.support.pooled import PooledTable, build_bags, compute_kernel
from tests.support.ranks import run_ranks

SEED, STEPS, HALF, B, DENSE = 3, 6, 3, 24, 5
LOSS, WEIGHT = 2e-5, 2e-5  # absolute; losses are 0.5 to 0.8 nats, weights up to 0.7
CPU = torch.device("cpu")
# `flags` has fewer rows than there are ranks, and `words` is read by two features.
TABLES = (
    PooledTable("users", 41, 16, ("user",), "sum"),
    PooledTable("words", 64, 24, ("query_word", "title_word"), "mean"),
    PooledTable("shops", 23, 16, ("shop",), "mean"),
    PooledTable("flags", 7, 8, ("flag",), "sum"),
)
FEATURES = [feature for table in TABLES for feature in table.features]
WIDTH = sum(table.dim * len(table.features) for table in TABLES) + DENSE
# 16 = 12 + 4 columns, 24 = 12 + 12, 8 = 4 + 4; on one rank a table is one block.
COLUMN_WIDTH = {16: 12, 24: 12, 8: 4}
Sharding = AnyShardingType | Literal["mixed"]
MIXED: tuple[AnyShardingType, ...] = ("grid_shard", "row_wise", "table_wise", "data_parallel")
Weights = dict[str, Tensor]


@dataclass
class Outcome:
    """tables: whole, or on a rank (row, column, weight) of its shards."""

    losses: list[float]
    tables: dict
    dense: Weights


def config_for(optimizer: str) -> EmbeddingsConfig:
    settings = {"init": "uniform_rows", "optimizer": optimizer_settings(optimizer)}
    return EmbeddingsConfig.model_validate(settings)


def plan_of(sharding: Sharding, optimizer: str, ranks: int) -> Plan:
    """Every table under one sharding type, or mixed; two hosts where there are four ranks."""
    tables, placements = [], []
    for index, table in enumerate(TABLES):
        described = {"name": table.name, "rows": table.rows, "dim": table.dim, "pooling": table.pooling}
        tables.append(TableConfig(**described, features=len(table.features), optimizer=optimizer))
        kind = MIXED[index] if sharding == "mixed" else sharding
        if kind == "grid_shard" and table.pooling == "mean":
            kind = "table_row_wise"  # grid_shard has no means
        block = COLUMN_WIDTH[table.dim] if ranks > 1 else table.dim
        width = {"column_wise": block, "grid_shard": table.dim // 2}.get(kind)
        on: tuple[int, ...] = tuple(range(ranks))
        if kind in ("table_wise", "column_wise"):
            on = tuple((index + i) % ranks for i in range(len(column_blocks(table.dim, width))))
        elif kind == "table_row_wise":
            on = (0, 1) if index % 2 else (2, 3)
        kernel = compute_kernel(config_for(optimizer).optimizer, CPU, kind)
        placements.append(Placement(table.name, kind, kernel, on, width))
    return hand_made(tables, placements, machine(ranks, 2 if ranks == 4 else ranks))


def widths_of(plan: Plan) -> dict[str, int | None]:
    return {placement.table: placement.column_width for placement in plan.placements}


def examples(step: int, part: slice) -> tuple[KeyedJaggedTensor, Tensor, Tensor]:
    """Of one part of the global batch: 0 to 4 ids a feature, dense inputs [b, DENSE], labels [b]."""
    random = torch.Generator().manual_seed(step)
    values, lengths = [], []
    for table in TABLES:
        for _ in table.features:
            length = torch.randint(0, 5, (B,), generator=random)
            ids = torch.randint(0, table.rows, (int(length.sum()),), generator=random)
            values += ids.split(length.tolist())[part]
            lengths.append(length[part])
    dense, labels = torch.randn(B, DENSE, generator=random), torch.randint(0, 2, (B,), generator=random)
    features = KeyedJaggedTensor(keys=FEATURES, values=torch.cat(values), lengths=torch.cat(lengths))
    return features, dense[part], labels[part].float()


class Over(nn.Module):
    """What is over the tables: two layers, and the sum of the examples' losses."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(WIDTH, 8), nn.Linear(8, 1)

    def forward(self, parts: list[Tensor], labels: Tensor) -> Tensor:
        logits = self.out(self.hidden(torch.cat(parts, 1)).tanh()).squeeze(1)
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")

    def reset_parameters(self) -> None:
        random = torch.Generator().manual_seed(SEED)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.2)


class Clicks(nn.Module):
    def __init__(self, config: EmbeddingsConfig) -> None:
        super().__init__()
        self.tables: EmbeddingBagCollection = build_bags(TABLES, config)
        self.over = Over()

    def forward(self, features: KeyedJaggedTensor, dense: Tensor, labels: Tensor) -> Tensor:
        return self.over([*pooled_lookup(self.tables, features, FEATURES), dense], labels)


class Job:
    """A sharded model on this rank, with its optimizers."""

    def __init__(self, world: World, sharding: Sharding, optimizer: str) -> None:
        plan = plan_of(sharding, optimizer, world.size)
        # TorchRec takes the hosts from here.
        os.environ["LOCAL_WORLD_SIZE"] = str(plan.topology.ranks_per_host)
        config = config_for(optimizer)
        with torch.device("meta"):
            model = Clicks(config)
        self.world = world
        sharded = shard_tables(model, to_sharding_plan(plan, model, CPU), config, CPU)
        self.model = parallelise_dense(sharded, build_mesh(world), DenseConfig(), CPU)
        initialise_tables(self.model, seed=SEED, embeddings=config)
        over = get_unwrapped_module(self.model).over
        over.reset_parameters()
        self.dense = dict(over.named_parameters())
        self.dense_optimizer = torch.optim.AdamW(self.dense.values(), lr=0.01, weight_decay=0.0)
        self.tables = TableOptimizer(self.model, config, SEED)

    @property
    def state(self) -> ModelState:
        return ModelState(self.dense, self.dense_optimizer, self.tables, DenseAdamW.states)

    def train(self, steps: range) -> Outcome:
        size, rank, losses = self.world.size, self.world.rank, []
        for step in steps:
            total = self.model(*examples(step, slice(rank * B // size, (rank + 1) * B // size)))
            losses.append(self.world.all_reduce_sum([float(total.detach())])[0] / B)
            # As in gr.train: gradients are averaged over ranks.
            (total * (size / B)).backward()
            self.dense_optimizer.step()
            self.dense_optimizer.zero_grad()
            self.tables.step()
        tables: dict = {table.name: [] for table in TABLES}
        for shard in self.tables.shards:
            tables[shard.table].append((shard.row_offset, shard.column_offset, shard.weight.numpy().copy()))
        return Outcome(losses, tables, {name: p.detach().numpy().copy() for name, p in self.dense.items()})


def whole(ranks: list[Outcome]) -> Outcome:
    """Of all ranks. Asserts that what is replicated is equal on all of them."""
    tables = {}
    for table in TABLES:
        weight = torch.full((table.rows, table.dim), torch.nan)
        for row, column, part in (shard for outcome in ranks for shard in outcome.tables[table.name]):
            place = weight[row : row + part.shape[0], column : column + part.shape[1]]
            assert place.isnan().all() or (place.numpy() == part).all(), "replicas differ"
            place.copy_(torch.from_numpy(part))
        tables[table.name] = weight
    for other in ranks[1:]:
        assert other.losses == ranks[0].losses
        assert all((other.dense[name] == ranks[0].dense[name]).all() for name in other.dense), "replicas differ"
    return Outcome(ranks[0].losses, tables, {name: torch.from_numpy(p) for name, p in ranks[0].dense.items()})


class Plain:
    """One process, F.embedding_bag on ordinary parameters; a table cut into columns is one parameter a block.

    widths: of the blocks, by table; None is one block.
    """

    def __init__(self, optimizer: str, widths: Mapping[str, int | None]) -> None:
        self.blocks: dict[str, list[nn.Parameter]] = {}
        for table in TABLES:
            counters = torch.arange(table.rows * table.dim).view(table.rows, table.dim)
            weight = uniform(counters, key_of(SEED, table.name), table.rows**-0.5).float()
            blocks = weight.split(column_blocks(table.dim, widths[table.name]), 1)
            self.blocks[table.name] = [nn.Parameter(block) for block in blocks]
        self.over = Over()
        self.over.reset_parameters()
        self.of_tables = {
            name: [unsharded_optimizer(optimizer, block, column_shards=1) for block in blocks]
            for name, blocks in self.blocks.items()
        }
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(self.over.parameters(), lr=0.01, weight_decay=0.0),
            *(optimizer for optimizers in self.of_tables.values() for optimizer in optimizers),
        ]

    def train(self, steps: range) -> Outcome:
        losses = []
        for step in steps:
            features, dense, labels = examples(step, slice(0, B))
            weights = {name: torch.cat(list(blocks), 1) for name, blocks in self.blocks.items()}
            pooled = [self._pooled(features, table, weights) for table in TABLES]
            loss = self.over([*(part for parts in pooled for part in parts), dense], labels) / B
            loss.backward()
            losses.append(float(loss.detach()))
            for table in TABLES:
                for optimizer in self.of_tables[table.name]:
                    if isinstance(optimizer, LookedUpRows):
                        optimizer.looked_up[torch.cat([features[name].values() for name in table.features])] = True
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        tables = {name: torch.cat(list(blocks), 1).detach() for name, blocks in self.blocks.items()}
        return Outcome(losses, tables, {name: p.detach() for name, p in self.over.named_parameters()})

    @staticmethod
    def _pooled(features: KeyedJaggedTensor, table: PooledTable, weights: Weights) -> list[Tensor]:
        bags = [features[name] for name in table.features]
        return [
            F.embedding_bag(bag.values(), weights[table.name], bag.offsets()[:-1], mode=table.pooling) for bag in bags
        ]


@cache
def plain(optimizer: str, widths: tuple[tuple[str, int | None], ...]) -> Outcome:
    return Plain(optimizer, dict(widths)).train(range(STEPS))


def expected_of(sharding: Sharding, optimizer: str, ranks: int) -> Outcome:
    return plain(optimizer, tuple(widths_of(plan_of(sharding, optimizer, ranks)).items()))


def assert_equal(got: Outcome, expected: Outcome, what: str) -> None:
    assert got.losses == pytest.approx(expected.losses, abs=LOSS), what
    for mine, other in ((got.tables, expected.tables), (got.dense, expected.dense)):
        assert mine.keys() == other.keys()
        apart = {name: float((mine[name] - other[name]).abs().max()) for name in mine}
        # Not `any(> WEIGHT)`: NaN must fail.
        assert all(distance < WEIGHT for distance in apart.values()), (what, apart)


def trained_with_each(world: World, sharding: Sharding) -> dict[str, Outcome]:
    return {name: Job(world, sharding, name).train(range(STEPS)) for name in OPTIMIZERS}


ON_ANY: tuple[Sharding, ...] = ("table_wise", "row_wise", "column_wise", "data_parallel")
ON_TWO_HOSTS: tuple[Sharding, ...] = ("table_row_wise", "grid_shard", "mixed")


@pytest.mark.parametrize(
    ("sharding", "size"),
    [*((sharding, size) for sharding in ON_ANY for size in (1, 2, 4)), *((s, 4) for s in ON_TWO_HOSTS)],
)
def test_sharded_equals_plain(sharding: Sharding, size: int) -> None:
    ranks = run_ranks(trained_with_each, size, sharding)
    for optimizer in OPTIMIZERS:
        got, expected = whole([outcomes[optimizer] for outcomes in ranks]), expected_of(sharding, optimizer, size)
        assert_equal(got, expected, optimizer)


def test_blocks_of_columns_change_a_rowwise_optimizer() -> None:
    """So that the test above tells the two apart."""
    cut, uncut = (expected_of(sharding, "rowwise_adagrad", 2) for sharding in ("column_wise", "row_wise"))
    assert float((cut.tables["users"] - uncut.tables["users"]).abs().max()) > 1e-3


def saved_with_each(world: World, folder: Path, sharding: Sharding) -> None:
    for name in OPTIMIZERS:
        job = Job(world, sharding, name)
        job.train(range(HALF))
        store = CheckpointStore(folder / name, job.state, "config: 1\n", world, asynchronous=False)
        store.save({"step": HALF, "data": {}}, keep_last=1)


def resumed_with_each(world: World, folder: Path, sharding: Sharding) -> dict[str, Outcome]:
    outcomes = {}
    for name in OPTIMIZERS:
        job = Job(world, sharding, name)
        load_state(CheckpointFolder(folder / name).final(HALF), job.state, world)
        outcomes[name] = job.train(range(HALF, STEPS))
    return outcomes


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (("table_wise", 4), ("row_wise", 2)),
        (("table_row_wise", 4), ("data_parallel", 2)),
        (("column_wise", 4), ("column_wise", 2)),
        (("mixed", 4), ("mixed", 4)),
    ],
    ids=str,
)
def test_a_checkpoint_goes_on_under_another_plan(
    tmp_path: Path, saved: tuple[Sharding, int], loaded: tuple[Sharding, int]
) -> None:
    """Losses, tables and dense parameters of the second half are those of one process that was never stopped."""
    run_ranks(saved_with_each, saved[1], tmp_path, saved[0])
    ranks = run_ranks(resumed_with_each, loaded[1], tmp_path, loaded[0])
    for optimizer in OPTIMIZERS:
        expected = expected_of(loaded[0], optimizer, loaded[1])
        second_half = Outcome(expected.losses[HALF:], expected.tables, expected.dense)
        assert_equal(whole([outcomes[optimizer] for outcomes in ranks]), second_half, optimizer)


class RowWiseBlocks(Plain):
    """Plain tables in blocks of columns, which can be joined to whole ones with the states they would have had."""

    def joined(self, optimizer: str) -> Plain:
        whole = Plain(optimizer, dict.fromkeys(self.blocks))
        whole.over, dense, states = self.over, self.optimizers[0], iter(self.optimizers[1:])
        for table, step in zip(TABLES, whole.optimizers[1:], strict=True):
            blocks = self.blocks[table.name]
            own = [next(states) for _ in blocks]
            with torch.no_grad():
                whole.blocks[table.name][0].copy_(torch.cat(list(blocks), 1))
            step.steps, step.mean = own[0].steps, torch.cat([each.mean for each in own], 1)
            step.square = sum(each.square * block.shape[1] for each, block in zip(own, blocks, strict=True)) / table.dim
        whole.optimizers[0] = dense
        return whole


def test_joined_blocks_of_columns_have_the_statistics_of_the_whole(tmp_path: Path) -> None:
    """Also where one block is wider than the other: column-wise on 4 ranks, then row-wise on 2."""
    run_ranks(saved_with_each, 4, tmp_path, "column_wise")
    ranks = run_ranks(resumed_with_each, 2, tmp_path, "row_wise")
    for optimizer in ("rowwise_adagrad", "rowwise_adamw"):
        cut = RowWiseBlocks(optimizer, widths_of(plan_of("column_wise", optimizer, 4)))
        cut.train(range(HALF))
        expected = cut.joined(optimizer).train(range(HALF, STEPS))
        assert_equal(whole([outcomes[optimizer] for outcomes in ranks]), expected, optimizer)
