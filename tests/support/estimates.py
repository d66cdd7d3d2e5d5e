"""Made-up estimates: random costs of any number of tables and ranks, for tests of the reports."""

import numpy as np

from gr.config.inventory import SEQUENCE_TYPES, SHARDING_TYPES, GivenDense, InventoryConfig, Kernel, TableConfig
from gr.planner.estimate import MEMORY, PHASES, Estimate, TableShare
from gr.planner.estimate_tables import TABLE_PHASES
from gr.planner.placement import Placement, Plan
from gr.planner.topology import Topology

GB = 1e9
# Mean over ranks in GB, and how far ranks differ.
MEMORY_GB = {
    "tables": (31.0, 0.15),
    "table_optimizer": (1.2, 0.2),
    "table_gradients": (0.6, 0.2),
    "inputs": (0.05, 0.1),
    "embeddings": (2.2, 0.1),
    "dense_parameters": (1.4, 0.0),
    "dense_gradients": (1.4, 0.0),
    "dense_optimizer": (2.8, 0.0),
    "activations": (9.0, 0.0),
    "logits": (3.1, 0.0),
    "reserve": (4.0, 0.0),
}
# Mean over ranks in milliseconds, how far ranks differ, and what is hidden.
PHASE_MS = {
    "input_all_to_all": (0.6, 0.05, 0.4),
    "lookup": (3.1, 0.15, 0.0),
    "output_all_to_all": (4.2, 0.1, 0.0),
    "dense_forward": (12.0, 0.0, 0.0),
    "weight_all_gather": (1.5, 0.0, 1.0),
    "tensor_all_reduce": (0.5, 0.0, 0.0),
    "dense_backward": (24.0, 0.0, 0.0),
    "gradient_all_to_all": (4.1, 0.1, 0.0),
    "update": (5.3, 0.15, 0.0),
    "table_all_reduce": (0.8, 0.0, 0.0),
    "gradient_all_reduce": (6.0, 0.0, 4.5),
    "group_sync": (0.7, 0.1, 0.0),
}


def table_seconds(seconds_PR: np.ndarray) -> np.ndarray:
    return seconds_PR[[PHASES.index(phase) for phase in TABLE_PHASES]].sum(axis=0)


def topology_of(ranks: int, hbm_gb: float = 80.0) -> Topology:
    return Topology(
        name=f"h100x{ranks}",
        device="cuda",
        ranks=ranks,
        ranks_per_host=min(8, ranks),
        hbm_bytes=int(hbm_gb * GB),
        host_bytes=int(192 * GB),
        hbm_bandwidth=2.7e12,
        host_bandwidth=45e9,
        flops_bf16=600e12,
        flops_fp32=40e12,
        peak_bf16=1000e12,
        peak_fp32=67e12,
        intra_bandwidth=350e9,
        inter_bandwidth=45e9,
        intra_latency=5e-6,
        inter_latency=1e-5,
        reserve_bytes=int(4 * GB),
    )


def placed(table: TableConfig, ranks: int, random: np.random.Generator) -> Placement:
    choice = SHARDING_TYPES if table.kind == "pooled" else SEQUENCE_TYPES
    odds = np.r_[0.05, 0.6, np.full(len(choice) - 2, 0.35 / (len(choice) - 2))]
    sharding_type = choice[int(random.choice(len(choice), p=odds))]
    on, column_shards = tuple(range(ranks)), 1
    if sharding_type == "table_wise":
        on = (int(random.integers(ranks)),)
    elif sharding_type == "column_wise":
        column_shards = min(4, ranks)
        on = tuple(int(rank) for rank in random.choice(ranks, column_shards, replace=False))
    elif sharding_type in ("table_row_wise", "table_column_wise"):
        host = int(random.integers(max(1, ranks // 8))) * 8
        on = tuple(range(host, host + min(8, ranks)))
        column_shards = len(on) if sharding_type == "table_column_wise" else 1
    kernel: Kernel = "dense" if sharding_type == "data_parallel" else "fused"
    return Placement(table.name, sharding_type, kernel, on, table.dim // column_shards if column_shards > 1 else None)


def around(mean: float, spread: float, ranks: int, random: np.random.Generator) -> np.ndarray:
    return mean * np.maximum(0.2, 1 + spread * random.standard_normal(ranks))


def estimate_of(
    ranks: int, tables: int, *, hbm_gb: float = 80.0, names: tuple[str, ...] = (), seed: int = 0
) -> Estimate:
    """`names` are those of the first tables."""
    random = np.random.default_rng(seed)
    rows_T = np.maximum(3, random.lognormal(14, 2.5, tables)).astype(int)
    configs = tuple(
        TableConfig(
            name=names[index] if index < len(names) else f"{'item' if index % 10 == 3 else 'feature'}_{index:04d}",
            rows=int(rows),
            dim=int(random.choice([32, 64, 128, 256])),
            kind="sequence" if index % 7 == 0 else "pooled",
        )
        for index, rows in enumerate(rows_T)
    )
    inventory = InventoryConfig(
        name="hstu-made-up",
        rank_batch_size=512,
        tables=configs,
        dense=GivenDense(parameters=350_000_000),
    )
    placements = tuple(placed(table, ranks, random) for table in configs)
    seconds_PR = 1e-3 * np.stack([around(*PHASE_MS[phase][:2], ranks, random) for phase in PHASES])
    memory_MR = np.round(GB * np.stack([around(*MEMORY_GB[kind], ranks, random) for kind in MEMORY]))
    bound = float(table_seconds(seconds_PR).mean())
    return Estimate(
        plan=Plan(inventory, topology_of(ranks, hbm_gb), placements, bound),
        seconds_PR=seconds_PR,
        hidden_P=np.array([PHASE_MS[phase][2] for phase in PHASES]) * 1e-3,
        memory_MR=memory_MR,
        host_R=np.zeros(ranks),
        intra_bytes_R=np.round(0.4 * GB * random.uniform(0.8, 1.3, ranks)),
        inter_bytes_R=np.round(0.9 * GB * random.uniform(0.8, 1.3, ranks)) if ranks > 8 else np.zeros(ranks),
        tables=tuple(share_of(table, placement, random) for table, placement in zip(configs, placements, strict=True)),
        flops=8.2e12,
        tokens=512 * 600.0,
    )


def share_of(table: TableConfig, placement: Placement, random: np.random.Generator) -> TableShare:
    total = table.rows * (table.dim + 1) * 4
    shards = len(placement.ranks)
    copies = shards if placement.sharding_type == "data_parallel" else 1
    return TableShare(
        name=table.name,
        sharding_type=placement.shown_type,
        kernel=placement.kernel,
        copies=copies,
        shards=shards // copies,
        bytes=total,
        largest_shard_bytes=total * copies // shards,
        seconds=float(1e-5 + random.lognormal(-8, 1)),
        ranks=placement.ranks,
    )
