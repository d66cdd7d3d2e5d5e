"""The exact index, against the definition: all scores, sorted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gr.errors import ServingError
from gr.serving.index import exact
from gr.serving.index.exact import ExactIndex, Seen


def definition(ids_E: Tensor, items_ED: Tensor, queries_BD: Tensor, k: int, seen: Seen | None) -> list[list]:
    """(score, id) of each query's k best, by a sort of all."""
    answers = []
    for query, scores_E in enumerate((queries_BD @ items_ED.T).tolist()):
        hidden = set()
        if seen is not None:
            first, last = seen.offsets_B1[query : query + 2].tolist()
            hidden = set(seen.ids_S[first:last].tolist())
        pairs = sorted((-score, id_) for score, id_ in zip(scores_E, ids_E.tolist(), strict=True) if id_ not in hidden)
        padded = [(-score, id_) for score, id_ in pairs[:k]]
        answers.append(padded + [(-torch.inf, 0)] * (k - len(padded)))
    return answers


def whole(generator: torch.Generator, *shape: int, largest: int = 2) -> Tensor:
    """Small whole numbers: their products are exact in every order of summation, and many are equal."""
    return torch.randint(-largest, largest + 1, shape, generator=generator).float()


@given(
    seed=st.integers(0, 2**16),
    E=st.sampled_from([1, 5, 33, 500, 1300]),
    B=st.sampled_from([1, 3, 17]),
    threads=st.sampled_from([1, 3]),
    shards=st.integers(1, 3),
    with_seen=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_as_a_sort_of_all_with_ties_seen_items_shards_and_threads(
    seed: int, E: int, B: int, threads: int, shards: int, with_seen: bool
) -> None:
    draw = torch.Generator().manual_seed(seed)
    ids_E = torch.randperm(3 * E, generator=draw)[:E].sort().values + 1
    items_ED, queries_BD = whole(draw, E, 4), whole(draw, B, 4)
    k = int(torch.randint(1, min(E, 40) + 1, (1,), generator=draw))
    seen = None
    if with_seen:
        lengths_B = torch.randint(0, E + 1, (B,), generator=draw)
        offsets_B1 = torch.cat([torch.zeros(1, dtype=torch.int64), lengths_B.cumsum(0)])
        # Some of them are not in the index, and some come twice.
        seen = Seen(torch.randint(0, 3 * E + 9, (int(offsets_B1[-1]),), generator=draw), offsets_B1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "BLOCK_SCORES", 64 * B)
        index = ExactIndex(ids_E, list(items_ED.chunk(shards)), threads=threads)
        ids_BK, scores_BK = index.top(queries_BD, k, seen)
        index.close()
    pairs = [list(zip(*row, strict=True)) for row in zip(scores_BK.tolist(), ids_BK.tolist(), strict=True)]
    assert pairs == definition(ids_E, items_ED, queries_BD, k, seen)


def test_no_query_gets_an_empty_answer() -> None:
    ids_BK, scores_BK = ExactIndex(torch.tensor([4]), [torch.ones(1, 3)]).top(torch.empty(0, 3), 1)
    assert ids_BK.shape == scores_BK.shape == (0, 1)


def test_vectors_of_places_in_several_shards() -> None:
    items_ED = torch.arange(21.0).view(7, 3)
    index = ExactIndex(torch.arange(1, 8), [items_ED[:3], items_ED[3:4], items_ED[4:]])
    places = torch.tensor([[6, 0, 3], [2, 4, 4]])
    assert torch.equal(index.vectors(places), items_ED[places])


@pytest.mark.parametrize(
    ("ids", "rows", "message"),
    [
        ([1, 2], [[1.0], [1.0], [1.0]], "has 2 ids and 3 item vectors"),
        ([2, 2], [[1.0], [1.0]], "ascend"),
        ([0, 2], [[1.0], [1.0]], "above 0"),
        ([1, 2], [[1.0], [torch.nan]], "not finite"),
        ([1, 2], [[1.0], [torch.inf]], "not finite"),
    ],
)
def test_an_index_that_does_not_fit_together_is_refused(ids: list[int], rows: list, message: str) -> None:
    with pytest.raises(ServingError, match=message):
        ExactIndex(torch.tensor(ids), [torch.tensor(rows)])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_a_query_whose_scores_are_not_finite_is_refused(value: float) -> None:
    index = ExactIndex(torch.tensor([1, 2]), [torch.full((2, 2), 10.0)])
    with pytest.raises(ServingError, match="not finite"):
        index.top(torch.tensor([[1.0, 1.0], [value, 1.0]]), 1)


@pytest.mark.parametrize("k", [0, 3])
def test_a_k_that_the_index_does_not_have_is_refused(k: int) -> None:
    with pytest.raises(ServingError, match=f"k={k}: the index has 2 items"):
        ExactIndex(torch.tensor([1, 2]), [torch.ones(2, 2)]).top(torch.ones(1, 2), k)
