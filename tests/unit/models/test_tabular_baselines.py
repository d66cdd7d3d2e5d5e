"""The baselines of benchmarks/tabular_baselines.py, which needs scikit-learn."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.orc
import pytest

from gr.errors import DataError, InstallError

MODULE = "benchmarks.tabular_baselines"


@pytest.fixture(scope="module")
def tabular() -> ModuleType:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    return importlib.import_module(MODULE)


def write_orc(path: Path, **changed: list[list[float]]) -> Path:
    """Two rows: the first has count k in column ik and category 100 + k in ck, the second has nothing but a label."""
    columns = {"label": pa.array([[1.0], [0.0]])}
    columns |= {f"i{k}": pa.array([[float(k)], []]) for k in range(1, 14)}
    columns |= {f"c{k}": pa.array([[100 + k], []]) for k in range(1, 27)}
    columns |= {name: pa.array(values, pa.list_(pa.float64())) for name, values in changed.items()}
    pyarrow.orc.write_table(pa.table(dict(sorted(columns.items()))), path)
    return path


def planted(tabular: ModuleType, count: int, seed: int):
    """Labels depend on one count and one category; another category is unique to its row, and says nothing."""
    random = np.random.default_rng(seed)
    dense = random.integers(-1, 200, (count, 13)).astype(np.float32)
    dense[random.random(dense.shape) < 0.2] = np.nan
    sparse = random.integers(0, 20, (count, 26))
    sparse[:, 7] = random.integers(0, 1 << 40, count)
    logit = np.nan_to_num(dense[:, 2]) / 100 + (sparse[:, 4] % 4) - 3
    return tabular.Rows(dense, sparse, (random.random(count) < 1 / (1 + np.exp(-logit))).astype(np.int64))


class TestReading:
    def test_columns_in_the_order_of_their_numbers_and_missing_values(
        self, tabular: ModuleType, tmp_path: Path
    ) -> None:
        rows = tabular.read_orc(write_orc(tmp_path / "part.orc"))
        assert rows.labels_N.tolist() == [1, 0] and rows.dense_NI.dtype == np.float32
        assert rows.dense_NI[0].tolist() == list(range(1, 14)) and np.isnan(rows.dense_NI[1]).all()
        assert rows.sparse_NC[0].tolist() == list(range(101, 127)) and (rows.sparse_NC[1] == -1).all()

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"i3": [[1.0], [1.0, 2.0]]}, "column i3: row 1 has more than one value"),
            ({"label": [[1.0], [3.0]]}, "labels other than 0 and 1"),
            ({"label": [[1.0], []]}, "labels other than 0 and 1"),
        ],
    )
    def test_bad_values(self, tabular: ModuleType, tmp_path: Path, changed: dict, message: str) -> None:
        with pytest.raises(DataError, match=message):
            tabular.read_orc(write_orc(tmp_path / "part.orc", **changed))

    def test_what_is_not_there(self, tabular: ModuleType, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"terabyte-part-N\.orc"):
            tabular.read_orc(tmp_path / "part.orc")
        pyarrow.orc.write_table(pa.table({"label": pa.array([[1.0]])}), tmp_path / "part.orc")
        with pytest.raises(DataError, match="has no column i1, i2,"):
            tabular.read_orc(tmp_path / "part.orc")


class TestFeatures:
    def test_hashing(self, tabular: ModuleType) -> None:
        dense = np.array([[np.nan] * 13, [-1.0] * 13, [0.0] * 13, [1.0] * 13, [2.0] * 13, [2.5] * 13], dtype=np.float32)
        features = tabular.hashed_features(tabular.Rows(dense, np.full((6, 26), 5), np.zeros(6))).toarray()
        assert (features.sum(1) == 39).all()
        assert np.array_equal(features[4], features[5])  # both between 2 and 2 * sqrt(2)
        overlap = features[:5] @ features[:5].T - np.diag((features[:5] ** 2).sum(1))
        assert (overlap.sum(1) < 4 * 30).all()  # otherwise the 26 categories alone are shared
        assert (features[0] > 0).sum() >= 38  # equal ids of different columns are told apart

    def test_frequencies(self, tabular: ModuleType) -> None:
        train = tabular.Rows(np.zeros((3, 13)), np.array([[4] * 26, [9] * 26, [9] * 26]), np.zeros(3))
        rows = tabular.Rows(np.zeros((3, 13)), np.array([[9] * 26, [10] * 26, [-1] * 26]), np.zeros(3))
        assert tabular.frequencies(train, rows)[:, 0].tolist() == [2, 0, 0]


def test_all_find_what_is_planted_and_keep_calibrated(tabular: ModuleType) -> None:
    """Were a row's own label in its encoding, the unique category would win, and unseen ones be mispredicted."""
    found = tabular.measure(planted(tabular, 4000, seed=0), planted(tabular, 2000, seed=1))
    assert found["base rate"]["ne"] >= 1.0
    for name in tabular.BASELINES:
        assert found[name]["auc"] > 0.7 and found[name]["ne"] < 0.9, (name, found[name])
        assert 0.9 < found[name]["calibration"] < 1.1, (name, found[name])


@pytest.mark.slow
def test_public_rows(tabular: ModuleType, test_data: Path) -> None:
    """All lie above the floor that DLRM is held to: AUC .715 and log loss .1345, the mean of three folds."""
    parts = [tabular.read_orc(test_data / "criteo" / f"terabyte-part-{index}.orc") for index in range(tabular.PARTS)]
    folds = [
        tabular.measure(tabular.concatenate(parts[:held_out] + parts[held_out + 1 :]), parts[held_out])
        for held_out in tabular.TEST_PARTS
    ]
    for name in tabular.BASELINES:
        assert np.mean([fold[name]["auc"] for fold in folds]) >= 0.715
        assert np.mean([fold[name]["log_loss"] for fold in folds]) <= 0.1345


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    for name in [name for name in sys.modules if name.startswith("sklearn.") or name == MODULE]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(InstallError, match=r"needs scikit-learn .*: pip install 'scikit-learn>=1\.9'"):
        importlib.import_module(MODULE)
