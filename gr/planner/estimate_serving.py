"""The resources that serve a model: bytes by card, a batch's latency, the smallest number of cards. It knows no torch.

An estimate from published or measured figures of the topology: lookups read rows at the memory's bandwidth; each card
sends the vectors that were asked for, in fp16, to the card that runs the dense part; that card computes. Queues, kernel
launches and the work of the host are not in it.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

from gr.config.inventory import InventoryConfig, LossInventory
from gr.errors import ServingError
from gr.planner.estimate_dense import dense_work
from gr.planner.memory import PARAMETER_BYTES
from gr.planner.partition import Partition, ServedTable, cut, partition
from gr.planner.topology import Topology
from gr.units import size

ServedDtype = Literal["fp32", "fp16", "int8", "int4", "int2"]
SERVED_DTYPES: tuple[ServedDtype, ...] = get_args(ServedDtype)
# Bytes of a row's scale and bias (fp16 both), and of one of its columns: fbgemm's n-bit rows.
ROW_BYTES: dict[ServedDtype, tuple[float, float]] = {
    "fp32": (0.0, 4.0),
    "fp16": (0.0, 2.0),
    "int8": (4.0, 1.0),
    "int4": (4.0, 0.5),
    "int2": (4.0, 0.25),
}
SENT_BYTES = 2.0  # of an element on its way between cards, in fp16
MOST_CARDS = 4096


@dataclass(frozen=True)
class ServingEstimate:
    """cap_bytes: what a card has for tables, beside the reserve and the dense part, which is on every card.

    Seconds are of one batch: the dearest card's lookups, what then travels, the dense part.
    """

    partition: Partition
    cap_bytes: float
    dense_bytes: float
    lookup_seconds_K: tuple[float, ...]
    sent_bytes_K: tuple[float, ...]
    transfer_seconds: float
    dense_seconds: float

    @property
    def latency_seconds(self) -> float:
        return max(self.lookup_seconds_K) + self.transfer_seconds + self.dense_seconds


def estimate_serving(
    inventory: InventoryConfig,
    topology: Topology,
    dtype: ServedDtype,
    *,
    cards: int,
    examples: int,
    user_tables: Collection[str] = (),
) -> ServingEstimate:
    """The model on `cards` cards like the topology's ranks. user_tables stay on one card. examples: of a batch.

    A table larger than a card is cut by columns. Raises ServingError where it does not fit, with the table and by how
    much.
    """
    work = dense_work(inventory.model_copy(update={"loss": LossInventory()}), examples)
    dense_bytes = float(work.parameters * PARAMETER_BYTES)
    cap_bytes = topology.hbm_bytes - topology.reserve_bytes - dense_bytes
    if cap_bytes <= 0:
        raise ServingError(
            f"the dense part needs {size(dense_bytes)} on every card, {size(-cap_bytes)} more than "
            f"{topology.name} has beside its reserve"
        )
    near = cards <= topology.ranks_per_host
    bandwidth = topology.intra_bandwidth if near else topology.inter_bandwidth
    latency = topology.intra_latency if near else topology.inter_latency
    reads = {table.name: table.ids_per_example * examples for table in inventory.tables}
    # Pooled vectors travel once a feature and example, those of sequences once an id.
    vectors = {
        table.name: reads[table.name] if table.kind == "sequence" else float(table.features * examples)
        for table in inventory.tables
    }
    fixed, column = ROW_BYTES[dtype]
    tables = [
        ServedTable(
            table.name,
            table.rows,
            table.dim,
            fixed,
            column,
            reads[table.name] * (fixed + column * table.dim) / topology.hbm_bandwidth
            + vectors[table.name] * table.dim * SENT_BYTES / bandwidth,
            "user" if table.name in user_tables else None,
        )
        for table in inventory.tables
    ]
    done = partition(cut(tables, cap_bytes), cards, cap_bytes)
    sent_K = tuple(sum(vectors[part.name] * part.columns * SENT_BYTES for part in held) for held in done.tables_K)
    read_K = [sum(reads[part.name] * part.bytes / part.rows for part in held) for held in done.tables_K]
    rate = topology.flops_bf16 if inventory.precision == "bf16" else topology.flops_fp32
    return ServingEstimate(
        partition=done,
        cap_bytes=cap_bytes,
        dense_bytes=dense_bytes,
        lookup_seconds_K=tuple(read / topology.hbm_bandwidth for read in read_K),
        sent_bytes_K=sent_K,
        # The card that computes has its own vectors, so it is the one that would send most.
        transfer_seconds=(sum(sent_K) - max(sent_K)) / bandwidth + latency if cards > 1 else 0.0,
        dense_seconds=work.forward_flops / (rate * inventory.dense_efficiency),
    )


def smallest_serving(
    inventory: InventoryConfig,
    topology: Topology,
    dtype: ServedDtype,
    *,
    examples: int,
    user_tables: Collection[str] = (),
) -> tuple[int, ServingEstimate]:
    """The smallest number of cards that the model is found to fit on, and its estimate. Raises ServingError."""
    cards = 1
    while True:
        try:
            done = estimate_serving(inventory, topology, dtype, cards=cards, examples=examples, user_tables=user_tables)
            return cards, done
        except ServingError:
            if cards == MOST_CARDS:
                raise
        cards += 1
