"""Documents packed into examples: every token with the one that follows it, once, at any number of ranks."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from gr.batch import TokenBatch
from gr.data.loader import ResumableLoader
from gr.data.text import TextDataset, TextPass
from gr.errors import ConfigError, DataError
from gr.schema import TextSchema
from tests.support.text import VOCABULARY, write_text

N = 8
DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18], [], [19, 20], [21, 22, 1, 2, 3, 4, 5]]


def opened(folder: Path) -> TextDataset:
    return TextDataset.open(folder, TextSchema.load(folder))


def batches(data: TextDataset, size: int, ranks: int = 1, **more: object) -> list[list[TokenBatch]]:
    """The batches of each rank."""
    options = {"global_batch_size": size, "max_length": N, "world_size": ranks, **more}
    by_rank = []
    for rank in range(ranks):
        with ResumableLoader(TextPass(data, rank=rank, **options)) as loader:  # type: ignore[arg-type]
            by_rank.append(list(loader))
    return by_rank


def places(batch: TokenBatch) -> list[tuple[int, int]]:
    return list(zip(batch.ids_T.tolist(), batch.target_ids_T.tolist(), strict=True))


def test_every_token_comes_once_with_the_one_that_follows_it(tmp_path: Path) -> None:
    data = opened(write_text(tmp_path / "data", DOCUMENTS))
    (own,) = batches(data, 1, drop_last=False)
    assert [place for batch in own for place in places(batch)] == [
        pair for document in DOCUMENTS for pair in pairwise(document)
    ]
    # 2 places of the first document, 6 of the third; then its other 7, and the only one of the fifth; then the last's.
    assert [batch.offsets_B1.tolist() for batch in own] == [[0, 2, 8], [0, 7, 8], [0, 6]]


def test_a_batch_is_cut_where_examples_end(tmp_path: Path) -> None:
    data = opened(write_text(tmp_path / "data", DOCUMENTS))
    ((batch,),) = batches(data, 2)
    assert batch.offsets_B1.tolist() == [0, 2, 8, 15, 16]


def test_what_is_of_a_prompt_is_not_scored(tmp_path: Path) -> None:
    data = opened(write_text(tmp_path / "data", DOCUMENTS, prompts=[2, 0, 5, 0, 0, 7]))
    (own,) = batches(data, 3, drop_last=False)
    scored = [pair for pair, kept in zip(places(own[0]), own[0].scored_T.tolist(), strict=True) if kept]
    assert scored == [(2, 3), *pairwise(DOCUMENTS[2][4:]), (19, 20)]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_batches_of_one(tmp_path: Path, ranks: int) -> None:
    random = np.random.default_rng(0)
    documents = [random.integers(0, VOCABULARY, size).tolist() for size in random.integers(0, 30, 40)]
    data = opened(write_text(tmp_path / "data", documents))
    (alone,) = batches(data, 4, shuffle_seed=3, epochs=2)
    shared = batches(data, 4, ranks, shuffle_seed=3, epochs=2)
    assert len(alone) > 8
    for whole, *parts in zip(alone, *shared, strict=True):
        assert places(whole) == [place for part in parts for place in places(part)]
        assert sum(part.offsets_B1.numel() - 1 for part in parts) == whole.offsets_B1.numel() - 1
    assert {place for batch in alone[: len(alone) // 2] for place in places(batch)} != set()
    assert [places(batch) for batch in alone[: len(alone) // 2]] != [
        places(batch) for batch in alone[len(alone) // 2 :]
    ]


def test_a_pass_goes_on_where_its_state_was_saved(tmp_path: Path) -> None:
    data = opened(write_text(tmp_path / "data", DOCUMENTS * 5))
    (whole,) = batches(data, 2, shuffle_seed=1)
    with ResumableLoader(
        TextPass(data, global_batch_size=2, max_length=N, rank=0, world_size=1, shuffle_seed=1)
    ) as loader:
        next(loader), next(loader)
        state = loader.state_dict()
    with ResumableLoader(
        TextPass(data, global_batch_size=2, max_length=N, rank=0, world_size=1, shuffle_seed=1)
    ) as loader:
        loader.load_state_dict(state)
        for batch, expected in zip(loader, whole[2:], strict=True):
            assert torch.equal(batch.ids_T, expected.ids_T)


def test_faults_are_one_line(tmp_path: Path) -> None:
    folder = write_text(tmp_path / "data", [[1, 2], [3, VOCABULARY]])
    with pytest.raises(DataError, match=r"row 1, column tokens: is 23, allowed are ids from 0 to 22"):
        opened(folder).read_row_group(0)
    table = pq.read_table(folder / "part-00000.parquet")
    pq.write_table(table.set_column(1, "length", [[2, 3]]), folder / "part-00000.parquet")
    with pytest.raises(DataError, match=r"the column length adds up to 5, schema.json says tokens=4"):
        opened(folder)
    pq.write_table(table.set_column(1, "length", [[1, 3]]), folder / "part-00000.parquet")
    with pytest.raises(DataError, match="row 0: has another number of tokens than column length says"):
        opened(folder).read_row_group(0)
    with pytest.raises(ConfigError, match="2 tokens that another follows do not fill one batch of 1 examples of 8"):
        batches(opened(folder), 1)
