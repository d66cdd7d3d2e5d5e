"""The generated streams follow their definition, and the oracles bound what is reachable."""

import json
from pathlib import Path

import numpy as np
import pytest

from gr.config.histories import HistoryDataConfig
from gr.data.dataset import Dataset
from gr.data.history_batches import evaluation_batches
from gr.errors import ConfigError
from gr.prepare.oracle import expected_metrics, group_ranks, seen_in_groups
from gr.prepare.synthetic import Stream, StreamOptions, write_stream
from gr.prepare.synthetic_time import TimeStream, write_time_stream

SMALL = StreamOptions(items=400, categories=10, records=6000, length=24, seed=3)


def joined(stream: Stream, first: int, stop: int) -> dict[str, np.ndarray]:
    chunks = list(stream.chunks(first, stop))
    return {name: np.concatenate([vars(chunk)[name] for chunk in chunks]) for name in vars(chunks[0])}


def test_dirichlet_stream_follows_its_definition() -> None:
    stream = Stream(SMALL)
    drawn = joined(stream, 0, SMALL.records)
    assert drawn["items_BN"].shape == (6000, 24) and drawn["items_BN"].min() == 1
    limit_B = ((0.4 + 0.6 * np.arange(6000) / 6000) * 400).astype(int)
    assert (drawn["items_BN"] <= limit_B[:, None]).all() and (
        drawn["items_BN"].max(axis=1) > 0.9 * limit_B
    ).mean() > 0.5
    category_BN = stream.category_of_item[drawn["items_BN"]]
    own_BGN = (drawn["category_BG"][:, :, None] == category_BN[:, None, :]) & (drawn["prior_BG"] > 0)[:, :, None]
    assert own_BGN.any(axis=1).all()
    np.testing.assert_array_equal(own_BGN[:, :, :-1].sum(axis=2), drawn["count_BG"])
    used = (drawn["prior_BG"] > 0).sum(axis=1)
    np.testing.assert_allclose(np.bincount(used, minlength=6)[1:] / 6000, 0.2, atol=0.03)
    np.testing.assert_allclose(drawn["prior_BG"].sum(axis=1), 1.0)
    one = drawn["category_BG"][0, : used[0]]
    assert len(set(one.tolist())) == used[0]


def test_event_frequencies_match_the_oracle_probabilities() -> None:
    drawn = joined(Stream(SMALL), 0, SMALL.records)
    weight = drawn["alpha_B"][:, None] * drawn["prior_BG"] + drawn["count_BG"]
    probability = weight / (drawn["alpha_B"] + SMALL.length - 1)[:, None]
    np.testing.assert_allclose(probability.sum(axis=1), 1.0)
    last_B = Stream(SMALL).category_of_item[drawn["items_BN"][:, -1]]
    happened = (drawn["category_BG"] == last_B[:, None]) & (drawn["prior_BG"] > 0)
    standard_error = np.sqrt((probability * (1 - probability)).sum(axis=0)) / 6000
    assert (np.abs((happened - probability).mean(axis=0)) < 4 * standard_error + 1e-12).all()
    order = np.argsort(probability.ravel())[-6000:]  # and where the probability is high
    assert abs(happened.ravel()[order].mean() - probability.ravel()[order].mean()) < 0.02


def test_chunks_do_not_depend_on_where_reading_starts() -> None:
    stream = Stream(SMALL)
    np.testing.assert_array_equal(
        joined(stream, 4000, 4200)["items_BN"], joined(stream, 0, SMALL.records)["items_BN"][4000:4200]
    )
    assert (
        joined(Stream(StreamOptions(400, 10, 6000, 24, seed=4)), 0, 9)["items_BN"] != joined(stream, 0, 9)["items_BN"]
    ).any()


def test_written_folders(tmp_path: Path) -> None:
    oracle = write_stream(SMALL, tmp_path)
    assert json.loads((tmp_path / "oracle.json").read_text()) == oracle
    train, test = Dataset.open(tmp_path / "train"), Dataset.open(tmp_path / "test")
    assert (train.rows, test.rows) == (5400, 600) and train.row_counts[:-1] == [512] * 10
    items = np.concatenate([train.read_row_group(i).columns["item_ids"] for i in range(len(train.row_groups))])
    np.testing.assert_array_equal(items.reshape(-1, 24), joined(Stream(SMALL), 0, 5400)["items_BN"])
    batches = evaluation_batches(
        test, HistoryDataConfig(path="x"), target_from_end=1, global_batch_size=600, filter_seen="none"
    )
    targets = next(iter(batches)).target_ids_B.numpy()
    np.testing.assert_array_equal(targets, joined(Stream(SMALL), 5400, 6000)["items_BN"][:, -1])


def test_oracle_by_brute_force() -> None:
    """Score every item of every test record and rank with random ties."""
    stream, options = Stream(SMALL), SMALL
    from gr.prepare.synthetic import bayes_oracle

    oracle = bayes_oracle(stream)
    drawn = joined(stream, options.train_records, options.records)
    random, hits, blind, bound = np.random.default_rng(0), [], [], []
    for b in range(len(drawn["items_BN"])):
        scores = np.zeros(options.items + 1)
        limit = int((0.4 + 0.6 * (options.train_records + b) / options.records) * options.items)
        for slot in np.flatnonzero(drawn["prior_BG"][b] > 0):
            ids = np.flatnonzero(stream.category_of_item[: limit + 1] == drawn["category_BG"][b, slot])
            weight = drawn["alpha_B"][b] * drawn["prior_BG"][b, slot] + drawn["count_BG"][b, slot]
            scores[ids] = weight / len(ids)
        target, history = drawn["items_BN"][b, -1], drawn["items_BN"][b, :-1]
        repeated = target in history
        tie = np.round(scores, 9) + 1e-12 * random.random((200, options.items + 1))
        hits.append(((tie[:, 1:] > tie[:, [target]]).sum(axis=1) < 10).mean())
        tie[:, np.setdiff1d(history, [target])] = -1
        blind.append(((tie[:, 1:] > tie[:, [target]]).sum(axis=1) < 10).mean())
        bound.append(1.0 if repeated else blind[-1])
    assert oracle["filter_seen=none"]["hr@10"] == pytest.approx(np.mean(hits), abs=0.004)
    assert oracle["filter_seen=all, repeats not exploited"]["hr@10"] == pytest.approx(np.mean(blind), abs=0.004)
    assert oracle["filter_seen=all"]["hr@10"] == pytest.approx(np.mean(bound), abs=0.004)


def test_expected_metrics_by_hand() -> None:
    score, size = np.array([[0.5, 0.2, 0.2]]), np.array([[3, 4, 8]])
    better, tied = group_ranks(score, size, np.array([2]))
    assert (better.tolist(), tied.tolist()) == ([3], [12])
    result = expected_metrics(better, tied)  # rank uniform on 4..15
    assert result["hr@1"] == 0.0 and result["hr@10"] == pytest.approx(7 / 12) and result["hr@50"] == 1.0
    assert result["ndcg@10"] == pytest.approx(sum(1 / np.log2(1 + r) for r in range(4, 11)) / 12)
    assert result["mrr"] == pytest.approx(sum(1 / r for r in range(4, 16)) / 12)


def test_seen_in_groups() -> None:
    groups = np.array([-1, 0, 0, 1, 1])
    result = seen_in_groups(np.array([[1, 1, 2, 3], [4, 4, 4, 4]]), np.array([2, 3]), groups, 2)
    assert result.tolist() == [[1, 1], [0, 1]]


def test_time_stream_follows_its_definition(tmp_path: Path) -> None:
    options = StreamOptions(items=203, categories=20, records=4000, length=30, seed=1)
    oracle = write_time_stream(options, tmp_path)
    stream = TimeStream(options)
    items, times = (np.concatenate(part) for part in zip(*((i, t) for _, i, t in stream.chunks("train")), strict=True))
    test = next(iter(stream.chunks("test")))[1]
    assert not (items[:400] == test).all(axis=1).any()
    cluster, gap = stream.cluster_of_item[items], np.diff(times, axis=1)
    long = gap >= 86_400
    assert ((gap >= 10) & (gap <= 864_000) & (long | (gap <= 100))).all() and abs(long.mean() - 0.5) < 0.01
    home, after = cluster[:, :1] == cluster[:, 1:], cluster[:, 1:] == (cluster[:, :-1] + 1) % 20
    for hit in (home[long].mean(), after[~long].mean()):
        assert 0.89 < hit < 0.92  # 0.9 and a twentieth of the noise
    dataset = Dataset.open(tmp_path / "train")
    assert dataset.read_row_group(0).columns["timestamps"].reshape(-1, 30).tolist() == times[:512].tolist()
    for protocol in ("filter_seen=none", "filter_seen=all"):
        assert oracle["with_gap"][protocol]["ndcg@10"] > oracle["without_gap"][protocol]["ndcg@10"]
    assert oracle["with_gap"]["filter_seen=none"]["hr@10"] > 1.7 * oracle["without_gap"]["filter_seen=none"]["hr@10"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"categories": 4}, "at least 5"), ({"items": 100}, "set items to at least 250"), ({"length": 1}, "length=1")],
)
def test_impossible_sizes(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StreamOptions(**options)
