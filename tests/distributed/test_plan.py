"""A plan on 4 gloo ranks: it trains as one process would, and its shards take the bytes that the planner predicts.

The ranks of hand-made models are 2 hosts of 2. What the planner chooses is checked in tests/unit/planner.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
    PoolingType,
)
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ModuleSharder, ShardingEnv
from torchrec.modules.embedding_configs import DataType

from gr import compat
from gr.config.inventory import SEQUENCE_TYPES, AnyShardingType, Kernel, TableConfig
from gr.config.optim import SGD, Adagrad, Adam, PartialRowWiseAdam, RowWiseAdagrad
from gr.config.retrieval import RetrievalConfig
from gr.config.run import EmbeddingsConfig
from gr.dist import World
from gr.embeddings import TableOptimizer
from gr.embeddings.local_shards import take_lookups
from gr.embeddings.optimizers import fused_params
from gr.errors import PlanError
from gr.experiment import build
from gr.parallel.tables import sequence_sharder
from gr.planner.constraints import constrained
from gr.planner.estimate import MEMORY, estimate
from gr.planner.estimate_tables import table_bytes
from gr.planner.for_run import run_topology
from gr.planner.placement import Placement, Plan, shards
from gr.planner.planfile import dump_plan
from gr.planner.sharding_plan import to_sharding_plan
from gr.recipes.base import open_recipe
from tests.distributed.test_parity import (
    LOSS,
    WEIGHT,
    configured,
    largest_difference,
    run_sharded,
    run_unsharded,
    sharded,
)
from tests.support.plans import hand_made, machine
from tests.support.ranks import run_ranks
from tests.support.schemas import item_schema
from tests.support.tiny import ITEMS, write_tiny

RANKS, RANKS_PER_HOST, STEPS, B, DIM = 4, 2, 3, 6, 16
CPU = torch.device("cpu")
LEARNING_RATE = 0.1
# Most are not divisible by 4. A rank whose every table is empty would fail: fbgemm's CPU lookup then looks for a GPU.
ROWS = (41, 64, 7, 97, 10, 53, 30)
# Ranks, and columns of a block.
RANKS_OF: dict[AnyShardingType, tuple[tuple[int, ...], int | None]] = {
    "data_parallel": ((0, 1, 2, 3), None),
    "table_wise": ((2,), None),
    "column_wise": ((3, 0), 8),
    "row_wise": ((0, 1, 2, 3), None),
    "table_row_wise": ((2, 3), None),
    "table_column_wise": ((1, 0), 8),
    "grid_shard": ((2, 3, 0, 1), 8),
}
OPTIMIZERS = {
    "sgd": SGD(lr=LEARNING_RATE),
    "adagrad": Adagrad(),
    "rowwise_adagrad": RowWiseAdagrad(),
    "adam": Adam(),
    "partial_rowwise_adam": PartialRowWiseAdam(),
}
Weights = dict[str, Tensor]


def plan_of(types: Sequence[AnyShardingType], **table: object) -> Plan:
    """One table t0, t1, ... for each of `types`."""
    tables, placements = [], []
    for index, (sharding_type, rows) in enumerate(zip(types, ROWS, strict=False)):
        described = {"name": f"t{index}", "rows": rows, "dim": DIM, "optimizer": "sgd", **table}
        tables.append(TableConfig.model_validate(described))
        ranks, column_width = RANKS_OF[sharding_type]
        if sharding_type == "column_wise" and tables[-1].kind == "pooled":
            column_width = 12  # and a block of 4
        fused = sharding_type != "data_parallel" and tables[-1].is_fused_on_cpu()
        kernel: Kernel = "fused" if fused else "dense"
        placements.append(Placement(f"t{index}", sharding_type, kernel, ranks, column_width))
    return hand_made(tables, placements, machine(RANKS, RANKS_PER_HOST))


class Bags(nn.Module):
    """Pooled tables under a linear layer; each example's loss is a sine, so that every gradient differs."""

    def __init__(self, plan: Plan, device: torch.device = CPU) -> None:
        super().__init__()
        tables = [
            EmbeddingBagConfig(
                name=table.name,
                num_embeddings=table.rows,
                embedding_dim=table.dim,
                feature_names=[f"f_{table.name}"],
                pooling=PoolingType.SUM,
                data_type=DataType.FP16 if table.dtype == "fp16" else DataType.FP32,
            )
            for table in plan.inventory.tables
        ]
        self.features = [name for table in tables for name in table.feature_names]
        self.tables = EmbeddingBagCollection(tables, device=device)
        self.over = nn.Linear(DIM * len(tables), 1)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        pooled = self.tables(features)
        # By name: the order of pooled.values() depends on the plan.
        return self.over(torch.cat([pooled[name] for name in self.features], 1).float()).sin().sum()


class Sequences(nn.Module):
    """Sequence tables; each token's loss is a sine."""

    def __init__(self, plan: Plan, device: torch.device = CPU) -> None:
        super().__init__()
        tables = [
            EmbeddingConfig(
                name=table.name,
                num_embeddings=table.rows,
                embedding_dim=table.dim,
                feature_names=[f"f_{table.name}"],
                data_type=DataType.FP16 if table.dtype == "fp16" else DataType.FP32,
            )
            for table in plan.inventory.tables
        ]
        self.features = [name for table in tables for name in table.feature_names]
        self.tables = EmbeddingCollection(tables, device=device)
        self.over = nn.Linear(DIM, 1)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        rows = self.tables(features)
        return torch.stack([self.over(rows[name].values().float()).sin().sum() for name in self.features]).sum()


def examples(plan: Plan, step: int, ranks: Sequence[int]) -> KeyedJaggedTensor:
    """B examples for each of `ranks`, 0 to 4 ids a feature."""
    lengths, ids = [], []
    for index, table in enumerate(plan.inventory.tables):
        for rank in ranks:
            random = torch.Generator().manual_seed(10_000 * step + 100 * rank + index)
            lengths.append(torch.randint(0, 5, (B,), generator=random))
            ids.append(torch.randint(0, table.rows, (int(lengths[-1].sum()),), generator=random))
    names = [f"f_{table.name}" for table in plan.inventory.tables]
    return KeyedJaggedTensor(keys=names, values=torch.cat(ids), lengths=torch.cat(lengths))


def initial(kind: type[nn.Module], plan: Plan) -> Weights:
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(p.shape, generator=random) * 0.3 for name, p in kind(plan).named_parameters()}


def unsharded(kind: type[nn.Module], plan: Plan) -> tuple[list[float], Weights]:
    """Losses and final weights of one process on the global batch, plain SGD."""
    model = kind(plan)
    model.load_state_dict(initial(kind, plan))
    losses = []
    for step in range(STEPS):
        loss = model(examples(plan, step, range(RANKS))) / (B * RANKS)
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LEARNING_RATE * parameter.grad
                parameter.grad = None
    return losses, model.state_dict()


def parts(dmp: DistributedModelParallel, weights: Weights) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, local tensor, the same part of `weights`) of everything this rank holds."""
    for name, value in dmp.state_dict().items():
        if not isinstance(value, ShardedTensor):
            yield name, value, weights[name]
            continue
        for shard in value.local_shards():
            (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            yield name, shard.tensor, weights[name][row : row + rows, column : column + columns]


def distributed(
    model: nn.Module, plan: Plan, sharder: ModuleSharder, weights: Weights | None = None
) -> DistributedModelParallel:
    os.environ["LOCAL_WORLD_SIZE"] = str(RANKS_PER_HOST)
    compat.quiet_known_warnings()
    dmp = DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=CPU,
        plan=to_sharding_plan(plan, model, CPU),
        sharders=[sharder],
    )
    take_lookups(dmp)
    if weights is not None:
        with torch.no_grad():
            for _, mine, given in parts(dmp, weights):
                mine.copy_(given)
    return dmp


def bag_sharder(optimizer: str) -> ModuleSharder:
    return EmbeddingBagCollectionSharder(fused_params=fused_params(OPTIMIZERS[optimizer]))


def trained(world: World, kind: type[nn.Module], plan: Plan, final: Weights) -> tuple[list[float], dict[str, float]]:
    """Losses, and by table the largest difference of a weight from `final`, on this rank."""
    sharder = bag_sharder("sgd") if kind is Bags else sequence_sharder(EmbeddingsConfig(optimizer=OPTIMIZERS["sgd"]))
    dmp = distributed(kind(plan, torch.device("meta")), plan, sharder, initial(kind, plan))
    # TorchRec leaves the parameters of fused kernels out of autograd's sight: they get no gradient.
    parameters = list(dmp.parameters())
    losses = []
    for step in range(STEPS):
        loss = dmp(examples(plan, step, [world.rank])) / B
        loss.backward()
        losses.append(world.all_reduce_sum([float(loss.detach())])[0] / RANKS)
        with torch.no_grad():
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter -= LEARNING_RATE * parameter.grad
        # Only now: data-parallel tables share one gradient.
        for parameter in parameters:
            parameter.grad = None
    apart = {name: float((a - b).abs().max()) if a.numel() else 0.0 for name, a, b in parts(dmp, final)}
    return losses, apart


@pytest.mark.parametrize(("kind", "types"), [(Bags, tuple(RANKS_OF)), (Sequences, SEQUENCE_TYPES)])
def test_a_plan_of_every_sharding_type_trains_as_one_process_does(
    kind: type[nn.Module], types: Sequence[AnyShardingType]
) -> None:
    plan = plan_of(types, kind="pooled" if kind is Bags else "sequence")
    losses, final = unsharded(kind, plan)
    assert all(float((final[name] - start).abs().max()) > 1e-3 for name, start in initial(kind, plan).items())
    for got, apart in run_ranks(trained, RANKS, kind, plan, final):
        assert got == pytest.approx(losses, abs=1e-5)
        assert max(apart.values()) < 1e-5, apart


def measured(
    world: World, kind: type[nn.Module], plan: Plan, optimizer: str
) -> tuple[dict[str, int], dict[str, int], int]:
    """Of this rank, after a step: bytes of weights and of optimizer states by table, and bytes of their storages."""
    model = kind(plan, torch.device("meta"))
    config = EmbeddingsConfig(optimizer=OPTIMIZERS[optimizer])
    dmp = distributed(model, plan, bag_sharder(optimizer) if kind is Bags else sequence_sharder(config))
    dmp(examples(plan, 0, [world.rank])).backward()
    if kind is Bags:
        held = list(bag_shards(dmp))
    else:
        tables = TableOptimizer(dmp, config, seed=1)
        tables.step()
        held = [(s.table, s.weight, states) for s, states in zip(tables.shards, tables.states, strict=True)]
    weights, states = dict.fromkeys((t.name for t in plan.inventory.tables), 0), {}
    states |= weights
    storages = {}
    for table, weight, own in held:
        weights[table] += weight.nbytes
        states[table] += sum(state.nbytes for state in own.values())
        storages |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (weight, *own.values())}
    return weights, states, sum(storages.values())


def bag_shards(dmp: DistributedModelParallel) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
    """(table, weight, fused optimizer states) of this rank's shards of pooled tables."""
    for module in dmp.modules():
        if not isinstance(module, ShardedEmbeddingBagCollection):
            continue
        kernels = [m for lookup in module._lookups for m in lookup.modules() if hasattr(m, "split_embedding_weights")]
        for kernel in (m for m in kernels if hasattr(m, "emb_module")):
            tbe, weights = kernel.emb_module, kernel.split_embedding_weights()
            fused = getattr(tbe, "optimizer", EmbOptimType.EXACT_SGD) != EmbOptimType.EXACT_SGD
            states = tbe.get_optimizer_state() if fused else [{} for _ in weights]
            for table, weight, own in zip(kernel.config.embedding_tables, weights, states, strict=True):
                yield table.name, weight, dict(own)


def predicted(plan: Plan, rank: int) -> tuple[dict[str, int], dict[str, int]]:
    weights = dict.fromkeys((table.name for table in plan.inventory.tables), 0)
    states = dict(weights)
    for table, placement in zip(plan.inventory.tables, plan.placements, strict=True):
        for shard in shards(table, placement):
            if shard.rank == rank:
                own = table_bytes(table, shard)
                weights[table.name] += own[0]
                states[table.name] += own[1]
    return weights, states


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [
        (kind, name)
        for kind in (Bags, Sequences)
        for name in OPTIMIZERS
        if kind is Sequences or OPTIMIZERS[name].fused_on_cpu
    ],
)
def test_shards_take_the_bytes_that_are_predicted(kind: type[nn.Module], optimizer: str, dtype: str) -> None:
    """States of dense kernels (data_parallel; on CPU also Adam) are TableOptimizer's, which knows sequence tables."""
    types: Sequence[AnyShardingType] = SEQUENCE_TYPES if kind is Sequences else tuple(RANKS_OF)[1:]
    pooling = "pooled" if kind is Bags else "sequence"
    plan = plan_of(types, kind=pooling, optimizer=optimizer, dtype=dtype, rounding="nearest")
    for rank, (weights, states, storages) in enumerate(run_ranks(measured, RANKS, kind, plan, optimizer)):
        assert (weights, states) == predicted(plan, rank)
        assert storages == sum(weights.values()) + sum(states.values()), "allocated and in no shard"


def experiment_plan(config: RetrievalConfig, ranks: int) -> Plan:
    """A plan for the experiment that no planner would make: the whole item table on the last rank."""
    world = World(0, ranks, 0, ranks, CPU)
    inventory = constrained(config.inventory(item_schema(ITEMS)), config.planner, "cpu")
    topology = run_topology(None, world)
    (table,) = inventory.tables
    placement = Placement(table.name, "table_wise", table.kernels[0], (ranks - 1,))
    return Plan(inventory, topology, (placement,), bound_seconds=0.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("data") / "tiny")


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_an_experiment_trains_with_a_plan_from_a_file(data: Path, tmp_path: Path, optimizer: str) -> None:
    config = configured(data, "auto", optimizer)
    (tmp_path / "plan.json").write_text(dump_plan(experiment_plan(config, RANKS)))
    planner = config.planner.model_copy(update={"plan": str(tmp_path / "plan.json")})
    given = config.model_copy(update={"planner": planner})
    loss, table, dense = largest_difference(run_sharded(RANKS, given), run_unsharded(config, column_shards=1))
    assert loss < LOSS and table < WEIGHT and dense < WEIGHT, (loss, table, dense)
    assert [len(held) for _, held, _ in run_ranks(sharded, RANKS, given)] == [0, 0, 0, 1]


def held(world: World, config: RetrievalConfig) -> tuple[list[int], list[float]]:
    """Bytes of this rank's table weights and optimizer states: measured, and as estimate() predicts them."""
    built = build(open_recipe(config), world)
    assert built.plan is not None
    tables = TableOptimizer(built.model, config.embeddings, config.seed)
    states = sum(state.nbytes for own in tables.states for state in own.values())
    memory_MR = estimate(built.plan).memory_MR
    predicted = [float(memory_MR[MEMORY.index(kind), world.rank]) for kind in ("tables", "table_optimizer")]
    return [sum(shard.weight.nbytes for shard in tables.shards), states], predicted


@pytest.mark.parametrize("sharding", ["auto", *SEQUENCE_TYPES])
@pytest.mark.parametrize("optimizer", ["adam", "rowwise_adagrad"])
def test_the_report_of_a_run_predicts_its_tables(data: Path, optimizer: str, sharding: str) -> None:
    for got, expected in run_ranks(held, RANKS, configured(data, sharding, optimizer)):
        assert got == expected


def refusal(world: World, config: RetrievalConfig) -> str:
    try:
        build(open_recipe(config), world)
    except PlanError as error:
        return str(error)
    return "accepted"


def test_a_plan_for_something_else_is_refused_on_every_rank(data: Path, tmp_path: Path) -> None:
    config = configured(data, "auto", "adam")
    wide = config.model_copy(update={"model": config.model.model_copy(update={"dim": 16})})
    for name, plan in {"model": experiment_plan(wide, RANKS), "ranks": experiment_plan(config, 2)}.items():
        path = tmp_path / f"{name}.json"
        path.write_text(dump_plan(plan))
        planner = config.planner.model_copy(update={"plan": str(path)})
        said = run_ranks(refusal, RANKS, config.model_copy(update={"planner": planner}))
        assert len(set(said)) == 1 and said[0] != "accepted", said
