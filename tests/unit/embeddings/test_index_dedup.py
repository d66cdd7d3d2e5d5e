"""The distinct ids of tables, as fbgemm's operator for CUDA has them. Training with it: tests/distributed."""

import torch

from gr.embeddings.index_dedup import unique_indices

# Tables of 7, 5 and 4 rows; the first is read by two features, the last by one.
TABLE_STARTS = torch.tensor([0, 0, 7, 12, 16])
FEATURE_STARTS = torch.tensor([0, 2, 2, 3, 4])


def offsets_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def test_the_features_of_a_table_share_its_distinct_ids() -> None:
    """Two bags a feature; ids of other tables are others, and a table may be read by nobody."""
    ids = torch.tensor([6, 6, 1, 1, 2, 4, 4])
    lengths, offsets, distinct, places = unique_indices(
        TABLE_STARTS, FEATURE_STARTS, offsets_of([2, 1, 0, 2, 0, 0, 1, 1]), ids
    )
    assert torch.equal(distinct[places], ids)
    assert sorted(distinct[:3].tolist()) == [1, 2, 6] and distinct[3:].tolist() == [4]
    assert lengths.tolist() == [1, 1, 1, 0, 0, 0, 1, 0]
    assert torch.equal(offsets, offsets_of(lengths.tolist()))


def test_no_ids_at_all() -> None:
    lengths, offsets, distinct, places = unique_indices(
        TABLE_STARTS, FEATURE_STARTS, offsets_of([0] * 4), torch.tensor([], dtype=torch.int64)
    )
    assert not len(distinct) and not len(places) and not lengths.any() and not offsets.any()
