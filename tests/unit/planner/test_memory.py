"""Bytes that do not depend on the plan, by hand."""

from dataclasses import replace

import pytest

from gr.config.inventory import GivenDense, InventoryConfig, LossInventory, TableConfig, TowerDense
from gr.config.towers import LlamaConfig, STUConfig
from gr.planner.estimate import MEMORY
from gr.planner.estimate_dense import dense_work
from gr.planner.memory import fixed_memory
from tests.support.plans import machine

POOLED = TableConfig(name="pooled", rows=100, dim=8, features=2, ids_per_example=3.0)
SEQUENCE = TableConfig(name="sequence", rows=100, dim=4, kind="sequence", ids_per_example=20.0, ids_per_step=50.0)
TOWER = STUConfig(layers=4, heads=1, qk_dim=8, v_dim=8)
STU = TowerDense(tower=TOWER, dim=8, mean_length=20.0, max_length=32)


def job(**fields: object) -> InventoryConfig:
    given = {"rank_batch_size": 10, "tables": (POOLED, SEQUENCE), "dense": GivenDense(parameters=1000)} | fields
    return InventoryConfig.model_validate(given)


def test_kinds_are_those_of_an_estimate():
    assert set(fixed_memory(job(), machine(2))) == set(MEMORY) - {"tables", "table_optimizer", "table_gradients"}


def test_a_rank_keeps_the_ids_and_vectors_of_its_own_examples():
    fixed = fixed_memory(job(), machine(2))
    # 3 ids of 10 examples, 20 ids of 10 examples and 50 a step; twice: as read and as sent.
    assert fixed["inputs"] == 2 * (30 + 200 + 50) * 8
    # One vector a pooled feature, one an id of a sequence, and their gradients, in fp32.
    assert fixed["embeddings"] == 2 * (2 * 10 * 8 + 250 * 4) * 4


def test_a_rank_has_its_part_of_a_global_batch():
    whole, part = (fixed_memory(job(rank_batch_size=None, global_batch_size=20), machine(n)) for n in (1, 2))
    assert whole["inputs"] - 2 * 50 * 8 == 2 * (part["inputs"] - 2 * 50 * 8)


@pytest.mark.parametrize(("optimizer", "states"), [("adamw", 8000), ("adagrad", 4000), ("sgd", 0)])
def test_ddp_has_everything_on_every_rank(optimizer, states):
    for ranks in (1, 8):
        fixed = fixed_memory(job(dense_optimizer=optimizer), machine(ranks))
        assert (fixed["dense_parameters"], fixed["dense_gradients"], fixed["dense_optimizer"]) == (4000, 4000, states)


def test_fsdp_has_its_shards_and_two_layers_gathered():
    inventory = job(dense=STU, dense_parallel="fsdp")
    whole = 4 * dense_work(inventory, 10).parameters
    fixed = fixed_memory(inventory, machine(8))
    assert fixed["dense_parameters"] == whole / 8 + 2 * whole / 4
    assert fixed["dense_gradients"] == whole / 8
    assert fixed["dense_optimizer"] == 2 * whole / 8


def test_fsdp_shares_all_but_what_is_replicated_and_tensor_ranks_share_matrices():
    """What ranks have when they run is compared in tests/distributed/test_dense_strategies.py."""
    dense = TowerDense(
        tower=LlamaConfig(layers=4),
        dim=16,
        mean_length=8,
        max_length=8,
        other_parameters=1000,
        replicated_parameters=600,
    )
    matrices, tower = 4 * (4 * 16 * 16 + 3 * 16 * 128), 4 * (4 * 16 * 16 + 3 * 16 * 128 + 32) + 16
    inventory = job(dense=dense, dense_parallel="fsdp", tensor_parallel=2, dense_gathered="bf16")
    fixed, split = fixed_memory(inventory, machine(8)), tower - matrices / 2
    assert fixed["dense_gradients"] == 4 * (split / 4 + 400 / 8 + 600)
    assert fixed["dense_parameters"] == fixed["dense_gradients"] + 2 * split / 2 + 4 * 400
    alone = fixed_memory(job(dense=dense, tensor_parallel=2), machine(2))
    assert alone["dense_optimizer"] == 2 * 4 * (split + 1000)


def test_layers_that_are_computed_again_are_not_kept():
    kept, again = (dense_work(job(dense=STU, activation_checkpointing=each), 10) for each in ("none", "layer"))
    assert again.activation_bytes < kept.activation_bytes
    assert again.backward_flops == kept.backward_flops + kept.forward_flops


def test_activations_and_logits_are_those_of_the_dense_part():
    inventory = job(dense=STU, loss=LossInventory(scores_per_example=100.0))
    fixed, work = fixed_memory(inventory, machine(2)), dense_work(inventory, 10)
    assert fixed["activations"] == work.activation_bytes > 0
    assert fixed["logits"] == work.logits_bytes == 2 * 4 * 10 * 100


def test_the_reserve_is_the_machines():
    assert fixed_memory(job(), replace(machine(2), reserve_bytes=123))["reserve"] == 123
