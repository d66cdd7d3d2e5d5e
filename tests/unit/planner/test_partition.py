"""Tables over cards: the rule, the cap, the bound, the messages."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gr.errors import ServingError
from gr.planner.partition import ServedTable, cut, partition

MEGA = 1_000_000


def table(name: str, megabytes: float, cost: float = 1.0, group: str | None = None) -> ServedTable:
    return ServedTable(name, MEGA, 1, 0.0, megabytes, cost, group)


def names(tables_K) -> list[list[str]]:
    return [[each.name for each in tables] for tables in tables_K]


def test_big_tables_by_size_then_the_rest_by_cost() -> None:
    tables = [table("a", 100, 0), table("b", 90, 0), *(table(f"s{cost}", 0.1, cost) for cost in (5, 4, 3, 2))]
    done = partition(tables, 2, 1000 * MEGA)
    assert names(done.tables_K) == [["a", "s5", "s2"], ["b", "s4", "s3"]]
    assert done.cost_K == (7, 7)
    assert done.cost_over_bound == 1.0


def test_a_group_stays_together_and_counts_as_one() -> None:
    tables = [table("u1", 10, 4, "user"), table("i1", 10, 4), table("u2", 10, 4, "user"), table("i2", 10, 4)]
    done = partition(tables, 2, 1000 * MEGA)
    assert sorted(names(done.tables_K)) == [["i1", "i2"], ["u1", "u2"]]


def test_swaps_balance_what_sizes_left_uneven() -> None:
    done = partition([table("a", 100, 9), table("b", 99, 1), table("c", 98, 1), table("d", 97, 9)], 2, 1000 * MEGA)
    assert done.cost_K == (10, 10)


@given(
    st.lists(
        st.tuples(st.integers(1, 30), st.integers(0, 20), st.sampled_from([None, None, "u"])), min_size=1, max_size=6
    ),
    st.integers(1, 3),
    st.integers(20, 60),
)
def test_every_table_once_under_the_cap_and_not_below_the_bound(rows: list, cards: int, cap: int) -> None:
    tables = [table(f"t{i}", size, cost, group) for i, (size, cost, group) in enumerate(rows)]
    try:
        done = partition(tables, cards, cap * MEGA)
    except ServingError:
        # Packing is a heuristic, but never refuses what a card alone could hold.
        assert sum(size for size, *_ in rows) > cap
        return
    assert sorted(each.name for tables in done.tables_K for each in tables) == sorted(each.name for each in tables)
    assert max(done.bytes_K) <= cap * MEGA
    assert sum(any(each.group for each in tables) for tables in done.tables_K) <= 1
    best = min(_dearest(tables, places, cards, cap * MEGA) for places in product(range(cards), repeat=len(tables)))
    assert done.cost_bound <= best + 1e-9
    assert max(done.cost_K) >= best - 1e-9


def _dearest(tables: list[ServedTable], places: tuple[int, ...], cards: int, cap: float) -> float:
    cost_K, bytes_K = [0.0] * cards, [0.0] * cards
    for each, card in zip(tables, places, strict=True):
        cost_K[card] += each.cost
        bytes_K[card] += each.bytes
    apart = len({card for each, card in zip(tables, places, strict=True) if each.group}) > 1
    return float("inf") if apart or max(bytes_K) > cap else max(cost_K)


def test_tight_packing_where_the_rule_finds_no_room() -> None:
    sizes = [6, 5, 5, 4, 4, 3, 3]
    done = partition([table(f"t{i}", size) for i, size in enumerate(sizes)], 3, 10 * MEGA)
    assert done.bytes_K == (10 * MEGA,) * 3


@pytest.mark.parametrize(
    ("tables", "cards", "message"),
    [
        ([table("big", 12)], 2, r"table big needs 12.0 MB, 2.00 MB more than the 10.0 MB that a card has"),
        (
            [table(f"t{i}", 9) for i in range(3)],
            2,
            r"need 27.0 MB, 7.00 MB more than 2 cards of 10.0 MB.*use 3 or more",
        ),
        (
            [table(f"t{i}", 6) for i in range(3)],
            2,
            r"table t2 needs 6.00 MB, 2.00 MB more than the emptiest of 2 cards",
        ),
        ([table("a", 6, group="user"), table("b", 6, group="user")], 2, "group user of 2 tables .*2.00 MB more"),
        ([table("a", 6)], 0, "at least 1 card"),
    ],
)
def test_what_does_not_fit_is_named_with_how_much(tables: list[ServedTable], cards: int, message: str) -> None:
    with pytest.raises(ServingError, match=message):
        partition(tables, cards, 10 * MEGA)


def test_a_table_larger_than_a_card_is_cut_by_columns() -> None:
    whole = ServedTable("item", 100, 512, 4.0, 1.0, cost=2.0)
    blocks = cut([whole], 100 * (4 + 200))
    assert [(each.first, each.columns) for each in blocks] == [(0, 168), (168, 172), (340, 172)]
    assert sum(each.cost for each in blocks) == pytest.approx(2.0)
    assert all(each.bytes <= 100 * 204 for each in blocks)
    assert [each.shown for each in blocks] == ["item[0:168]", "item[168:340]", "item[340:512]"]
    assert cut([whole], whole.bytes) == [whole]


def test_rows_that_no_card_holds_even_in_the_narrowest_block() -> None:
    with pytest.raises(
        ServingError, match=r"table item with 1,000 rows: 4 of its columns alone need .* more than a card"
    ):
        cut([ServedTable("item", 1000, 512, 4.0, 1.0, 1.0)], 7000)
