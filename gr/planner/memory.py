"""What a rank holds whatever the plan: dense part, activations, the vectors its own examples got, the reserve."""

import numpy as np

from gr.config.inventory import InventoryConfig
from gr.planner.cost import ID_BYTES, OUTPUT_BYTES
from gr.planner.dense import dense_work
from gr.planner.topology import Topology

PARAMETER_BYTES = 4  # fp32 weights and gradients; bf16 is autocast
# A step's ids, before and after their exchange; on a GPU also those of two later steps, and of one after its exchange.
BATCHES_OF_IDS = {"cpu": 2, "cuda": 5}
DENSE_STATES = {"adam": 2, "adagrad": 1, "sgd": 0}


def fixed_memory(inventory: InventoryConfig, topology: Topology) -> dict[str, float]:
    """Bytes of each kind (evaluate.MEMORY) on every rank, apart from the table shards."""
    batch = inventory.batch_on(topology.ranks)
    work = dense_work(inventory, batch)
    weights = float(work.parameters * PARAMETER_BYTES)
    states = weights * DENSE_STATES[inventory.dense_optimizer]
    gathered = 0.0
    if inventory.dense_parallel == "fsdp":
        # Shards of everything, and two layers gathered at a time: one in use, one on its way.
        gathered = weights * min(1.0, 2 / getattr(inventory.dense, "layers", 1))
        weights, states = weights / topology.ranks, states / topology.ranks
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
