"""TorchRec's planner and cost model for benchmarks/planner.py: its plan, its costs as our solver reads them, a score.

Every cost is an answer of TorchRec's own enumerator and estimators. They estimate each shard of each way to shard a
table; `options` asks for one shard of each size, since a row-wise table on 128 ranks has three sizes at most.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torchrec import DataType, EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.perf_models import NoopPerfModel
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError, Shard, ShardingOption, Topology

from gr.config.inventory import SHARDING_TYPES, InventoryConfig
from gr.planner.candidates import Capacity, Options
from gr.planner.enumerate import COLUMN_TYPES, KERNELS, SCOPES

RANKS_PER_HOST = 8
HBM_BYTES, HOST_BYTES = 80 * 2**30, 128 * 2**30
RESERVED = 0.15
# H100 SXM in bytes/ms: HBM3 3.35 TB/s at 0.8, NVLink 450 GB/s and a 400 Gb/s NIC a GPU at 0.9, one direction.
BANDWIDTHS = {"hbm_mem_bw": 2.7e9, "intra_host_bw": 4e8, "inter_host_bw": 4.5e7}
DTYPES = {"fp32": DataType.FP32, "fp16": DataType.FP16, "bf16": DataType.BF16}


@dataclass(frozen=True)
class Problem:
    """Tables on meta, ranks and batch, in TorchRec's terms."""

    module: nn.Module
    topology: Topology
    batch_size: int
    constraints: dict[str, ParameterConstraints]

    def capacity(self) -> Capacity:
        """The memory for tables on each rank, with 15 % of HBM reserved."""
        reserved = _reservation().reserve(self.topology, self.batch_size, self.module, [_sharder()], self.constraints)
        storage = reserved.devices[0].storage
        return Capacity(self.topology.world_size, RANKS_PER_HOST, storage.hbm, storage.ddr)


@dataclass(frozen=True)
class Score:
    """The cost of a plan by TorchRec's estimators. R ranks."""

    seconds: float  # slowest rank
    hbm_R: np.ndarray


def problem(inventory: InventoryConfig, ranks: int) -> Problem:
    tables = inventory.tables
    bags = [
        EmbeddingBagConfig(
            name=table.name,
            num_embeddings=table.rows,
            embedding_dim=table.dim,
            feature_names=[table.name],
            data_type=DTYPES[table.dtype],
        )
        for table in tables
    ]
    kernels = ["fused", "dense"]  # TorchRec takes dense for data_parallel and fused for all others
    constraints = {
        table.name: ParameterConstraints(compute_kernels=kernels, pooling_factors=[table.ids_per_example])
        for table in tables
    }
    module = nn.Module()
    module.tables = EmbeddingBagCollection(tables=bags, device=torch.device("meta"))
    topology = Topology(
        world_size=ranks,
        local_world_size=RANKS_PER_HOST,
        compute_device="cuda",
        hbm_cap=HBM_BYTES,
        ddr_cap=HOST_BYTES,
        **BANDWIDTHS,
    )
    return Problem(module, topology, inventory.batch_on(ranks), constraints)


def torchrec_plan(given: Problem, timeout: int) -> tuple[list[ShardingOption], int]:
    """TorchRec's plan with its default proposers, and how many proposals it tried; `timeout` seconds bound those only.

    Raises PlannerError where TorchRec finds no plan.
    """
    recorder = _Recorder()
    planner = EmbeddingShardingPlanner(
        topology=given.topology,
        batch_size=given.batch_size,
        constraints=given.constraints,
        storage_reservation=_reservation(),
        stats=recorder,
        timeout_seconds=timeout,
    )
    planner.plan(given.module, [_sharder()])
    return recorder.plan, recorder.proposals


def options(given: Problem) -> Options:
    """Every way that TorchRec would shard each table, at TorchRec's cost, in the order that it lists them."""
    enumerator = _OneShardOfASize(given.topology, given.batch_size, constraints=given.constraints)
    listed = enumerator.enumerate(given.module, [_sharder()])
    names = {name: index for index, name in enumerate(given.constraints)}
    counts = [np.array(count) for count in enumerator.counts]
    milliseconds = [np.array([shard.perf.total for shard in option.shards]) for option in listed]
    hbm = [np.array([shard.storage.hbm for shard in option.shards], float) for option in listed]
    return Options(
        table_O=np.array([names[option.name] for option in listed]),
        sharding_type_O=np.array([SHARDING_TYPES.index(option.sharding_type) for option in listed]),
        kernel_O=np.array([KERNELS.index(option.compute_kernel) for option in listed]),
        column_width_O=np.array([_width(option) for option in listed]),
        shards_O=np.array([count.sum() for count in counts]),
        scope_O=np.array([SCOPES[option.sharding_type] for option in listed]),
        seconds_O=np.array([each.max() for each in milliseconds]) / 1e3,
        hbm_O=np.array([each.max() for each in hbm]),
        host_O=np.array([max(shard.storage.ddr for shard in option.shards) for option in listed]),
        total_seconds_O=np.array([c @ each for c, each in zip(counts, milliseconds, strict=True)]) / 1e3,
        total_hbm_O=np.array([c @ each for c, each in zip(counts, hbm, strict=True)]),
        # TorchRec knows neither hot rows nor latencies.
        extra_seconds_O=np.zeros(len(listed)),
        extra_hbm_O=np.zeros(len(listed)),
        extra_shard_O=np.zeros(len(listed), int),
        group_seconds_S=np.zeros(len(SHARDING_TYPES)),
    )


def placed(given: Problem, sharding_types: Sequence[str], ranks_T: Sequence[np.ndarray]) -> list[ShardingOption]:
    """A plan of ours as TorchRec's, enumerated and estimated by TorchRec shard by shard. Lists are by table."""
    tables = dict(zip(given.constraints, zip(sharding_types, ranks_T, strict=True), strict=True))
    constraints = {
        name: replace(constraint, sharding_types=[tables[name][0]]) for name, constraint in given.constraints.items()
    }
    enumerator = EmbeddingEnumerator(given.topology, given.batch_size, constraints=constraints)
    plan = enumerator.enumerate(given.module, [_sharder()])
    for option in plan:
        for shard, rank in zip(option.shards, tables[option.name][1], strict=True):
            shard.rank = int(rank)
    return plan


def score(given: Problem, plan: list[ShardingOption]) -> Score:
    """Rates a plan as TorchRec's planner rates its own. Raises ValueError for one that is not whole or does not fit."""
    hbm_R = np.zeros(given.topology.world_size)
    for option in plan:
        for shard in option.shards:
            hbm_R[shard.rank] += shard.storage.hbm
    if sorted(option.name for option in plan) != sorted(given.constraints):
        raise ValueError(f"the plan has {len(plan)} tables, the model {len(given.constraints)}, or not the same ones")
    if hbm_R.max() > given.capacity().hbm_bytes:
        raise ValueError(f"rank {hbm_R.argmax()} holds {hbm_R.max():.0f} bytes of {given.capacity().hbm_bytes:.0f}")
    return Score(NoopPerfModel(given.topology).rate(plan) / 1e3, hbm_R)


def differences(given: Problem) -> Iterator[str]:
    """Differences of `options` from TorchRec's full enumeration, to 1e-9. It is slow: for small cases."""
    ours = options(given)
    theirs = EmbeddingEnumerator(given.topology, given.batch_size, constraints=given.constraints).enumerate(
        given.module, [_sharder()]
    )
    if len(theirs) != len(ours.table_O):
        yield f"{len(ours.table_O)} options, TorchRec has {len(theirs)}"
        return
    names = list(given.constraints)
    for index, option in enumerate(theirs):
        label = f"{option.name} {option.sharding_type} {option.compute_kernel}"
        if (
            option.name != names[ours.table_O[index]]
            or option.sharding_type != SHARDING_TYPES[ours.sharding_type_O[index]]
        ):
            yield f"{label}: in another place"
        seconds = [shard.perf.total / 1e3 for shard in option.shards]
        hbm = [shard.storage.hbm for shard in option.shards]
        pairs = {
            "shards": (ours.shards_O, len(option.shards)),
            "seconds": (ours.seconds_O, max(seconds)),
            "total seconds": (ours.total_seconds_O, sum(seconds)),
            "HBM": (ours.hbm_O, max(hbm)),
            "total HBM": (ours.total_hbm_O, sum(hbm)),
            "host memory": (ours.host_O, max(shard.storage.ddr for shard in option.shards)),
        }
        for what, (values, expected) in pairs.items():
            if not np.isclose(values[index], expected, rtol=1e-9, atol=0.0):
                yield f"{label}: {what} {values[index]}, TorchRec {expected}"


class _OneShardOfASize(EmbeddingEnumerator):
    """TorchRec's enumerator; its options keep one shard of each size, and `counts` how many there are of it."""

    counts: list[list[int]]

    def populate_estimates(self, sharding_options: list[ShardingOption]) -> None:
        self.counts = []
        for option in sharding_options:
            sizes = Counter(tuple(shard.size) for shard in option.shards)
            option.shards = [Shard(size=list(size), offset=[0, 0]) for size in sizes]
            self.counts.append(list(sizes.values()))
        super().populate_estimates(sharding_options)


class _Recorder(NoopEmbeddingStats):
    """Keeps the plan and the number of proposals that TorchRec's planner reports at its end."""

    plan: list[ShardingOption]
    proposals: int

    def log(self, *arguments, best_plan: list[ShardingOption], num_proposals: int, **others) -> None:
        self.plan, self.proposals = best_plan, num_proposals


def _width(option: ShardingOption) -> int:
    """The width of the column blocks; 0 where columns are not cut."""
    return option.shards[0].size[1] if option.sharding_type in COLUMN_TYPES else 0


def _sharder() -> EmbeddingBagCollectionSharder:
    return EmbeddingBagCollectionSharder()


def _reservation() -> FixedPercentageStorageReservation:
    return FixedPercentageStorageReservation(RESERVED)


__all__ = ["PlannerError", "Problem", "Score", "differences", "options", "placed", "problem", "score", "torchrec_plan"]
