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
from gr.recipes import baselines
from gr.recipes.baselines import (
    BASELINES,
    TUNED,
    WINDOWS,
    Histories,
    Scorer,
    Targets,
    ease,
    evaluate_baselines,
    item_knn,
    markov,
    popularity,
)

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
    options = {"target_from_end": 1, "filter_seen": "all", "max_length": 200} | options
    return evaluate_baselines(dataset, Targets(dataset, **options), names=[name], train_holdout=1)[name].rank_B.tolist()


def test_popularity_by_hand(dataset: Dataset) -> None:
    assert popularity(Histories(dataset, 1)).tolist() == [0, 3, 4, 3, 0, 1, 0]
    # user 0 has seen 1 2 3; of 4, 5, 6 with 0, 1, 0 events, 4 shares ranks 2 and 3. User 3 has no history.
    assert ranks(dataset, "popularity") == [2.5, 1.0, 1.0, 1.0]
    # only the last item is filtered: 1 and 2 compete, and 5
    assert ranks(dataset, "popularity", filter_seen="window", max_length=1)[0] == 4.5


def test_item_knn_by_hand(dataset: Dataset) -> None:
    matrix = item_knn(Histories(dataset, 1), 10)
    assert matrix[1, 2] == pytest.approx(3 / (np.sqrt(3 * 4) + 10)) and matrix[2, 2] == 0.0
    assert matrix[3, 5] == 0.0 and matrix[1, 5] == pytest.approx(1 / (np.sqrt(3) + 10))


def test_markov_by_hand(dataset: Dataset) -> None:
    matrix = markov(Histories(dataset, 1), 3).toarray()
    # successors of 1 within three events: 2 3, 2 3, 2
    assert matrix[1].tolist() == pytest.approx([0, 0, 3 / 5, 2 / 5, 0, 0, 0])
    assert matrix[3].sum() == 0.0
    assert markov(Histories(dataset, 1), 1).toarray()[1].tolist() == [0, 0, 1, 0, 0, 0, 0]


def test_ease_is_the_ridge_regression_of_items_on_items(dataset: Dataset) -> None:
    users_UE = np.zeros((len(ROWS), 7))
    for user, row in enumerate(ROWS):
        users_UE[user, row[:-1]] = 1.0
    inverse_EE = np.linalg.inv(users_UE.T @ users_UE + 2.0 * np.eye(7))
    expected_EE = -inverse_EE / np.diag(inverse_EE)
    np.fill_diagonal(expected_EE, 0.0)
    assert ease(Histories(dataset, 1), 2.0) == pytest.approx(expected_EE, abs=1e-6)
    # Least squares with the target's own weight held at zero: the gradient of each other weight is zero.
    residual_UE = users_UE - users_UE @ expected_EE
    gradient_EE = users_UE.T @ residual_UE - 2.0 * expected_EE
    np.fill_diagonal(gradient_EE, 0.0)
    assert np.abs(gradient_EE).max() < 1e-12


@pytest.mark.parametrize("name", BASELINES)
def test_against_a_plain_ranking(dataset: Dataset, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "WINDOWS", WINDOWS[:1])
    histories = Histories(dataset, 1)
    if name == "popularity":
        scorer = Scorer(prior=popularity(histories))
    else:
        baseline = TUNED[name]
        monkeypatch.setitem(baselines.TUNED, name, baseline._replace(values=baseline.values[:1]))
        scorer = Scorer(*WINDOWS[0], baseline.fit(histories, baseline.values[0]))
    expected = []
    for row in ROWS:
        if len(row) < 2:
            continue
        scores = np.zeros(7) if scorer.prior is None else scorer.prior.astype(float)
        if scorer.matrix is not None:
            matrix_EE = scorer.matrix if isinstance(scorer.matrix, np.ndarray) else scorer.matrix.toarray()
            for age, item in enumerate(reversed(row[:-1][-scorer.last :])):
                scores = scores + scorer.decay**age * matrix_EE[item]
        others = [i for i in range(1, 7) if i not in row]
        target = scores[row[-1]]
        expected.append(1 + sum(scores[i] > target for i in others) + sum(scores[i] == target for i in others) / 2)
    assert ranks(dataset, name) == expected


def test_settings_are_chosen_without_the_targets(tmp_path: Path) -> None:
    """Item i is mostly followed by 7 i + 3; other targets change nothing, though settings that fit them would."""
    generator = np.random.default_rng(0)
    rows = [[1] for _ in range(60)]
    for _ in range(11):
        for row in rows:
            row.append((7 * row[-1] + 3) % 23 + 1 if generator.random() < 0.6 else int(generator.integers(1, 24)))

    def setting(rows: list[list[int]], folder: str) -> str:
        users = Users(np.arange(1, 61), np.arange(0, 721, 12), np.concatenate(rows))
        (tmp_path / folder).mkdir()
        write_folder(tmp_path / folder, users, corpus=np.arange(1, 24), name="x", order="as given", source="a test")
        data = Dataset.open(tmp_path / folder)
        targets = Targets(data, 1, "none", max_length=200)
        return evaluate_baselines(data, targets, names=["markov"], train_holdout=1)["markov"].setting

    chosen = setting(rows, "a")
    assert chosen == setting([[*row[:-1], row[0]] for row in rows], "b") != "reach 3, newest 10, decay 0.8"


def test_ease_is_left_out_of_a_large_catalogue(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "EASE_ITEMS", 6)
    targets = Targets(dataset, 1, "all", max_length=200)
    assert list(evaluate_baselines(dataset, targets, names=BASELINES, train_holdout=1)) == list(BASELINES[:-1])


def test_errors(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no baseline is called 'random'; there are popularity, item_knn, markov, ease"):
        ranks(dataset, "random")
    users = Users(np.array([1]), np.array([0, 2]), np.array([1, 2]))
    write_folder(tmp_path / "b", users, corpus=np.arange(1, 9), name="b", order="as given", source="a test")
    with pytest.raises(DataError, match=r"has item_cardinality 7, .* has 9"):
        evaluate_baselines(
            dataset, Targets(Dataset.open(tmp_path / "b"), 1, "all", 5), names=["popularity"], train_holdout=0
        )


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
        ("ml-1m", "movielens-1m", {"popularity": (0.0363, 0.0178), "markov": (0.2750, 0.1600)}),
        (
            "ml-100k",
            "movielens-100k",
            {
                "popularity": (0.0859, 0.0443),
                "item_knn": (0.1909, 0.1039),
                "markov": (0.1962, 0.1092),
                "ease": (0.1951, 0.1025),
            },
        ),
    ],
)
def test_measured_figures(test_data: Path, tmp_path: Path, source: str, name: str, expected: dict) -> None:
    prepare_movielens(name, Source(test_data / source), tmp_path)
    dataset = Dataset.open(tmp_path)
    scored = evaluate_baselines(dataset, Targets(dataset, 1, "all", 200), names=list(expected), train_holdout=1)
    for baseline, figures in expected.items():
        metrics = retrieval_metrics(scored[baseline].rank_B)
        assert (metrics["hr@10"], metrics["ndcg@10"]) == pytest.approx(figures, abs=2e-4)
