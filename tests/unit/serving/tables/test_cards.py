"""Lookups by 1, 2, 3 and 6 processes: equal bits; what does not fit, and a card that ends."""

import os
import signal
import time
from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gr.errors import ServingError
from gr.planner.partition import ServedTable, partition
from gr.serving.tables.cards import Bags, CardGroup, Cards
from tests.support.cards import ROWS, end, fail, open_tables

WIDTHS = {"user_a": 8, "user_b": 4, "c": 16, "d": 4, "e": 12, "f": 8, "g": 4}
USER = ("user_a", "user_b")


def groups_on(cards: int) -> list[list[CardGroup]]:
    """The tables where the partition puts them; those of the user's side are a group of their own."""
    tables = [
        ServedTable(name, ROWS, width, 0.0, 4.0, float(width), "user" if name in USER else None)
        for name, width in WIDTHS.items()
    ]
    sides = []
    for held in partition(tables, cards, 1e6).tables_K:
        user = {table.name: table.columns for table in held if table.name in USER}
        item = {table.name: table.columns for table in held if table.name not in USER}
        sides.append([CardGroup(side, partial(open_tables, side)) for side in (user, item) if side])
    return sides


def bags_of(users: int, examples: int, seed: int = 0) -> dict[str, Bags]:
    draw = torch.Generator().manual_seed(seed)
    bags = {}
    for name in WIDTHS:
        lengths_B = torch.randint(0, 5, (users if name in USER else examples,), generator=draw)
        offsets_B1 = F.pad(lengths_B.cumsum(0), (1, 0)).int()
        bags[name] = Bags(torch.randint(0, ROWS, (int(offsets_B1[-1]),), generator=draw).int(), offsets_B1)
    return bags


def expected(bags: dict[str, Bags]) -> dict[str, Tensor]:
    """Each table alone, in this process."""
    return {
        name: open_tables({name: WIDTHS[name]})(own.ids, own.offsets_B1).half().float() for name, own in bags.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_equal_bits_on_any_number_of_cards(count: int) -> None:
    groups = groups_on(count)
    assert len(groups) == count
    assert sum(any(name in USER for group in card for name in group.widths) for card in groups) == 1
    with Cards(groups, bags=32, ids=2000) as cards:
        for users, examples in ((1, 7), (3, 32), (1, 1), (2, 0)):
            bags = bags_of(users, examples, seed=examples)
            got, right = cards.lookup(bags), expected(bags)
            assert got.keys() == right.keys()
            assert all(torch.equal(got[name], right[name]) for name in right)


@pytest.fixture
def cards() -> Iterator[Cards]:
    with Cards(groups_on(2), bags=8, ids=100) as opened:
        yield opened


@pytest.mark.slow
def test_what_does_not_fit_is_refused_before_anything_is_asked(cards: Cards) -> None:
    with pytest.raises(ServingError, match=r"9 examples in one lookup, and card . has room for 8"):
        cards.lookup(bags_of(1, 9))
    uneven = bags_of(1, 8) | {"d": bags_of(1, 7)["d"]} | {"e": bags_of(1, 7)["e"]}
    with pytest.raises(ServingError, match="different numbers of bags"):
        cards.lookup(uneven)
    many = {name: Bags(own.ids.repeat(9), own.offsets_B1 * 9) for name, own in bags_of(8, 8).items()}
    with pytest.raises(ServingError, match=r"\d+ ids in one lookup, and card . has room for 100"):
        cards.lookup(many)
    bags = bags_of(1, 8)
    assert torch.equal(cards.lookup(bags)["c"], expected(bags)["c"])


@pytest.mark.slow
def test_an_id_outside_its_table_is_said_and_the_card_goes_on(cards: Cards) -> None:
    bags = bags_of(1, 8)
    for name in ("c", "user_a"):  # not of one card
        wrong = bags | {name: Bags(bags[name].ids + ROWS, bags[name].offsets_B1)}
        with pytest.raises(ServingError, match=r"card . cannot look up: .*"):
            cards.lookup(wrong)
        got, right = cards.lookup(bags), expected(bags)
        assert all(torch.equal(got[each], right[each]) for each in right)


@pytest.mark.slow
def test_a_card_that_ends_is_named(cards: Cards) -> None:
    assert cards.running
    os.kill(cards._cards[1].process.pid, signal.SIGKILL)
    while cards.running:  # until the system says so
        time.sleep(0.01)
    with pytest.raises(
        ServingError, match=r"card 1 has ended \(exit code -9\), and its tables with it; open the package"
    ):
        cards.lookup(bags_of(1, 8))


@pytest.mark.slow
def test_a_card_that_cannot_open_its_tables() -> None:
    with pytest.raises(ServingError, match="card 0 cannot open its tables: OSError: no such file"):
        Cards([[CardGroup({"c": 4}, fail)]], bags=8, ids=100)


@pytest.mark.slow
def test_a_card_that_ends_while_it_starts() -> None:
    """As it does where the script that opens a package is imported by its cards, and opens it again."""
    with pytest.raises(ServingError, match=r"card 0 has ended while it started \(exit code 3\).* if __name__ == "):
        Cards([[CardGroup({"c": 4}, end)]], bags=8, ids=100)
