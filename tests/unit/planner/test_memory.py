"""Bytes that do not depend on the plan, by hand."""

from dataclasses import replace

import pytest

from gr.config.inventory import GivenDense, InventoryConfig, LossInventory, TableConfig, TowerDense
from gr.config.towers import STUConfig
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


def test_activations_and_logits_are_those_of_the_dense_part():
    inventory = job(dense=STU, loss=LossInventory(scores_per_example=100.0))
    fixed, work = fixed_memory(inventory, machine(2)), dense_work(inventory, 10)
    assert fixed["activations"] == work.activation_bytes > 0
    assert fixed["logits"] == work.logits_bytes == 2 * 4 * 10 * 100


def test_the_reserve_is_the_machines():
    assert fixed_memory(job(), replace(machine(2), reserve_bytes=123))["reserve"] == 123
