"""How the dense part may lie on the ranks: ddp, fsdp, or fsdp with tensor parallelism, compared."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from gr.config.inventory import InventoryConfig, TowerDense
from gr.planner.dense_collectives import dense_collectives
from gr.planner.estimate import Estimate, estimate
from gr.planner.estimate_dense import dense_work
from gr.planner.memory import PARAMETER_BYTES
from gr.planner.topology import Topology

COMPARED = 0.05  # of a rank's memory: where weights and gradients take less under ddp, no other strategy is looked at
TENSOR_PARALLEL = 2, 4, 8


@dataclass(frozen=True)
class Compared:
    """A plan's tables under one strategy. sent_bytes: of a rank and step, by the dense part."""

    inventory: InventoryConfig
    estimate: Estimate
    collectives: int
    sent_bytes: float


def compare_strategies(estimated: Estimate) -> list[Compared]:
    """The plan of `estimated` under each strategy that its dense part could have, its own first.

    Where layers whose activations are kept do not fit, they are computed again.
    """
    plan = estimated.plan
    rows = []
    for inventory in strategies(plan.inventory, plan.topology):
        if not inventory.dense_lies_on(plan.topology.ranks):
            continue
        for tried in with_layers_again(inventory):
            of_strategy = estimate(replace(plan, inventory=tried))
            collectives = dense_collectives(tried, plan.topology)
            sent = sum(each.intra_bytes + each.inter_bytes for each in collectives)
            row = Compared(tried, of_strategy, sum(each.count for each in collectives), sent)
            if of_strategy.fits:
                break
        rows.append(row)
    return rows


def strategies(inventory: InventoryConfig, topology: Topology) -> list[InventoryConfig]:
    """`inventory` and what else its dense part could have on hosts of `topology`; none where the dense part is small.

    Tensor parallelism stays within a host, and divides what it splits.
    """
    parameters = dense_work(inventory, 1).parameters
    if 2 * PARAMETER_BYTES * parameters < COMPARED * topology.hbm_bytes:
        return []
    changes: list[dict[str, Any]] = [{"dense_parallel": "ddp", "tensor_parallel": 1, "dense_gathered": "fp32"}]
    sizes = inventory.dense.tower.tensor_parallel_sizes.values() if isinstance(inventory.dense, TowerDense) else ()
    splits = [split for split in TENSOR_PARALLEL if sizes and not any(size % split for size in sizes)]
    for split in (1, *splits):
        if topology.ranks_per_host % split == 0:
            changes.append({"dense_parallel": "fsdp", "tensor_parallel": split, "dense_gathered": inventory.precision})
    others = [inventory.model_copy(update=change) for change in changes]
    return [inventory, *(other for other in others if other != inventory)]


def with_layers_again(inventory: InventoryConfig) -> Iterator[InventoryConfig]:
    """`inventory`, and then the same with each layer of its tower computed again in the backward pass."""
    yield inventory
    if isinstance(inventory.dense, TowerDense) and inventory.activation_checkpointing == "none":
        yield inventory.model_copy(update={"activation_checkpointing": "layer"})


def changed_keys(before: InventoryConfig, after: InventoryConfig) -> str:
    """The overrides that turn one strategy into another, such as dense.strategy=fsdp dense.gathered=bf16."""
    return " ".join(
        f"dense.{key}={getattr(after, field)}"
        for key, field in _KEYS.items()
        if getattr(after, field) != getattr(before, field)
    )


def strategy_words(inventory: InventoryConfig) -> tuple[str, str]:
    """The strategy and what becomes of a layer's activations, in a word or two each: ("fsdp+tp 2", "kept")."""
    split = f"+tp {inventory.tensor_parallel}" if inventory.tensor_parallel > 1 else ""
    return inventory.dense_parallel + split, "again" if inventory.activation_checkpointing == "layer" else "kept"


_KEYS = {
    "strategy": "dense_parallel",
    "tensor_parallel": "tensor_parallel",
    "gathered": "dense_gathered",
    "activation_checkpointing": "activation_checkpointing",
}
