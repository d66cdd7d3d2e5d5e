"""`gr prepare clicks` writes what its definition says, and the oracle bounds what is reachable."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from scipy.special import expit

from gr.cli import main
from gr.cli.prepare import command
from gr.config import load_config
from gr.config.click import ClickConfig
from gr.data.tabular import TabularDataset
from gr.dist import World
from gr.errors import ConfigError
from gr.metrics.ranking import RankingMetrics
from gr.prepare.synthetic_clicks import ClickOptions, Clicks, ClickStream, Part, click_oracle, write_clicks

CONFIG = Path(__file__).parents[3] / "configs/dlrm/clicks.yaml"
SMALL = ClickOptions(rows=20_000, test_rows=5_000, columns=3, cardinality=50, dense=2, seed=3)
ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def joined(stream: ClickStream, part: Part, first: int, stop: int) -> Clicks:
    chunks = list(stream.chunks(part, first, stop))
    return Clicks(**{name: np.concatenate([vars(chunk)[name] for chunk in chunks]) for name in vars(chunks[0])})


def prepare(out: Path, *more: str) -> Result:
    return CliRunner().invoke(command, ["clicks", "--out", str(out), *more])


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line that `gr prepare clicks` says, with exit code 2."""

    def run(out: Path, *options: str) -> str:
        assert main(["prepare", "clicks", "--out", str(out), *options]) == 2
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return run


@pytest.mark.parametrize("skew", [0.0, 0.7, 1.05, 1.6])
def test_popularity_is_zipf_with_the_stated_exponent(skew: float) -> None:
    ids_BCH = joined(ClickStream(ClickOptions(columns=2, cardinality=500, skew=skew)), "train", 0, 200_000).ids_BCH
    assert ids_BCH.min() == 1 and ids_BCH.max() == 499
    ranks = np.arange(1, 31)
    for column in range(2):
        counts = np.sort(np.bincount(ids_BCH[:, column, 0], minlength=500))[::-1]
        slope = np.polyfit(np.log(ranks), np.log(counts[:30]), 1)[0]
        assert -slope == pytest.approx(skew, abs=0.05)
    assert (np.bincount(ids_BCH[:, 0, 0]).argsort()[-5:] != np.bincount(ids_BCH[:, 1, 0]).argsort()[-5:]).any()


def test_ids_have_the_rank_the_stream_says() -> None:
    stream = ClickStream(SMALL)
    counts = np.bincount(joined(stream, "train", 0, 60_000).ids_BCH[:, 1, 0], minlength=50)
    expected_V = 60_000 * stream.probability_V
    error_V = np.abs(counts[stream.id_of_rank_CV[1]] - expected_V)
    assert (error_V < 5 * np.sqrt(expected_V)).all()


@pytest.mark.parametrize("hots", [1, 3])
def test_logits_by_a_plain_statement(hots: int) -> None:
    options = ClickOptions(columns=3, cardinality=20, dense=2, hots=hots)
    stream = ClickStream(options)
    clicks = joined(stream, "test", 0, 50)
    rank_of_id = [{int(i): rank for rank, i in enumerate(ids)} for ids in stream.id_of_rank_CV]
    for row in range(50):
        additive = stream.bias + sum(
            a * math.log(x + 1) for a, x in zip(stream.dense_N, clicks.counts_BN[row], strict=True)
        )
        vectors = []
        for column in range(3):
            ranks = [rank_of_id[column][int(i)] for i in clicks.ids_BCH[row, column]]
            additive += sum(stream.weight_CV[column, rank] for rank in ranks) / math.sqrt(hots)
            vectors.append(sum(stream.hidden_CVK[column, rank].astype(float) for rank in ranks) / math.sqrt(hots))
        pairs = vectors[0] @ vectors[1] + vectors[0] @ vectors[2] + vectors[1] @ vectors[2]
        assert clicks.additive_B[row] == pytest.approx(additive, abs=1e-5)
        assert clicks.logit_B[row] == pytest.approx(additive + pairs, abs=1e-5)


@pytest.mark.parametrize("hots", [1, 4])
def test_terms_have_the_stated_deviations_and_labels_the_base_rate(hots: int) -> None:
    stream = ClickStream(ClickOptions(hots=hots, seed=5))
    clicks = joined(stream, "train", 0, 200_000)
    dense_B = np.log1p(clicks.counts_BN) @ stream.dense_N
    ids_B, pairs_B = clicks.additive_B - stream.bias - dense_B, clicks.logit_B - clicks.additive_B
    for term_B, deviation in ((dense_B, 0.5), (ids_B, 0.7), (pairs_B, 1.5)):
        assert term_B.std() == pytest.approx(deviation, rel=0.02)
    for term_B in (ids_B, pairs_B):
        assert abs(term_B.mean()) < 0.02
    for column in range(8):  # a product says nothing on average given an id
        top_B = clicks.ids_BCH[:, column, 0] == stream.id_of_rank_CV[column, 0]
        assert abs(pairs_B[top_B].mean()) < 5 * 1.5 / math.sqrt(top_B.sum())
    assert (clicks.counts_BN >= 9).mean() == pytest.approx(0.1, abs=0.003)
    assert clicks.labels_B.mean() == pytest.approx(0.2, abs=0.01)


def test_labels_follow_the_true_probabilities() -> None:
    clicks = joined(ClickStream(SMALL), "train", 0, 100_000)
    bin_B = (expit(clicks.logit_B) * 10).astype(int)
    for each in range(8):
        rows = bin_B == each
        assert clicks.labels_B[rows].mean() == pytest.approx(expit(clicks.logit_B[rows]).mean(), abs=0.03)


def test_rows_do_not_depend_on_where_reading_starts_or_on_how_many_are_made() -> None:
    stream = ClickStream(SMALL)
    every = joined(stream, "train", 0, 40_000)
    longer = ClickStream(ClickOptions(**{**vars(SMALL), "rows": 1_000_000, "test_rows": 7}))
    for name, value in vars(joined(longer, "train", 16_000, 33_000)).items():
        np.testing.assert_array_equal(value, vars(every)[name][16_000:33_000])
    assert (joined(stream, "test", 0, 99).ids_BCH != every.ids_BCH[:99]).any()
    other = ClickStream(ClickOptions(**{**vars(SMALL), "seed": 4}))
    assert (joined(other, "train", 0, 99).ids_BCH != every.ids_BCH[:99]).any()


@pytest.mark.parametrize("hots", [1, 2])
def test_written_folders(tmp_path: Path, hots: int) -> None:
    options = ClickOptions(**{**vars(SMALL), "hots": hots})
    oracle = write_clicks(options, tmp_path)
    assert json.loads((tmp_path / "oracle.json").read_text()) == oracle
    stream = ClickStream(options)
    parts: list[tuple[Part, int, list[int]]] = [("train", 20_000, [16_384, 3_616]), ("test", 5_000, [5_000])]
    for part, rows, groups in parts:
        dataset = TabularDataset.open(tmp_path / part)
        assert dataset.rows == rows and dataset.row_counts == groups
        assert dataset.schema.dense == ["i1", "i2"] and dataset.schema.transform.name == "log1p_clip"
        assert [(c.name, c.cardinality, c.hots) for c in dataset.schema.sparse] == [
            (name, 50, hots) for name in ("c1", "c2", "c3")
        ]
        read = [dataset.read_row_group(index) for index in range(len(groups))]
        drawn = joined(stream, part, 0, rows)
        np.testing.assert_array_equal(np.concatenate([r.labels_B for r in read]), drawn.labels_B)
        np.testing.assert_array_equal(np.concatenate([r.ids_BH for r in read]), drawn.ids_BCH.reshape(rows, -1))
        dense_BN = np.concatenate([r.dense_BN for r in read])
        np.testing.assert_allclose(dense_BN, np.log(drawn.counts_BN + 1), rtol=1e-6)


def test_parts_of_many_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gr.prepare.tabular.ROWS_PER_PART", 16_384)
    write_clicks(SMALL, tmp_path)
    dataset = TabularDataset.open(tmp_path / "train")
    assert [group.file.name for group in dataset.row_groups] == ["part-00000.parquet", "part-00001.parquet"]
    assert dataset.row_counts == [16_384, 3_616]


def test_oracle_beats_additive_logits_and_agrees_with_the_metrics_of_training() -> None:
    stream = ClickStream(SMALL)
    oracle, clicks = click_oracle(stream), joined(stream, "test", 0, SMALL.test_rows)
    scores = {"true": clicks.logit_B, "additive": stream.additive_logit(clicks), "raw": clicks.additive_B}
    metrics_of = {}
    for name, logit_B in scores.items():
        metrics = RankingMetrics("click", ALONE)
        metrics.update(torch.from_numpy(logit_B), torch.from_numpy(clicks.labels_B))
        metrics_of[name] = metrics.compute()
    for name, stated in (("true", oracle), ("additive", oracle["without_interactions"])):
        for metric in ("auc", "ne", "log_loss"):
            assert stated[metric] == pytest.approx(metrics_of[name][metric], rel=1e-5)
    assert oracle["base_rate"] == pytest.approx(metrics_of["true"]["base_rate"])
    assert metrics_of["true"]["auc"] > metrics_of["additive"]["auc"] + 0.1
    assert (
        metrics_of["true"]["ne"] < metrics_of["additive"]["ne"] - 0.1
        and metrics_of["additive"]["ne"] < metrics_of["raw"]["ne"] - 0.01
    )
    assert oracle["options"] == vars(SMALL)


def test_command(tmp_path: Path) -> None:
    out = tmp_path / "clicks"
    result = prepare(out, "--rows", "300", "--test-rows", "200", "--skew", "0.5", "--hots", "2")
    assert result.exit_code == 0, result.exception
    oracle = json.loads((out / "oracle.json").read_text())
    assert oracle["options"] == vars(ClickOptions(rows=300, test_rows=200, skew=0.5, hots=2))
    assert f"oracle: auc {oracle['auc']:.4f}" in result.output and "without interactions: auc" in result.output
    assert prepare(out, "--rows", "400", "--force").exit_code == 0
    assert TabularDataset.open(out / "train").rows == 400


def test_the_example_configuration_reads_what_its_first_lines_write() -> None:
    config = load_config(str(CONFIG), [])
    assert isinstance(config, ClickConfig) and config.data.path == "data/clicks/train"
    assert config.evaluation.path == "data/clicks/test" and not config.data.shuffle
    assert config.trainer.steps * config.trainer.global_batch_size == 100_000  # one pass
    assert "#   gr prepare clicks --rows 100000 --test-rows 20000 --out data/clicks\n" in CONFIG.read_text()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--rows", "0", "rows=0: must be at least 1; set rows higher"),
        ("--test-rows", "0", "test_rows=0: must be at least 1"),
        ("--columns", "1", "columns=1: must be at least 2; an interaction is of two columns"),
        ("--cardinality", "1", "cardinality=1: must be at least 3; id 0 is never drawn"),
        ("--cardinality", "3000000000", "cardinality=3000000000: must be at most 2147483647"),
        ("--dense", "0", "dense=0: must be at least 1; the label follows the dense features too"),
        ("--hots", "0", "hots=0: must be at least 1"),
        ("--seed", "-1", "seed=-1: must be at least 0"),
        ("--skew", "-0.1", "skew=-0.1: must be from 0"),
        ("--skew", "4", "skew=4.0: must be from 0"),
        ("--skew", "nan", "skew=nan: must be from 0"),
        ("--rows", "many", "'many' is not a valid integer"),
        ("--test-rows", "1", "so there is no AUC; set test_rows higher"),
    ],
)
def test_bad_options(refused: Callable[..., str], tmp_path: Path, option: str, value: str, message: str) -> None:
    assert message in refused(tmp_path / "out", option, value)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    assert "exists already; pass --force" in refused(tmp_path)
    assert "is no data folder" in refused(tmp_path, "--force")
    assert (tmp_path / "note").read_text() == "mine"


def test_options_that_a_program_gives_are_checked_too() -> None:
    with pytest.raises(ConfigError, match="columns=0"):
        ClickOptions(columns=0)
