"""The cost of a shard of a table: bytes of memory, bytes on the links, seconds in each phase of a step.

Seconds are bytes over bandwidth, plus a latency for each collective but the all-reduces. Every cost is linear in two
shares of a shard, so a whole option is costed without listing its shards: the share of the table's rows that the shard
holds, and the share of the table's ids that it receives. Ids follow Zipf's law over rows in no particular order; the
most read row is on one shard. Functions are vectorised over tables or over shards.

B examples a rank, R ranks, G = B R examples a step, L ranks a host, H hosts.
"""

from dataclasses import dataclass, fields
from typing import Self, TypeVar

import numpy as np

from gr.config.inventory import INT8_BLOCK, ROW_TYPES, CommDtype, InventoryConfig, TableConfig
from gr.planner.id_distribution import distinct_rows, hottest_share, miss_rate
from gr.planner.placement import Shard
from gr.planner.topology import Topology

Counts = TypeVar("Counts", int, np.ndarray)  # of one topology or, as an array, of many
ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
SCALE_BYTES = 8  # of a block of int8: its scale and its least value
COMM_BYTES = {**ELEMENT_BYTES, "int8": 1 + SCALE_BYTES / INT8_BLOCK}
ID_BYTES = 8
LENGTH_BYTES = 4
OUTPUT_BYTES = 4  # fbgemm returns embeddings, and takes their gradients, in fp32
STATE_BYTES = 4  # optimizer states are fp32; state_dtype is that of those of an element
ID_TABLE_BYTES = 16  # a row, at most (gr.ops.id_table); it lies on the host, and is counted where the row does
SLOT_BYTES = 4  # fbgemm's cache has a slot number for every row of the table
# A repeated row is read from the L2 cache, at about twice the bandwidth of HBM (assumed).
REPEAT_COST = 0.5
# Memory is read in sectors, so a narrow row costs as much as a sector.
SECTOR_BYTES = 32
# The backward pass sorts the ids of a batch: a radix sort of 64-bit ids reads and writes id and position four times.
SORT_BYTES = 4 * 2 * (ID_BYTES + 4)
# Each peer adds one message, posted and matched, to the latency of an all-to-all (assumed).
MESSAGE_SECONDS = 0.2e-6
# All-to-alls a group of equally sharded tables adds: lengths, ids, embeddings, gradients.
GROUP_COLLECTIVES = 4


def optimizer_states(table: TableConfig) -> tuple[int, int]:
    """The states of a table, with those of dynamic ids: (numbers for each element, numbers for each row)."""
    of_ids = ID_TABLE_BYTES // STATE_BYTES if table.ids == "dynamic" else 0
    states_a = table.optimizer_config.states_a
    return states_a("element"), states_a("row") + of_ids


def table_bytes(table: TableConfig, shard: Shard) -> tuple[int, int]:
    """Bytes of one shard: (weights, optimizer states)."""
    per_element, per_row = optimizer_states(table)
    states = per_element * shard.columns * ELEMENT_BYTES[table.state_dtype] + per_row * STATE_BYTES
    return shard.rows * shard.columns * ELEMENT_BYTES[table.dtype], shard.rows * states


def synced_bytes(table: TableConfig, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Bytes of shards of rows x columns that groups average, which they do in fp32: weights and optimizer states."""
    per_element, per_row = optimizer_states(table)
    return rows * (columns * (1 + per_element) + per_row) * STATE_BYTES


@dataclass(frozen=True)
class ShardMemory:
    """Bytes of HBM, by kind, and of host memory, of each shard in an array of shards."""

    tables: np.ndarray
    table_optimizer: np.ndarray
    table_gradients: np.ndarray
    inputs: np.ndarray
    embeddings: np.ndarray
    host: np.ndarray

    @property
    def hbm(self) -> np.ndarray:
        return np.sum(np.broadcast_arrays(*(getattr(self, kind) for kind in TABLE_MEMORY)), axis=0)


@dataclass(frozen=True)
class ShardCosts(ShardMemory):
    """Seconds, bytes of memory and bytes sent, of each shard in an array of shards."""

    input_all_to_all: np.ndarray
    lookup: np.ndarray
    output_all_to_all: np.ndarray
    gradient_all_to_all: np.ndarray
    update: np.ndarray
    table_all_reduce: np.ndarray
    intra_bytes: np.ndarray
    inter_bytes: np.ndarray
    # That a shard takes from and gives to all ranks, itself among them.
    id_bytes: np.ndarray
    vector_bytes: np.ndarray
    gradient_bytes: np.ndarray

    @property
    def seconds(self) -> np.ndarray:
        return np.sum([getattr(self, phase) for phase in TABLE_PHASES], axis=0)

    def broadcast(self, count: int) -> "ShardCosts":
        """The same, with every array of length `count`."""
        return ShardCosts(**{f.name: np.broadcast_to(getattr(self, f.name), (count,)) for f in fields(self)})


TABLE_PHASES = ("input_all_to_all", "lookup", "output_all_to_all", "gradient_all_to_all", "update", "table_all_reduce")
TABLE_MEMORY = ("tables", "table_optimizer", "table_gradients", "inputs", "embeddings")


@dataclass(frozen=True)
class Volume:
    """The ids and vectors that each table takes in a step: arrays over tables [T], or scalars of one table.

    ids: ids that reach the owners of the table, over all ranks. own_ids: of one rank's examples, which a replicated
    table serves. outputs: vectors that the owners return. hottest: share of the ids that read the most read row.
    column_state_bytes, row_state_bytes: of the optimizer's states for an element, and for a row. hosted: the former are
    in host memory.
    """

    rows: np.ndarray
    dim: np.ndarray
    element_bytes: np.ndarray
    column_state_bytes: np.ndarray
    row_state_bytes: np.ndarray
    hosted: np.ndarray
    pooled: np.ndarray
    cache_load_factor: np.ndarray
    lengths: np.ndarray
    ids: np.ndarray
    own_ids: np.ndarray
    outputs: np.ndarray
    own_outputs: np.ndarray
    hottest: np.ndarray

    def __getitem__(self, tables: np.ndarray | int | None) -> Self:
        return type(self)(**{field.name: getattr(self, field.name)[..., tables] for field in fields(self)})


@dataclass(frozen=True)
class Traffic(Volume):
    """The lookups of each table in a step. distinct: rows among `ids`, own_distinct: among `own_ids`.

    missed: share of the ids that misses the cache of fused_uvm_caching.
    """

    distinct: np.ndarray
    own_distinct: np.ndarray
    missed: np.ndarray


def _column(inventory: InventoryConfig, name: str) -> np.ndarray:
    return np.array([getattr(table, name) for table in inventory.tables])


def volume(inventory: InventoryConfig, ranks: Counts) -> Volume:
    """The volume of every table of `inventory`, in its order, in one of its groups.

    ranks: of the whole job: a number, or a column [N, 1]: N at once.
    """
    batch, ranks = inventory.batch_on(ranks), ranks // inventory.groups
    rows, skew = _column(inventory, "rows").astype(float), _column(inventory, "skew").astype(float)
    pooled, features = _column(inventory, "kind") == "pooled", _column(inventory, "features")
    drawn, of_step = _column(inventory, "ids_per_example") * batch, _column(inventory, "ids_per_step")
    own_ids = drawn + of_step
    hottest = hottest_share(rows, skew)
    # TorchRec's index dedup of sequence tables: a rank sends the id of a row once. One rank sends none.
    if inventory.index_dedup:
        own_ids = np.where(~pooled & (np.asarray(ranks) > 1), distinct_rows(rows, drawn, of_step, skew), own_ids)
        hottest = np.where(pooled, hottest, np.minimum(hottest, 1 / own_ids))
    own_outputs = np.where(pooled, features * batch, own_ids)
    per_element, per_row = np.array([optimizer_states(table) for table in inventory.tables]).reshape(-1, 2).T
    return Volume(
        rows=rows,
        dim=_column(inventory, "dim"),
        element_bytes=np.array([ELEMENT_BYTES[table.dtype] for table in inventory.tables]),
        column_state_bytes=per_element * np.array([ELEMENT_BYTES[table.state_dtype] for table in inventory.tables]),
        row_state_bytes=per_row * STATE_BYTES,
        hosted=_column(inventory, "state") == "host",
        pooled=pooled,
        cache_load_factor=_column(inventory, "cache_load_factor").astype(float),
        lengths=features * batch * ranks,
        ids=own_ids * ranks,
        own_ids=own_ids,
        outputs=own_outputs * ranks,
        own_outputs=own_outputs,
        hottest=hottest,
    )


def traffic(inventory: InventoryConfig, topology: Topology) -> Traffic:
    """The traffic of every table of `inventory`, in its order."""
    ranks, own = topology.ranks, volume(inventory, topology.ranks)
    rows, skew = own.rows, _column(inventory, "skew").astype(float)
    drawn, of_step = (
        _column(inventory, "ids_per_example") * inventory.batch_on(ranks),
        _column(inventory, "ids_per_step"),
    )
    cacheability = _column(inventory, "cacheability").astype(float)
    return Traffic(
        **vars(own),
        distinct=distinct_rows(rows, drawn * ranks, of_step, skew),
        own_distinct=distinct_rows(rows, drawn, of_step, skew),
        missed=miss_rate(rows, skew, own.cache_load_factor, cacheability),
    )


@dataclass(frozen=True)
class CollectiveCosts:
    """The cost of each collective on a topology, as (seconds, bytes sent within the host, bytes sent to other hosts).

    bytes_: what each rank puts in.
    """

    topology: Topology

    def all_to_all(self, bytes_: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every rank gets an equal part of every other rank's bytes."""
        t = self.topology
        intra = bytes_ * ((t.ranks_per_host - 1) / t.ranks)
        inter = bytes_ * ((t.ranks - t.ranks_per_host) / t.ranks)
        return np.maximum(intra / t.intra_bandwidth, inter / t.inter_bandwidth), intra, inter

    def reduce_scatter(self, bytes_: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A reduce-scatter over all ranks, in rings that cross between hosts on every network card of a host."""
        t = self.topology
        sent = bytes_ * ((t.ranks - 1) / t.ranks)
        inter = sent / t.ranks_per_host if t.hosts > 1 else 0 * sent
        return np.maximum(sent / t.intra_bandwidth, inter / t.inter_bandwidth), sent - inter, inter

    def host_reduce_scatter(self, bytes_: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A reduce-scatter within the host, then an all-to-all of its result between equal local ranks of all hosts."""
        t = self.topology
        intra = bytes_ * ((t.ranks_per_host - 1) / t.ranks_per_host)
        inter = bytes_ / t.ranks_per_host * ((t.hosts - 1) / t.hosts)
        return intra / t.intra_bandwidth + inter / t.inter_bandwidth, intra, inter

    def all_reduce(self, bytes_: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        seconds, intra, inter = self.reduce_scatter(bytes_)
        return 2 * seconds, 2 * intra, 2 * inter

    def group_seconds(self) -> float:
        """The latency in seconds that one more group of equally sharded tables adds to a step."""
        t = self.topology
        if t.ranks == 1:
            return 0.0
        first = t.inter_latency if t.hosts > 1 else t.intra_latency
        return GROUP_COLLECTIVES * (first + MESSAGE_SECONDS * (t.ranks - 1))


def shard_costs(
    traffic: Traffic,
    topology: Topology,
    comm: CommDtype,
    sharding_type: str,
    kernel: str,
    shares: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> ShardCosts:
    """Costs of shards with shares = (columns, share of the rows, share of the ids)."""
    if sharding_type == "data_parallel":
        return _replica_costs(traffic, topology)
    columns, row_share, id_share = shares
    t, collectives = traffic, CollectiveCosts(topology)
    memory, vectors = shard_memory(t, sharding_type, kernel, shares), _vectors(t, sharding_type, id_share)
    ids = t.ids * id_share * ID_BYTES + t.lengths * LENGTH_BYTES
    returned, sent_back = (vectors * columns * COMM_BYTES[dtype] for dtype in (comm.forward, comm.backward))
    received = collectives.all_to_all(ids)
    output, gradient = (_exchange(t, collectives, sharding_type, bytes_) for bytes_ in (returned, sent_back))
    lookup, update = _kernel_costs(t, topology, kernel, (columns, id_share, t.distinct * row_share, vectors))
    return ShardCosts(
        **vars(memory),
        input_all_to_all=received[0],
        lookup=lookup,
        output_all_to_all=output[0],
        gradient_all_to_all=gradient[0],
        update=update,
        table_all_reduce=0 * memory.tables,
        intra_bytes=received[1] + output[1] + gradient[1],
        inter_bytes=received[2] + output[2] + gradient[2],
        id_bytes=ids,
        vector_bytes=returned,
        gradient_bytes=sent_back,
    )


def _exchange(
    t: Traffic, collectives: CollectiveCosts, sharding_type: str, sent: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cost of returning vectors, or of sending their gradients back the same way. sent: bytes of each rank."""
    if sharding_type not in ROW_TYPES:
        return collectives.all_to_all(sent)
    if sharding_type != "row_wise":
        return collectives.host_reduce_scatter(sent)
    flat, scattered = collectives.all_to_all(sent), collectives.reduce_scatter(sent)
    seconds, intra, inter = (np.where(t.pooled, a, b) for a, b in zip(scattered, flat, strict=True))
    return seconds, intra, inter


def shard_memory(
    volume: Volume, sharding_type: str, kernel: str, shares: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> ShardMemory:
    """Memory of shards with shares as for shard_costs, which need not be those of one topology."""
    if sharding_type == "data_parallel":
        return _replica_memory(volume)
    columns, row_share, id_share = shares
    v, rows, vectors = volume, volume.rows * row_share, _vectors(volume, sharding_type, id_share)
    weights = rows * columns * v.element_bytes
    column_states, row_states = rows * v.column_state_bytes * columns, rows * v.row_state_bytes
    zero = 0 * weights
    # fbgemm keeps states of a row on the device and states of every element with the weights, or on the host under
    # uvm_non_rowwise_momentum; its cache has a slot number for every row.
    offloaded = kernel in ("fused_uvm", "fused_uvm_caching")
    states_at_host = np.where(v.hosted | offloaded, column_states, 0.0)
    cached = weights * v.cache_load_factor + rows * SLOT_BYTES
    return ShardMemory(
        tables={"fused_uvm": zero, "fused_uvm_caching": cached}.get(kernel, weights),
        table_optimizer=row_states + column_states - states_at_host,
        # The dense kernel keeps the gradient of every id until the step's update.
        table_gradients=v.ids * id_share * columns * OUTPUT_BYTES if kernel == "dense" else zero,
        inputs=2 * (v.ids * id_share) * ID_BYTES + v.lengths * LENGTH_BYTES,
        embeddings=2 * vectors * columns * OUTPUT_BYTES,
        host=(weights if offloaded else zero) + states_at_host,
    )


def _vectors(volume: Volume, sharding_type: str, id_share: np.ndarray) -> np.ndarray:
    """Vectors that a shard returns: a row shard of a pooled table, a partial sum for every example."""
    whole = volume.pooled & (sharding_type in ROW_TYPES)
    return np.where(whole, volume.outputs, volume.outputs * id_share)


def _kernel_costs(
    t: Traffic, topology: Topology, kernel: str, load: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of (lookup, update). load: columns, share of the ids, distinct rows and vectors returned, of a shard."""
    columns, id_share, distinct, vectors = load
    ids = t.ids * id_share
    row_bytes = np.ceil(columns * t.element_bytes / SECTOR_BYTES) * SECTOR_BYTES
    column_bytes, state_bytes = t.column_state_bytes * columns, t.row_state_bytes
    near = topology.hbm_bandwidth
    # Repeats are counted over the whole table, so that the cost of a shard stays linear in its shares.
    repeats = np.maximum(t.ids - t.distinct, 0) * id_share * row_bytes * REPEAT_COST
    written = vectors * columns * OUTPUT_BYTES
    # The host link carries rows that no cache holds, and the states of their elements.
    far = {"fused_uvm": np.ones_like(distinct), "fused_uvm_caching": t.missed}.get(kernel, np.zeros_like(distinct))
    far_states = t.hosted | (kernel in ("fused_uvm", "fused_uvm_caching"))
    link = topology.host_bandwidth
    lookup = (ids * ID_BYTES + repeats + written + distinct * row_bytes * (1 - far)) / near
    lookup = lookup + distinct * row_bytes * far / link
    at_host = 2 * distinct * (row_bytes * far + column_bytes * far_states)
    in_hbm = 2 * distinct * (row_bytes + column_bytes + state_bytes) - at_host
    update = (ids * (SORT_BYTES + columns * OUTPUT_BYTES) + in_hbm) / near + at_host / link
    return lookup, update


def _replica_memory(v: Volume) -> ShardMemory:
    """Memory of a copy of a data-parallel table: all of it, its dense gradient, one rank's ids and vectors."""
    weights = v.rows * v.dim * v.element_bytes
    return ShardMemory(
        tables=weights,
        table_optimizer=v.rows * (v.column_state_bytes * v.dim + v.row_state_bytes),
        table_gradients=v.rows * v.dim * OUTPUT_BYTES,
        inputs=2 * v.own_ids * ID_BYTES,
        embeddings=2 * v.own_outputs * v.dim * OUTPUT_BYTES,
        host=0 * weights,
    )


def _replica_costs(t: Traffic, topology: Topology) -> ShardCosts:
    """Costs of a data-parallel table: whole on every rank, its dense gradient reduced over all of them."""
    memory = _replica_memory(t)
    gradients, vectors = memory.table_gradients, memory.embeddings / 2
    near = topology.hbm_bandwidth
    repeats = np.maximum(t.own_ids - t.own_distinct, 0) * REPEAT_COST
    reads = (t.own_distinct + repeats) * t.dim * t.element_bytes
    seconds, intra, inter = CollectiveCosts(topology).all_reduce(gradients)
    zero = 0 * memory.tables
    written = (memory.tables + memory.table_optimizer) * np.minimum(t.distinct / t.rows, 1)
    return ShardCosts(
        **vars(memory),
        input_all_to_all=zero,
        lookup=(t.own_ids * ID_BYTES + reads + vectors) / near,
        output_all_to_all=zero,
        gradient_all_to_all=zero,
        # The gradient is zeroed, scattered into and averaged, every row; weights and states are read and written of
        # the rows that any rank looked up.
        update=(t.own_ids * SORT_BYTES + vectors + 3 * gradients + 2 * written) / near,
        table_all_reduce=seconds,
        intra_bytes=intra,
        inter_bytes=inter,
        id_bytes=zero,
        vector_bytes=zero,
        gradient_bytes=zero,
    )
