"""Memory of a rank that no plan changes: dense part, activations, vectors of its own examples, the reserve."""

from typing import cast

import numpy as np

from gr.config.inventory import InventoryConfig, TowerDense
from gr.config.optim import DENSE_OPTIMIZERS, DenseOptimizerConfig
from gr.planner.estimate_dense import BYTES, dense_work
from gr.planner.estimate_tables import ID_BYTES, OUTPUT_BYTES
from gr.planner.topology import Topology

PARAMETER_BYTES = 4  # fp32 weights and gradients; bf16 is autocast
# Copies of a step's ids: before and after their exchange; on a GPU also two later steps before and one after it.
BATCHES_OF_IDS = {"cpu": 2, "cuda": 5}


def fixed_memory(inventory: InventoryConfig, topology: Topology) -> dict[str, float]:
    """Bytes of each kind of memory (estimate.MEMORY) on every rank, apart from the table shards."""
    batch = inventory.batch_on(topology.ranks)
    work = dense_work(inventory, batch)
    optimizer = cast(type[DenseOptimizerConfig], DENSE_OPTIMIZERS.config(inventory.dense_optimizer))
    tensor, gathered = inventory.tensor_parallel, 0.0
    tower = work.tower_parameters - work.matrix_parameters * (1 - 1 / tensor)
    heads = float(work.parameters - work.tower_parameters - work.replicated_parameters)
    if inventory.dense_parallel == "fsdp":
        # Two layers are gathered at a time: one in use, one on its way.
        layers = inventory.dense.tower.layers if isinstance(inventory.dense, TowerDense) else 1
        gathered = tower * BYTES[inventory.dense_gathered] * min(1.0, 2 / layers) + heads * PARAMETER_BYTES
        tower, heads = tower * tensor / topology.ranks, heads / topology.ranks
    weights = PARAMETER_BYTES * (tower + heads + work.replicated_parameters)
    states = weights * optimizer.states_a_parameter()
    tables = inventory.tables
    read = np.array([table.ids_per_example * batch + table.ids_per_step for table in tables])
    pooled = np.array([table.kind == "pooled" for table in tables])
    vectors = np.where(pooled, np.array([table.features * batch for table in tables]), read)
    dims = np.array([table.dim for table in tables])
    return {
        "inputs": float(BATCHES_OF_IDS[topology.device] * read.sum() * ID_BYTES),
        "embeddings": float(2 * (vectors * dims).sum() * OUTPUT_BYTES),
        "dense_parameters": weights + gathered,
        # DDP's buckets are the gradients (gradient_as_bucket_view), so they are counted once.
        "dense_gradients": weights,
        "dense_optimizer": states,
        "activations": work.activation_bytes,
        "logits": work.logits_bytes,
        "reserve": float(topology.reserve_bytes),
    }
