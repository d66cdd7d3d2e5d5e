"""Plans written by hand: one placement for each table, on a small machine."""

from collections.abc import Sequence

from gr.config.inventory import InventoryConfig, TableConfig
from gr.planner.placement import Placement, Plan
from gr.planner.topology import Topology


def machine(ranks: int, ranks_per_host: int | None = None, device: str = "cpu") -> Topology:
    """Round figures: a hand-made plan is not costed."""
    return Topology(
        name="by hand",
        device=device,
        ranks=ranks,
        ranks_per_host=ranks_per_host or ranks,
        hbm_bytes=10**10,
        host_bytes=10**10,
        hbm_bandwidth=1e10,
        host_bandwidth=1e10,
        flops_bf16=1e11,
        flops_fp32=1e11,
        peak_bf16=1e11,
        peak_fp32=1e11,
        intra_bandwidth=1e9,
        inter_bandwidth=1e9,
        intra_latency=1e-5,
        inter_latency=1e-5,
        reserve_bytes=0,
    )


def hand_made(tables: Sequence[TableConfig], placements: Sequence[Placement], topology: Topology) -> Plan:
    inventory = InventoryConfig(name="by hand", rank_batch_size=8, tables=tuple(tables))
    return Plan(inventory, topology, tuple(placements), bound_seconds=0.0)
