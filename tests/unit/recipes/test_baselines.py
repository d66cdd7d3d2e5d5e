"""Baselines: ranks on a set small enough to work out, and the published figures on the real ones."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from gr.data.dataset import Dataset
from gr.errors import DataError
from gr.metrics.retrieval import retrieval_metrics
from gr.prepare.movielens import prepare_movielens
from gr.prepare.source import Source
from gr.prepare.write import Users, write_folder
from gr.recipes.baselines import BASELINES, evaluate_baselines, fit_item_knn, fit_markov, fit_popularity

# ids 1..6; id 6 is never rated. The newest item of each user is the test target.
ROWS = [[1, 2, 3, 4], [1, 2, 3, 5], [2, 3, 1], [4], [5, 1, 2, 3]]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    items = np.concatenate([np.array(row) for row in ROWS])
    offsets = np.cumsum([0, *map(len, ROWS)])
    users = Users(np.arange(1, len(ROWS) + 1), offsets, items)
    write_folder(tmp_path, users, corpus=np.arange(1, 7), name="tiny", order="as given", source="a test")
    return Dataset.open(tmp_path)


def ranks(dataset: Dataset, name: str, **options) -> list[float]:
    options = {"train_holdout": 1, "target_from_end": 1, "filter_seen": "all", "max_length": 200} | options
    return evaluate_baselines(dataset, dataset, names=[name], **options)[name].tolist()


def test_popularity_by_hand(dataset: Dataset) -> None:
    assert fit_popularity(dataset, 1).prior.tolist() == [0, 3, 4, 3, 0, 1, 0]
    # user 0 has seen 1 2 3; of 4, 5, 6 with 0, 1, 0 events, 4 shares ranks 2 and 3. User 3 has no history.
    assert ranks(dataset, "popularity") == [2.5, 1.0, 1.0, 1.0]
    # only the last item is filtered: 1 and 2 compete, and 5
    assert ranks(dataset, "popularity", filter_seen="window", max_length=1)[0] == 4.5


def test_item_knn_by_hand(dataset: Dataset) -> None:
    matrix = fit_item_knn(dataset, 1).matrix
    assert matrix[1, 2] == pytest.approx(3 / (np.sqrt(3 * 4) + 10)) and matrix[2, 2] == 0.0
    assert matrix[3, 5] == 0.0 and matrix[1, 5] == pytest.approx(1 / (np.sqrt(3) + 10))


def test_markov_by_hand(dataset: Dataset) -> None:
    matrix = fit_markov(dataset, 1).matrix.toarray()
    # successors of 1 within three events: 2 3, 2 3, 2
    assert matrix[1].tolist() == pytest.approx([0, 0, 3 / 5, 2 / 5, 0, 0, 0])
    assert matrix[3].sum() == 0.0


@pytest.mark.parametrize("name", BASELINES)
def test_against_a_plain_ranking(dataset: Dataset, name: str) -> None:
    scorer = BASELINES[name](dataset, 1)
    expected = []
    for row in ROWS:
        if len(row) < 2:
            continue
        scores = np.zeros(7) if scorer.prior is None else scorer.prior.astype(float)
        if scorer.matrix is not None:
            for age, item in enumerate(reversed(row[:-1][-scorer.last :])):
                scores = scores + scorer.decay**age * scorer.matrix.toarray()[item]
        others = [i for i in range(1, 7) if i not in row]
        target = scores[row[-1]]
        expected.append(1 + sum(scores[i] > target for i in others) + sum(scores[i] == target for i in others) / 2)
    assert ranks(dataset, name) == expected


def test_errors(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no baseline is called 'random'; there are popularity, item_knn, markov"):
        ranks(dataset, "random")
    users = Users(np.array([1]), np.array([0, 2]), np.array([1, 2]))
    write_folder(tmp_path / "b", users, corpus=np.arange(1, 9), name="b", order="as given", source="a test")
    options = {"train_holdout": 0, "target_from_end": 1, "filter_seen": "all", "max_length": 5}
    with pytest.raises(DataError, match=r"has item_cardinality 7, .* has 9"):
        evaluate_baselines(dataset, Dataset.open(tmp_path / "b"), names=["popularity"], **options)


def test_bad_rows_are_skipped_on_request(dataset: Dataset) -> None:
    part = next(dataset.path.glob("part-*"))
    table = pq.read_table(part)
    *rows, last = table.column("item_ids").to_pylist()
    rows.append([*last[:-1], 99])
    pq.write_table(table.set_column(1, "item_ids", pa.array(rows, pa.list_(pa.int32()))), part)
    broken = Dataset.open(dataset.path)
    with pytest.raises(DataError, match="item id 99"):
        ranks(broken, "popularity")
    assert len(ranks(broken, "popularity", on_bad_row="skip")) == 3 and broken.bad_rows == 1


def test_command(dataset: Dataset) -> None:
    from gr.cli.baselines import command

    result = CliRunner().invoke(command, [str(dataset.path), "--filter-seen", "window"])
    assert result.exit_code == 0, result.output
    assert "4 users" in result.output and "train_holdout=1" in result.output
    assert all(name in result.output for name in [*BASELINES, "ndcg@200"])


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize(
    ("source", "name", "expected"),
    [
        (
            "ml-1m",
            "movielens-1m",
            {"popularity": (0.0363, 0.0178), "item_knn": (0.1637, 0.0909), "markov": (0.2631, 0.1526)},
        ),
        (
            "ml-100k",
            "movielens-100k",
            {"popularity": (0.0859, 0.0443), "item_knn": (0.1654, 0.0933), "markov": (0.1941, 0.1076)},
        ),
    ],
)
def test_measured_figures(test_data: Path, tmp_path: Path, source: str, name: str, expected: dict) -> None:
    prepare_movielens(name, Source(test_data / source), tmp_path)
    dataset = Dataset.open(tmp_path)
    found = evaluate_baselines(
        dataset, dataset, names=list(BASELINES), train_holdout=1, target_from_end=1, filter_seen="all", max_length=200
    )
    for baseline, (hit_rate, ndcg) in expected.items():
        metrics = retrieval_metrics(found[baseline])
        assert (metrics["hr@10"], metrics["ndcg@10"]) == pytest.approx((hit_rate, ndcg), abs=6e-5)
