"""Row-wise states on their way to other column blocks."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from gr.embeddings.state import TableEntry

ROWS = 5


def entry(widths: tuple[int, ...], rows: tuple[int, ...] = (0, ROWS)) -> TableEntry:
    """The state of a table cut into blocks of `widths`, and at `rows`; all on this rank."""
    shards, column = [], 0
    for block, width in enumerate(widths):
        for first, last in pairwise(rows):
            place = SimpleNamespace(row_offset=first, column_offset=column, column_widths=widths, column_block=block)
            shards.append((place, torch.full((last - first,), torch.nan)))
        column += width
    return TableEntry("t.sum", True, widths, torch.empty(0), tuple(shards))


@pytest.mark.parametrize("before", [(16,), (12, 4), (4, 12), (8, 8), (4, 4, 4, 4)], ids=str)
@pytest.mark.parametrize("after", [(16,), (12, 4), (8, 8), (4, 4, 4, 4)], ids=str)
def test_a_state_is_the_mean_over_the_columns_it_is_of(before: tuple[int, ...], after: tuple[int, ...]) -> None:
    """Mean squares by row of each column: known for the blocks before, and spread evenly over the columns of each."""
    saved = torch.rand(ROWS, len(before), generator=torch.Generator().manual_seed(0))
    by_column = saved.repeat_interleave(torch.tensor(before), 1)
    here = entry(after, rows=(0, 2, ROWS, ROWS))
    here.fill_rowwise(saved, before)
    for shard, state in here.shards:
        first = shard.column_offset
        columns = by_column[:, first : first + after[shard.column_block]]
        expected = columns.mean(1)[shard.row_offset : shard.row_offset + len(state)]
        assert torch.allclose(state, expected, atol=1e-6)


def test_joined_blocks_have_exactly_the_state_of_the_whole() -> None:
    """A mean of squares over 16 columns, and over 12 and 4 of them."""
    squares = torch.rand(ROWS, 16, generator=torch.Generator().manual_seed(1))
    saved = torch.stack([squares[:, :12].mean(1), squares[:, 12:].mean(1)], 1)
    here = entry((16,))
    here.fill_rowwise(saved, (12, 4))
    assert torch.allclose(here.shards[0][1], squares.mean(1), atol=1e-6)
