"""A stream with a planted effect of time: what comes next depends on the gap before it, which position cannot tell.

The generator, all of it from one seed (and numpy's sampling methods, which a new numpy may change):

1.  Items are ids 1..items, dealt at random to `categories` clusters on a ring, of sizes that differ by at most one.
2.  A record has a home cluster, uniform. Its first event is a uniform item of it.
3.  Before each later event is a gap, independent of everything before it: with probability 1/2 short (10 to 100
    seconds), else long (1 to 10 days), log-uniform in its range.
4.  After a short gap the next item comes from the cluster after the last item's on the ring; after a long one from
    home; with probability 0.1, in either case, from all items. Uniform within, with replacement.
5.  The first event is at a uniform second of the year 2001.

A model whose time bias sees query_t_i - t_j knows the gap before the event it predicts, and so which of the two
clusters comes; a model without time has to bet on both. The two oracles differ in this knowledge only.

The first 90 % of the records are train/, the last 10 % test/. B records of a chunk, N events, K clusters.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gr.prepare import generate
from gr.prepare.oracle import stream_oracle
from gr.prepare.synthetic import StreamOptions
from gr.schema import HistoryColumns

_LONG, _NOISE = 0.5, 0.1
_SHORT_SECONDS, _LONG_SECONDS = (10, 100), (generate.DAY_SECONDS, 10 * generate.DAY_SECONDS)
_YEAR_SECONDS = 365 * generate.DAY_SECONDS


@dataclass(frozen=True)
class TimeOptions(StreamOptions):
    """Size of a stream, with the defaults of `gr prepare synthetic-time`."""

    items: int = generate.size(1_000, "Item ids 1..items.", at_least=1)
    categories: int = generate.size(50, "Groups of items.", at_least=1)
    records: int = generate.size(20_000, "Users; the last tenth is test.", at_least=1)
    length: int = generate.size(50, "Events of each record.", at_least=1)


class TimeStream:
    """The stream of one set of options; train and test are drawn apart, so each starts a row group."""

    def __init__(self, options: StreamOptions) -> None:
        self.options = options
        order = generate.random_stream(options.seed, 0).permutation(options.items) + 1
        self.cluster_of_item = np.full(options.items + 1, -1)
        self.cluster_of_item[order] = np.arange(options.items) % options.categories
        self._by_cluster = np.argsort(self.cluster_of_item[1:], kind="stable") + 1
        self.size_K = np.bincount(self.cluster_of_item[1:], minlength=options.categories)
        self._start_K = np.cumsum(self.size_K) - self.size_K

    def chunks(self, part: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(record_B, items_BN, times_BN) of part train or test, at most 4,096 records each."""
        train, records = self.options.train_records, self.options.records
        first, stop = (0, train) if part == "train" else (train, records)
        for number, start in enumerate(range(first, stop, generate.HISTORY_CHUNK)):
            random = generate.random_stream(self.options.seed, 1 + 2 * number + (part == "test"))
            records_B = np.arange(start, min(start + generate.HISTORY_CHUNK, stop))
            yield records_B, *self._draw(random, len(records_B))

    def _draw(self, random: np.random.Generator, records: int) -> tuple[np.ndarray, np.ndarray]:
        options = self.options
        long_BN = random.random((records, options.length)) < _LONG
        noise_BN = random.random((records, options.length)) < _NOISE
        noise_BN[:, 0] = False
        fraction_BN = random.random((records, options.length))
        gaps_BN = np.where(long_BN, _log_uniform(_LONG_SECONDS, fraction_BN), _log_uniform(_SHORT_SECONDS, fraction_BN))
        gaps_BN = gaps_BN.astype(np.int64)
        gaps_BN[:, 0] = random.integers(generate.START_SECOND, generate.START_SECOND + _YEAR_SECONDS, records)
        pick_BN = random.random((records, options.length))
        home_B = random.integers(0, options.categories, records)
        items_BN = np.empty((records, options.length), dtype=np.int64)
        cluster_B = home_B
        for n in range(options.length):
            if n:
                after_B = (self.cluster_of_item[items_BN[:, n - 1]] + 1) % options.categories
                cluster_B = np.where(long_BN[:, n], home_B, after_B)
            place_B = self._start_K[cluster_B] + (pick_BN[:, n] * self.size_K[cluster_B]).astype(np.int64)
            place_B = np.where(noise_BN[:, n], (pick_BN[:, n] * options.items).astype(np.int64), place_B)
            items_BN[:, n] = self._by_cluster[place_B]
        return items_BN, np.cumsum(gaps_BN, axis=1)


def write_time_stream(options: StreamOptions, folder: Path, source: str = "gr prepare synthetic-time") -> dict:
    """Write folder/train, folder/test and folder/oracle.json; returns the content of oracle.json."""
    stream = TimeStream(options)
    for part in ("train", "test"):
        generate.write_histories(
            folder / part,
            (generate.equal_length_users(*chunk) for chunk in stream.chunks(part)),
            HistoryColumns(timestamps=True),
            items=options.items,
            name=f"synthetic-time-{part}",
            source=generate.stated(source, options, f", {part}"),
        )
    return generate.write_oracle(folder, time_oracles(stream))


def time_oracles(stream: TimeStream) -> dict:
    """Best possible metrics for the newest event of the test records, with and without the gap before it.

    Both oracles know the cluster of every item, the ring, the noise and the history, and so home (the first item's
    cluster) and the last item's cluster. with_gap also knows whether the gap before the target is short or long.
    Items of one score tie: metrics are expected values over random order of ties. Protocols: gr/prepare/oracle.py
    by_protocol.
    """
    about, metrics = stream_oracle(
        stream.options,
        "cluster of each item, the ring, the noise, the history; with_gap also the gap before the target",
        stream.cluster_of_item,
        _scored(stream),
    )
    return about | metrics


def _scored(stream: TimeStream) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]]:
    """(items_BN, size_BK, score_BK by oracle) of the chunks of test."""
    clusters = stream.options.categories
    for _, items_BN, times_BN in stream.chunks("test"):
        home_BK = np.eye(clusters)[stream.cluster_of_item[items_BN[:, 0]]]
        after_BK = np.eye(clusters)[(stream.cluster_of_item[items_BN[:, -2]] + 1) % clusters]
        long_B1 = (times_BN[:, -1:] - times_BN[:, -2:-1] >= _LONG_SECONDS[0]).astype(float)
        beliefs = {"with_gap": long_B1, "without_gap": np.full_like(long_B1, _LONG)}
        scores = {}
        for name, belief_B1 in beliefs.items():
            cluster_BK = belief_B1 * home_BK + (1.0 - belief_B1) * after_BK
            scores[name] = (1.0 - _NOISE) * cluster_BK / stream.size_K + _NOISE / stream.options.items
        yield items_BN, np.broadcast_to(stream.size_K, home_BK.shape), scores


def _log_uniform(bounds: tuple[int, int], fraction: np.ndarray) -> np.ndarray:
    low, high = bounds
    return low * (high / low) ** fraction
