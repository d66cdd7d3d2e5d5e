"""Serving, by hand: bytes, lookups, what travels, the dense part; the configurations of configs/scale."""

import pytest

from gr.config.inventory import InventoryConfig
from gr.errors import ServingError
from gr.planner.estimate_serving import ServedDtype, estimate_serving, smallest_serving
from gr.planner.inventory import load_inventory
from gr.planner.topology import parse_topology
from tests.support import ROOT

T4 = parse_topology("t4x6")


def inventory(*tables: dict, dense: dict | None = None) -> InventoryConfig:
    return InventoryConfig.model_validate(
        {"rank_batch_size": 1, "precision": "fp32", "tables": tables, "dense": dense or {"kind": "given"}}
    )


POOLED = {"name": "pooled", "rows": 1_000_000, "dim": 64, "features": 2, "ids_per_example": 10}
SEQUENCE = {"name": "sequence", "rows": 1_000_000, "dim": 32, "kind": "sequence", "ids_per_example": 5}


@pytest.mark.parametrize(("dtype", "row"), [("fp32", 256), ("fp16", 128), ("int8", 68), ("int4", 36), ("int2", 20)])
def test_bytes_lookups_and_transfers_of_a_batch(dtype: ServedDtype, row: int) -> None:
    given = {"kind": "given", "parameters": 1000, "forward_flops_per_example": 1e6}
    done = estimate_serving(inventory(POOLED, SEQUENCE, dense=given), T4, dtype, cards=2, examples=8)
    (first,), _ = sorted(done.partition.tables_K, key=lambda tables: tables[0].name)
    assert (first.name, first.bytes) == ("pooled", 1e6 * row)
    pooled = next(card for card, tables in enumerate(done.partition.tables_K) if tables[0].name == "pooled")
    assert done.lookup_seconds_K[pooled] == pytest.approx(8 * 10 * row / T4.hbm_bandwidth)
    # Two pooled vectors an example and five of the sequence, fp16.
    assert done.sent_bytes_K[pooled] == 8 * 2 * 64 * 2
    assert done.sent_bytes_K[1 - pooled] == 8 * 5 * 32 * 2
    assert done.transfer_seconds == pytest.approx(8 * 2 * 64 * 2 / T4.intra_bandwidth + T4.intra_latency)
    assert done.dense_seconds == pytest.approx(8e6 / (T4.flops_fp32 * 0.5))
    assert done.dense_bytes == 4000
    assert done.cap_bytes == T4.hbm_bytes - T4.reserve_bytes - 4000


def test_nothing_travels_on_one_card_and_tables_of_the_user_stay_together() -> None:
    tables = [{**POOLED, "name": name} for name in "abcd"]
    assert estimate_serving(inventory(*tables), T4, "int8", cards=1, examples=8).transfer_seconds == 0
    done = estimate_serving(inventory(*tables), T4, "int8", cards=3, examples=8, user_tables=("a", "d"))
    assert ["a", "d"] in [[table.name for table in held] for held in done.partition.tables_K]


def test_a_dense_part_larger_than_a_card_is_refused() -> None:
    given = {"kind": "given", "parameters": 10**10}
    with pytest.raises(ServingError, match=r"dense part needs 40.0 GB on every card, 26.0 GB more than t4"):
        estimate_serving(inventory(POOLED, dense=given), T4, "int8", cards=2, examples=8)


def scale(name: str) -> InventoryConfig:
    return load_inventory(ROOT / "configs/scale" / f"{name}.yaml")


def test_dlrm_v2_in_int8_on_six_cards_of_16_gb() -> None:
    done = estimate_serving(scale("dlrm-v2-criteo"), T4, "int8", cards=6, examples=64)
    assert sum(done.partition.bytes_K) == 204_184_588 * (128 + 4)
    assert max(done.partition.bytes_K) < 14e9
    assert done.partition.cost_over_bound < 1.05
    # Two of the five largest tables, 5.28 GB each, fill a card.
    assert smallest_serving(scale("dlrm-v2-criteo"), T4, "int8", examples=64)[0] == 3


def test_dlrm_v3_has_a_table_that_is_cut() -> None:
    cards, done = smallest_serving(scale("dlrm-v3-mlperf"), parse_topology("h100"), "fp16", examples=64)
    assert cards == 15
    assert sum(done.partition.bytes_K) == pytest.approx(1.0342e12, rel=1e-4)
    blocks = [table for held in done.partition.tables_K for table in held if table.name == "item_id"]
    assert len(blocks) == 15 and sum(block.columns for block in blocks) == 512
