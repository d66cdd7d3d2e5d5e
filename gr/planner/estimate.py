"""The estimate of a plan: memory by kind, seconds by phase and bytes by link, for every rank."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from gr.config.inventory import InventoryConfig, TableConfig
from gr.planner.dense_collectives import dense_collectives
from gr.planner.enumerate import hottest_part
from gr.planner.estimate_dense import dense_work
from gr.planner.estimate_tables import (
    TABLE_MEMORY,
    TABLE_PHASES,
    CollectiveCosts,
    ShardCosts,
    Traffic,
    shard_costs,
    synced_bytes,
    table_bytes,
    traffic,
)
from gr.planner.groups import copies, one_group
from gr.planner.memory import fixed_memory
from gr.planner.placement import Placement, Plan, Shard, column_blocks
from gr.planner.topology import Topology

# The phases are in the order of a step. A collective ends when the slowest rank has come to it.
PHASES = (
    "input_all_to_all",
    "lookup",
    "output_all_to_all",
    "dense_forward",
    "weight_all_gather",  # of fsdp, for the forward pass
    "tensor_all_reduce",  # of tensor parallelism, in both passes
    "dense_backward",
    "gradient_all_to_all",
    "update",
    "table_all_reduce",
    "gradient_all_reduce",  # under fsdp, gathers for the backward pass and scatters of gradients
    "group_sync",
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
    """The predicted cost of a plan. P phases (PHASES), M kinds of memory (MEMORY), R ranks: of a group, as all are."""

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
    _, group = one_group(inventory, topology)
    ranks = group.ranks
    seconds = {phase: np.zeros(ranks) for phase in PHASES}
    memory = {kind: np.zeros(ranks) for kind in MEMORY}
    host, intra, inter = np.zeros(ranks), np.zeros(ranks), np.zeros(ranks)
    shares = []
    for table, placement, costs in zip(inventory.tables, plan.placements, table_costs(plan), strict=True):
        index_R = np.array(placement.ranks)
        for phase in TABLE_PHASES:
            np.add.at(seconds[phase], index_R, getattr(costs, phase))
        for kind in TABLE_MEMORY:
            np.add.at(memory[kind], index_R, getattr(costs, kind))
        for total, name in ((host, "host"), (intra, "intra_bytes"), (inter, "inter_bytes")):
            np.add.at(total, index_R, getattr(costs, name))
        shares.append(_share(table, placement, costs))
    types = {p.sharding_type for p in plan.placements} - {"data_parallel"}
    for phase, share in _LATENCY_SHARES.items():
        seconds[phase] += share * len(types) * CollectiveCosts(group).group_seconds()
    for kind, size in fixed_memory(inventory, topology).items():
        memory[kind] += size
    work = dense_work(inventory, inventory.batch_on(topology.ranks))
    hidden = _add_dense(seconds, (intra, inter), plan)
    if inventory.groups > 1:
        # Weights and states are averaged in fp32, whatever they are stored in.
        held = np.zeros(ranks)
        for table, placement in zip(inventory.tables, plan.placements, strict=True):
            if placement.sharding_type != "data_parallel":
                np.add.at(held, np.array(placement.ranks), synced_bytes(table, *_rectangles(table, placement)))
        averaged = CollectiveCosts(copies(inventory, topology)).all_reduce(held / inventory.sync_interval)
        for total, each in zip((seconds["group_sync"], intra, inter), averaged, strict=True):
            total += each
    return Estimate(
        plan=plan,
        seconds_PR=np.stack([seconds[phase] for phase in PHASES]),
        hidden_P=np.array([hidden.get(phase, 0.0) for phase in PHASES]),
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


def table_costs(plan: Plan) -> Iterator[ShardCosts]:
    """Costs of every shard of each table, in the order of its ranks."""
    own, group = one_group(plan.inventory, plan.topology)
    sharded = replicated = (traffic(own, group), group)
    if plan.inventory.groups > 1:  # the gradients of a replicated table are those of all ranks
        replicated = (traffic(plan.inventory, plan.topology), plan.topology)
    for index, (table, placement) in enumerate(zip(own.tables, plan.placements, strict=True)):
        traffic_T, topology = replicated if placement.sharding_type == "data_parallel" else sharded
        yield placement_costs(traffic_T[index], table, placement, own, topology)


def placement_costs(
    table_traffic: Traffic, table: TableConfig, placement: Placement, inventory: InventoryConfig, topology: Topology
) -> ShardCosts:
    """Costs of every shard of one table, in the order of its ranks. table_traffic: of this table alone."""
    count = len(placement.ranks)
    rows, columns = _rectangles(table, placement)
    row_share, id_share = rows / table.rows, np.ones(count)
    blocks = len(column_blocks(table.dim, placement.column_width))
    parts = 1 if placement.sharding_type == "data_parallel" else count // blocks
    if parts > 1:
        hottest = np.tile(np.arange(parts) == hottest_part(table, parts), blocks)
        id_share = row_share * (1 - table_traffic.hottest) + hottest * table_traffic.hottest
    costs = shard_costs(
        table_traffic,
        topology,
        inventory.comm_dtype,
        placement.sharding_type,
        placement.kernel,
        (columns, row_share, id_share),
    )
    return costs.broadcast(count)


def _rectangles(table: TableConfig, placement: Placement) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) of the shards of a placement, as placement.shards() lists them."""
    count, widths = len(placement.ranks), column_blocks(table.dim, placement.column_width)
    if placement.sharding_type == "data_parallel":
        return np.full(count, table.rows), np.full(count, table.dim)
    parts = count // len(widths)
    height = -(-table.rows // parts)
    rows = np.clip(table.rows - height * np.arange(parts), 0, height)
    return np.tile(rows, len(widths)), np.repeat(widths, parts)


def _share(table: TableConfig, placement: Placement, costs: ShardCosts) -> TableShare:
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
        seconds=float(costs.seconds.max()),
        ranks=placement.ranks,
    )


def _add_dense(seconds: dict[str, np.ndarray], links: tuple[np.ndarray, np.ndarray], plan: Plan) -> dict[str, float]:
    """Adds the dense part's phases and traffic; returns the seconds of each phase that run beside another one."""
    topology, inventory = plan.topology, plan.inventory
    work = dense_work(inventory, inventory.batch_on(topology.ranks))
    speed = topology.flops_bf16 if inventory.precision == "bf16" else topology.flops_fp32
    speed *= inventory.dense_efficiency
    computed = {"dense_forward": work.forward_flops / speed, "dense_backward": work.backward_flops / speed}
    for phase, each in computed.items():
        seconds[phase] += each
    beside, hidden = dict[str, float](), dict[str, float]()
    for collectives in dense_collectives(inventory, topology):
        seconds[collectives.phase] += collectives.seconds
        links[0][:] += collectives.intra_bytes
        links[1][:] += collectives.inter_bytes
        if collectives.beside is not None:
            beside[collectives.phase] = computed[collectives.beside]
    for phase, each in beside.items():
        hidden[phase] = min(float(seconds[phase].max()), each)
    return hidden
