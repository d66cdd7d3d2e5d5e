"""The estimate of a plan: memory by kind, seconds by phase and bytes by link, for every rank."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from gr.config.inventory import InventoryConfig, TableConfig
from gr.planner.enumerate import hottest_part
from gr.planner.estimate_dense import BYTES, DenseWork, dense_work
from gr.planner.estimate_tables import (
    ELEMENT_BYTES,
    TABLE_MEMORY,
    TABLE_PHASES,
    CollectiveCosts,
    ShardCosts,
    Traffic,
    shard_costs,
    table_bytes,
    traffic,
)
from gr.planner.memory import PARAMETER_BYTES, fixed_memory
from gr.planner.placement import Placement, Plan, Shard, column_blocks
from gr.planner.topology import Topology

# The phases are in the order of a step. A collective ends when the slowest rank has come to it.
PHASES = (
    "input_all_to_all",
    "lookup",
    "output_all_to_all",
    "dense_forward",
    "dense_backward",
    "gradient_all_to_all",
    "update",
    "table_all_reduce",
    "gradient_all_reduce",
)
MEMORY = (
    "tables",
    "table_optimizer",
    "table_gradients",
    "inputs",
    "embeddings",
    "dense_parameters",
    "dense_gradients",
    "dense_optimizer",
    "activations",
    "logits",
    "reserve",
)
# Shares of the GROUP_COLLECTIVES latencies: lengths and ids, embeddings, gradients.
_LATENCY_SHARES = {"input_all_to_all": 0.5, "output_all_to_all": 0.25, "gradient_all_to_all": 0.25}

SHARDS = 1 << 18  # whose costs are computed at once: some 60 MB


@dataclass(frozen=True)
class TableShare:
    """One table in a plan, of the sharding type that readers know.

    shards, bytes: of one of its copies, weights and optimizer states. seconds: a step of its costliest shard.
    """

    name: str
    sharding_type: str
    kernel: str
    copies: int  # 1, unless it is replicated
    shards: int
    bytes: int
    largest_shard_bytes: int
    seconds: float
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Estimate:
    """The predicted cost of a plan. P phases (PHASES), M kinds of memory (MEMORY), R ranks."""

    plan: Plan
    seconds_PR: np.ndarray
    hidden_P: np.ndarray  # seconds of each phase that run beside another one
    memory_MR: np.ndarray  # bytes of HBM (of host memory on cpu)
    host_R: np.ndarray  # bytes of host memory for offloaded tables
    intra_bytes_R: np.ndarray  # sent to ranks of the same host, a step
    inter_bytes_R: np.ndarray  # sent to ranks of other hosts, a step
    tables: tuple[TableShare, ...]
    flops: float  # a rank and step, of the dense part, forward and backward
    tokens: float  # a rank and step; 0 where the dense part reads no sequence

    @cached_property
    def table_seconds_R(self) -> np.ndarray:
        """Seconds of each rank in the phases that belong to tables: what the solver balances."""
        return self.seconds_PR[[PHASES.index(phase) for phase in TABLE_PHASES]].sum(axis=0)

    @property
    def cost(self) -> float:
        """Seconds of table phases on the costliest rank: what the solver minimises."""
        return float(self.table_seconds_R.max())

    @property
    def gap(self) -> float:
        """Cost over its lower bound, minus 1."""
        return self.cost / self.plan.bound_seconds - 1 if self.plan.bound_seconds else 0.0

    @property
    def step_seconds(self) -> float:
        """Seconds of a step: every phase waits for its slowest rank, and hidden seconds are not counted."""
        return float((self.seconds_PR.max(axis=1) - self.hidden_P).sum())

    @property
    def straggler(self) -> int:
        """The rank with the costliest table phases."""
        return int(self.table_seconds_R.argmax())

    @property
    def total_memory_R(self) -> np.ndarray:
        return self.memory_MR.sum(axis=0)

    @property
    def fits(self) -> bool:
        topology = self.plan.topology
        return bool(
            self.total_memory_R.max() <= topology.hbm_bytes and self.host_R.max(initial=0.0) <= topology.host_bytes
        )


def estimate(plan: Plan) -> Estimate:
    """The predicted cost of `plan`: a sum over its shards, nothing fitted."""
    inventory, topology = plan.inventory, plan.topology
    traffic_T, ranks = traffic(inventory, topology), topology.ranks
    seconds = {phase: np.zeros(ranks) for phase in PHASES}
    memory = {kind: np.zeros(ranks) for kind in MEMORY}
    host, intra, inter = np.zeros(ranks), np.zeros(ranks), np.zeros(ranks)
    totals = {**{phase: seconds[phase] for phase in TABLE_PHASES}, **{kind: memory[kind] for kind in TABLE_MEMORY}}
    totals |= {"host": host, "intra_bytes": intra, "inter_bytes": inter}
    seconds_T = np.zeros(len(inventory.tables))
    for indices in _alike(plan.placements):
        tables = [inventory.tables[index] for index in indices]
        placements = [plan.placements[index] for index in indices]
        costs, t_S = _costs(traffic_T[np.array(indices)], tables, placements, inventory, topology)
        rank_S = np.concatenate([placement.ranks for placement in placements])
        for name, total in totals.items():
            total += np.bincount(rank_S, weights=getattr(costs, name), minlength=ranks)
        np.maximum.at(seconds_T, np.array(indices)[t_S], costs.seconds)
    shares = [_share(*each) for each in zip(inventory.tables, plan.placements, seconds_T.tolist(), strict=True)]
    types = {p.sharding_type for p in plan.placements} - {"data_parallel"}
    for phase, share in _LATENCY_SHARES.items():
        seconds[phase] += share * len(types) * CollectiveCosts(topology).group_seconds()
    for kind, size in fixed_memory(inventory, topology).items():
        memory[kind] += size
    work = dense_work(inventory, inventory.batch_on(ranks))
    hidden = _add_dense(seconds, (intra, inter), work, plan)
    return Estimate(
        plan=plan,
        seconds_PR=np.stack([seconds[phase] for phase in PHASES]),
        hidden_P=np.array([hidden if phase == "gradient_all_reduce" else 0.0 for phase in PHASES]),
        memory_MR=np.stack([memory[kind] for kind in MEMORY]),
        host_R=host,
        intra_bytes_R=intra,
        inter_bytes_R=inter,
        tables=tuple(shares),
        flops=work.forward_flops + work.backward_flops,
        tokens=work.tokens,
    )


def predicted(estimate: Estimate) -> dict[str, Any]:
    """The figures of an estimate as plain numbers, in bytes and seconds, for plan files and scripts."""

    def spread(values_R: np.ndarray) -> dict[str, float]:
        return {"min": float(values_R.min()), "mean": float(values_R.mean()), "max": float(values_R.max())}

    seconds = zip(PHASES, estimate.seconds_PR, estimate.hidden_P, strict=True)
    return {
        "fits": estimate.fits,
        "step_seconds": estimate.step_seconds,
        "table_seconds": estimate.cost,
        "gap": estimate.gap,
        "straggler": estimate.straggler,
        "phase_seconds": {name: spread(row) | {"hidden": float(hidden)} for name, row, hidden in seconds},
        "memory_bytes": {name: spread(row) for name, row in zip(MEMORY, estimate.memory_MR, strict=True)}
        | {"all": spread(estimate.total_memory_R), "host": spread(estimate.host_R)},
        "sent_bytes": {"host": spread(estimate.intra_bytes_R), "network": spread(estimate.inter_bytes_R)},
    }


def placement_costs(
    table_traffic: Traffic, table: TableConfig, placement: Placement, inventory: InventoryConfig, topology: Topology
) -> ShardCosts:
    """Costs of every shard of one table, in the order of its ranks. table_traffic: of this table alone."""
    return _costs(table_traffic[None], [table], [placement], inventory, topology)[0]


def _alike(placements: Sequence[Placement]) -> Iterator[list[int]]:
    """The tables of each sharding type and kernel, of at most SHARDS shards or one table at once."""
    kinds: dict[tuple[str, str], list[int]] = {}
    for index, placement in enumerate(placements):
        kinds.setdefault((placement.sharding_type, placement.kernel), []).append(index)
    for indices in kinds.values():
        part: list[int] = []
        shards = 0
        for index in indices:
            if part and shards + len(placements[index].ranks) > SHARDS:
                yield part
                part, shards = [], 0
            part.append(index)
            shards += len(placements[index].ranks)
        yield part


def _costs(
    traffic_T: Traffic,
    tables: Sequence[TableConfig],
    placements: Sequence[Placement],
    inventory: InventoryConfig,
    topology: Topology,
) -> tuple[ShardCosts, np.ndarray]:
    """Costs of every shard of `tables`, of one sharding type and kernel: arrays [S]; and the table of each shard.

    A table's shards are in the order of its ranks: column blocks, and in each its row blocks of ceil(E / n) rows, of
    which one has the most read row.
    """
    first = placements[0]
    count_T = np.array([len(placement.ranks) for placement in placements])
    rows_T, dim_T = np.array([table.rows for table in tables]), np.array([table.dim for table in tables])
    width_T = np.array([each.column_width or table.dim for each, table in zip(placements, tables, strict=True)])
    blocks_T = -(-dim_T // width_T)
    parts_T = np.ones_like(count_T) if first.sharding_type == "data_parallel" else count_T // blocks_T
    height_T = -(-rows_T // parts_T)
    hottest_T = [hottest_part(each, n) if n > 1 else 0 for each, n in zip(tables, parts_T.tolist(), strict=True)]
    t_S = np.repeat(np.arange(len(tables)), count_T)
    place_S = np.arange(len(t_S)) - (np.cumsum(count_T) - count_T)[t_S]
    part_S, last_S = place_S % parts_T[t_S], (place_S // parts_T[t_S]) % blocks_T[t_S] == blocks_T[t_S] - 1
    columns_S = np.where(last_S, (dim_T - width_T * (blocks_T - 1))[t_S], width_T[t_S])
    row_share_S = np.clip(rows_T[t_S] - height_T[t_S] * part_S, 0, height_T[t_S]) / rows_T[t_S]
    traffic_S = traffic_T[t_S]
    is_hottest_S = part_S == np.array(hottest_T)[t_S]
    id_share_S = row_share_S * (1 - traffic_S.hottest) + is_hottest_S * traffic_S.hottest
    costs = shard_costs(
        traffic_S,
        topology,
        ELEMENT_BYTES[inventory.comm_dtype],
        first.sharding_type,
        first.kernel,
        (columns_S, row_share_S, np.where(parts_T[t_S] > 1, id_share_S, 1.0)),
    )
    return costs.broadcast(len(t_S)), t_S


def _share(table: TableConfig, placement: Placement, seconds: float) -> TableShare:
    widths = column_blocks(table.dim, placement.column_width)
    copies = len(placement.ranks) if placement.sharding_type == "data_parallel" else 1
    parts = 1 if copies > 1 else len(placement.ranks) // len(widths)
    whole = sum(sum(table_bytes(table, Shard(0, 0, 0, table.rows, width))) for width in widths)
    largest = sum(table_bytes(table, Shard(0, 0, 0, -(-table.rows // parts), max(widths))))
    return TableShare(
        name=table.name,
        sharding_type=placement.shown_type,
        kernel=placement.kernel,
        copies=copies,
        shards=len(placement.ranks) // copies,
        bytes=whole,
        largest_shard_bytes=largest,
        seconds=seconds,
        ranks=placement.ranks,
    )


def _add_dense(
    seconds: dict[str, np.ndarray], links: tuple[np.ndarray, np.ndarray], work: DenseWork, plan: Plan
) -> float:
    """Adds the dense part's phases and traffic; returns the seconds of its all-reduce that the backward pass hides."""
    topology, inventory = plan.topology, plan.inventory
    speed = topology.flops_bf16 if inventory.precision == "bf16" else topology.flops_fp32
    speed *= inventory.dense_efficiency
    backward = work.backward_flops / speed
    volume = float(work.parameters * PARAMETER_BYTES)
    if inventory.dense_parallel == "fsdp":
        # An all-reduce is a scatter of gradients and a gather; FSDP scatters once, and gathers weights in both passes.
        sharded = work.parameters - work.replicated_parameters
        volume += sharded * (BYTES[inventory.dense_gathered] - PARAMETER_BYTES / 2)
    reduced, intra, inter = CollectiveCosts(topology).all_reduce(np.array(volume))
    seconds["dense_forward"] += work.forward_flops / speed
    seconds["dense_backward"] += backward
    seconds["gradient_all_reduce"] += reduced
    links[0][:] += intra
    links[1][:] += inter
    return min(float(reduced), backward)
