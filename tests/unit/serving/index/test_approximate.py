"""The inverted file of faiss, beside the exact index."""

from pathlib import Path

import pytest
import torch

from gr.errors import InstallError, ServingError
from gr.serving.index import approximate
from gr.serving.index.approximate import ApproximateIndex, build, load, recall_of
from gr.serving.index.exact import ExactIndex, Seen

pytest.importorskip("faiss")
K = 10


@pytest.fixture(scope="module")
def exact() -> ExactIndex:
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(60, 16, generator=draw)
    items_ED = centres[torch.randint(0, 60, (3000,), generator=draw)] + 0.8 * torch.randn(3000, 16, generator=draw)
    return ExactIndex(2 * torch.arange(1, 3001), [items_ED[:1000], items_ED[1000:]])


@pytest.fixture(scope="module")
def queries_BD() -> torch.Tensor:
    return torch.randn(50, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def built(exact: ExactIndex, queries_BD: torch.Tensor) -> ApproximateIndex:
    index, measured = build(exact, queries_BD, recall=0.95, k=K)
    least = {each.probes: each.least for each in measured}
    assert least[index.probes] >= 0.95 > least[index.probes - 1]
    assert all(each.least < each.recall for each in measured if each.recall < 1)
    return index


def test_the_recall_asked_for_is_that_of_other_queries_too(built: ApproximateIndex) -> None:
    others_BD = torch.randn(400, 16, generator=torch.Generator().manual_seed(2))
    assert recall_of(built.top(others_BD, K)[0], built.exact.top(others_BD, K)[0]) >= 0.95


def test_columns_that_differ_much_in_size_get_a_scale_each(queries_BD: torch.Tensor) -> None:
    sizes_D = torch.logspace(0, -3, 16)
    items_ED = torch.randn(2000, 16, generator=torch.Generator().manual_seed(3)) * sizes_D
    exact = ExactIndex(torch.arange(1, 2001), [items_ED])
    _, measured = build(exact, queries_BD / sizes_D, recall=0.97, k=K)
    assert next(each.rows for each in measured if each.probes == each.lists) == "QT_8bit_uniform"
    assert measured[-1].rows == "QT_8bit"


def test_a_recall_that_no_list_reaches_is_refused(exact: ExactIndex, queries_BD: torch.Tensor) -> None:
    items_ED = exact.vectors(torch.arange(2000))
    items_ED[0] *= 1000  # the others get the same few of the 256 steps of each column
    close = ExactIndex(torch.arange(1, 2001), [items_ED])
    with pytest.raises(ServingError, match=r"recall 0\.\d+ at 10 with all 45 lists, 0\.\d+ less a margin for only 50"):
        build(close, queries_BD, recall=0.97, k=K)


def test_scores_are_exact_and_ids_those_of_the_exact_index(built: ApproximateIndex, queries_BD: torch.Tensor) -> None:
    ids_BK, scores_BK = built.top(queries_BD, K)
    expected_BK, _ = built.exact.top(queries_BD, K)
    items = built.exact.vectors(ids_BK // 2 - 1)
    assert torch.allclose(scores_BK, torch.einsum("bkd,bd->bk", items, queries_BD), atol=1e-5)
    assert torch.isin(ids_BK, expected_BK).float().mean() >= 0.95


def test_seen_items_are_left_out(built: ApproximateIndex, queries_BD: torch.Tensor) -> None:
    before_BK, _ = built.top(queries_BD, K)
    seen = Seen(before_BK[:, :4].flatten(), torch.arange(len(queries_BD) + 1) * 4)
    after_BK, _ = built.top(queries_BD, K, seen)
    assert torch.equal(after_BK[:, : K - 4], before_BK[:, 4:])
    assert not (after_BK[:, :, None] == before_BK[:, None, :4]).any()


def test_where_the_lists_have_too_few_the_rest_is_empty(exact: ExactIndex) -> None:
    few = ExactIndex(torch.tensor([3, 5, 9]), [torch.eye(3)])
    index, _ = build(few, torch.eye(3), recall=1.0, k=1)
    ids_BK, scores_BK = ApproximateIndex(few, index.lists, 1).top(torch.eye(3)[:1], 3)
    assert ids_BK[0, 0] == 3
    assert (ids_BK[scores_BK == -torch.inf] == 0).all()


def test_a_saved_index_answers_alike(built: ApproximateIndex, queries_BD: torch.Tensor, tmp_path: Path) -> None:
    built.save(tmp_path / "lists.faiss")
    opened = load(built.exact, tmp_path / "lists.faiss", built.probes)
    for got, right in zip(opened.top(queries_BD, K), built.top(queries_BD, K), strict=True):
        assert torch.equal(got, right)


def test_an_index_of_other_items_is_refused(built: ApproximateIndex) -> None:
    with pytest.raises(ServingError, match="has 3000 items of width 16, the item vectors are 2 of width 16"):
        ApproximateIndex(ExactIndex(torch.tensor([1, 2]), [torch.ones(2, 16)]), built.lists, 1)


def test_without_faiss_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(InstallError, match=r"pip install 'gr\[faiss\]'"):
        approximate.faiss()
