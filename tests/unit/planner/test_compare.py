"""Bytes that move from one plan to another, by hand."""

import pytest

from gr.config.inventory import TableConfig
from gr.planner.compare import Change, compare
from gr.planner.estimate import estimate
from gr.planner.placement import Placement
from tests.support.plans import hand_made, machine

# Weights of 4 bytes; row-wise Adagrad has 4 bytes a row.
TABLE = TableConfig(name="t", rows=10, dim=16)
OTHER = TableConfig(name="u", rows=10, dim=16)
ROW, WHOLE = 16 * 4 + 4, 10 * (16 * 4 + 4)
TWO = machine(2)


def placed(sharding_type: str, *ranks: int, name: str = "t", width: int | None = None) -> Placement:
    kernel = "dense" if sharding_type == "data_parallel" else "fused"
    return Placement(name, sharding_type, kernel, ranks, width)


def moved(before: Placement, after: Placement) -> int:
    return compare(hand_made([TABLE], [before], TWO), hand_made([TABLE], [after], TWO)).moved_bytes


def test_equal_plans_differ_in_nothing():
    plan = hand_made([TABLE, OTHER], [placed("table_wise", 0), placed("row_wise", 0, 1, name="u")], TWO)
    comparison = compare(plan, plan)
    assert comparison.changes == () and comparison.moved_bytes == 0 and comparison.others == ()
    assert comparison.step_seconds[0] == comparison.step_seconds[1] == estimate(plan).step_seconds
    assert comparison.hbm_bytes[0] == comparison.hbm_bytes[1] == estimate(plan).total_memory_R.max()


def test_only_the_table_that_changed_is_named():
    stays = placed("table_wise", 0, name="u")
    before, after = placed("table_wise", 0), placed("table_wise", 1)
    comparison = compare(
        hand_made([TABLE, OTHER], [before, stays], TWO), hand_made([TABLE, OTHER], [after, stays], TWO)
    )
    assert comparison.changes == (Change("t", before, after, WHOLE),)
    assert comparison.moved_bytes == WHOLE
    assert comparison.step_seconds[1] < comparison.step_seconds[0] and comparison.hbm_bytes[1] < comparison.hbm_bytes[0]


@pytest.mark.parametrize(
    ("before", "after", "bytes_"),
    [
        (placed("table_wise", 0), placed("table_wise", 0), 0),
        (placed("table_wise", 0), placed("table_wise", 1), WHOLE),
        (placed("table_wise", 0), placed("row_wise", 0, 1), 5 * ROW),
        (placed("row_wise", 0, 1), placed("table_wise", 0), 5 * ROW),
        # Each block of 10 x 8, with a state a row, was held in half.
        (placed("row_wise", 0, 1), placed("column_wise", 0, 1, width=8), 10 * (8 * 4 + 4)),
        (placed("column_wise", 0, 1, width=8), placed("column_wise", 1, 0, width=8), 2 * 10 * (8 * 4 + 4)),
        # Every rank had it, and now one keeps it.
        (placed("data_parallel", 0, 1), placed("table_wise", 1), 0),
        (placed("table_wise", 1), placed("data_parallel", 0, 1), WHOLE),
        (placed("table_wise", 0), placed("column_wise", 0, width=16), 0),
    ],
)
def test_what_was_not_on_its_rank_moves(before, after, bytes_):
    assert moved(before, after) == bytes_


def test_a_new_table_is_filled_and_a_removed_one_is_gone():
    own, other = placed("table_wise", 0), placed("table_wise", 1, name="u")
    comparison = compare(hand_made([TABLE], [own], TWO), hand_made([OTHER], [other], TWO))
    assert set(comparison.changes) == {Change("t", own, None, 0), Change("u", None, other, 0)}
    assert (comparison.new, comparison.gone, comparison.moved) == (1, 1, 0)
    ((what, before, after),) = comparison.others
    assert what == "model" and "t of 10 x 16" in before and "u of 10 x 16" in after
    assert comparison.moved_bytes == 0


def test_rows_that_are_new_are_counted_with_the_moved():
    """A table of other size is another table: what its ranks did not hold has to get there."""
    longer = TABLE.model_copy(update={"rows": 12})
    before, after = (hand_made([table], [placed("table_wise", 0)], TWO) for table in (TABLE, longer))
    assert compare(before, after).moved_bytes == 2 * ROW
    assert len(compare(before, after).changes) == 1


def test_plans_of_other_ranks():
    four = hand_made([TABLE], [placed("row_wise", 0, 1, 2, 3)], machine(4))
    two = hand_made([TABLE], [placed("row_wise", 0, 1)], TWO)
    # Rows 0-4, 5-9 become 0-2, 3-5, 6-8, 9: rank 0 has its rows, rank 1 has row 5, ranks 2 and 3 have none of theirs.
    assert compare(two, four).moved_bytes == (2 + 3 + 1) * ROW
    comparison = compare(two, four)
    assert [what for what, _, _ in comparison.others] == ["topology"]
    assert (comparison.new, comparison.gone, comparison.moved) == (0, 0, 1)


def test_better_known_ids_move_nothing():
    known = TABLE.model_copy(update={"skew": 1.2})
    before, after = (hand_made([table], [placed("table_wise", 0)], TWO) for table in (TABLE, known))
    assert compare(before, after).changes == ()
