"""The collectives of the dense part under ddp, fsdp and tensor parallelism: how many, of how many bytes.

What is counted is what gr/parallel/dense.py and gr/parallel/tensor.py do in a forward and a backward pass. DDP averages
gradients in buckets. FSDP2 gathers each layer before its forward and again before its backward pass, and scatters its
gradients. Tensor parallelism joins the tokens of a group, and sums what its ranks have computed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from gr.config.inventory import InventoryConfig, TowerDense
from gr.planner.estimate_dense import BYTES, DenseWork, dense_work
from gr.planner.estimate_tables import CollectiveCosts
from gr.planner.topology import Topology

GRADIENT_BYTES = 4
BUCKET_BYTES = 25 << 20  # of DDP
JOINED = 2  # all-gathers of tokens: in front of a split tower, and of gradients behind it
SUMS_OF_A_LAYER = 2, 5  # forward: attention and feed-forward; backward: the inputs of q, k, v, and of gate and up
DENSE_COLLECTIVES = "weight_all_gather", "tensor_all_reduce", "gradient_all_reduce"  # phases of estimate.PHASES


@dataclass(frozen=True)
class Collectives:
    """The collectives of a rank and step in one phase of estimate.PHASES. beside: the phase beside which they run."""

    phase: str
    count: int
    seconds: float
    intra_bytes: float
    inter_bytes: float
    beside: str | None


def dense_collectives(inventory: InventoryConfig, topology: Topology) -> list[Collectives]:
    """The collectives of the dense part's forward and backward pass, without a few numbers that ranks agree on.

    The heads, which FSDP2 shards one by one, are counted as one.
    """
    if topology.ranks == 1:
        return []
    work = dense_work(inventory, inventory.batch_on(topology.ranks))
    return [*_of_data(inventory, topology, work), *_of_tensor(inventory, topology, work)]


def _of_data(inventory: InventoryConfig, topology: Topology, work: DenseWork) -> Iterator[Collectives]:
    split = inventory.tensor_parallel
    across = _axis(topology, topology.ranks // split, max(1, topology.ranks_per_host // split))
    tower = work.tower_parameters - work.matrix_parameters * (1 - 1 / split)
    heads = work.parameters - work.tower_parameters - work.replicated_parameters
    if inventory.dense_parallel == "ddp":
        # Where the tower is split, its group is all ranks, and its matrices have no copies to average with.
        copied = float(work.parameters if split == 1 else work.parameters - work.matrix_parameters)
        yield _reduced(topology, copied)
        return
    pieces = _pieces(inventory), int(heads > 0)
    gathered = tower * BYTES[inventory.dense_gathered]
    for phase, beside in (("weight_all_gather", "dense_forward"), ("gradient_all_reduce", "dense_backward")):
        yield _scattered(across, phase, pieces[0], gathered, beside)
        yield _scattered(topology, phase, pieces[1], heads * GRADIENT_BYTES, beside)
    yield _scattered(across, "gradient_all_reduce", pieces[0], tower * GRADIENT_BYTES, "dense_backward")
    yield _scattered(topology, "gradient_all_reduce", pieces[1], heads * GRADIENT_BYTES, "dense_backward")
    yield _reduced(topology, float(work.replicated_parameters))


def _of_tensor(inventory: InventoryConfig, topology: Topology, work: DenseWork) -> Iterator[Collectives]:
    """Nothing is computed beside these: a layer's matrices wait for the sum of what goes into them."""
    split = inventory.tensor_parallel
    if split == 1 or not isinstance(inventory.dense, TowerDense):
        return
    group = _axis(topology, split, min(split, topology.ranks_per_host))
    tokens = split * work.tokens
    sums, element = sum(SUMS_OF_A_LAYER) * _layers(inventory), BYTES[inventory.precision]
    # Tokens are joined in fp32, and so are the gradients of what each rank takes out behind the tower.
    joined = tokens * inventory.dense.dim * GRADIENT_BYTES
    yield _scattered(group, "tensor_all_reduce", JOINED, JOINED * joined, None)
    yield _scattered(group, "tensor_all_reduce", sums, 2 * sums * tokens * inventory.dense.dim * element, None)


def _axis(topology: Topology, ranks: int, ranks_per_host: int) -> Topology:
    return replace(topology, ranks=ranks, ranks_per_host=min(ranks, ranks_per_host))


def _layers(inventory: InventoryConfig) -> int:
    return inventory.dense.tower.layers if isinstance(inventory.dense, TowerDense) else 0


def _pieces(inventory: InventoryConfig) -> int:
    """The gathers of FSDP2 in one forward pass of a tower: one for each layer, and one for what is beside layers."""
    if not isinstance(inventory.dense, TowerDense):
        return 0
    dense = inventory.dense
    doubled = dense.tower.model_copy(update={"layers": 2 * dense.tower.layers})
    once, twice = (tower.cost(dense.dim, dense.max_length, 4).parameters for tower in (dense.tower, doubled))
    return dense.tower.layers + (2 * once > twice)


def _reduced(topology: Topology, parameters: float) -> Collectives:
    buckets = ceil(parameters * GRADIENT_BYTES / BUCKET_BYTES)
    return _scattered(topology, "gradient_all_reduce", buckets, 2 * parameters * GRADIENT_BYTES, "dense_backward")


def _scattered(topology: Topology, phase: str, count: int, bytes_: float, beside: str | None) -> Collectives:
    """Gathers, scatters, or sums of half as many bytes, over the ranks of `topology`. bytes_: of all that are whole."""
    if topology.ranks == 1 or not count:
        return Collectives(phase, 0, 0.0, 0.0, 0.0, beside)
    seconds, intra, inter = CollectiveCosts(topology).reduce_scatter(np.array(bytes_))
    return Collectives(phase, count, float(seconds), float(intra), float(inter), beside)
