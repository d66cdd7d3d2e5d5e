"""A stream of records from a Dirichlet process over item categories (arXiv 2402.17152, section 3.2 and appendix C).

The generator, all of it from one seed (and numpy's sampling methods, which a new numpy may change):

1.  Items are ids 1..items. Each is in one category, drawn uniformly; the first `categories` ids are one of each, so
    that no category is empty at any time.
2.  Record r of R sees items 1..floor((s + (1 - s) r / R) items): a share s (0.4 in the paper) at the start, the rest
    at equal intervals. With s = 1 the stream is stationary.
3.  A record has k categories, k uniform on 1..5, distinct, drawn uniformly; a prior H over them, Dirichlet(1, ..., 1);
    and a strength alpha, uniform on [1, 500).
4.  Event n = 1, 2, ... has category c with probability (alpha H_c + n_c) / (alpha + n - 1), where n_c counts the
    record's earlier events of c (a Polya urn; the appendix's draw from H with probability alpha / (alpha + n - 1),
    else an old category in proportion to n_c).
5.  The item is uniform over the available items of its category, with replacement. The paper does not say how items
    are chosen, so its absolute numbers are not promised; compare with the oracle and with other models on this stream.

The last records, a tenth unless test_records says how many, are test/, the others train/; file order is time order;
without timestamps.
Train with data.shuffle=false, data.train_holdout=0 for one pass, and evaluate on the newest event of test/.

B records of a chunk, N events of a record, G = 5 slots for the categories of a record.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gr.errors import ConfigError
from gr.prepare import generate
from gr.prepare.oracle import stream_oracle
from gr.prepare.stream_loss import LARGEST_ALPHA, LEAST_ALPHA, SLOTS, mean_losses
from gr.schema import HistoryColumns

_TRAIN_TENTHS = 9


@dataclass(frozen=True)
class StreamOptions:
    """Size of a stream. Raises ConfigError on sizes the definition does not allow."""

    items: int = generate.size(20_000, "Item ids 1..items.", at_least=1)
    categories: int = generate.size(100, "Groups of items.", at_least=1)
    records: int = generate.size(1_000_000, "Users, those of test included.", at_least=1)
    length: int = generate.size(128, "Events of each record.", at_least=1)
    test_records: int = generate.size(0, "Users of test, the last of all. 0: a tenth.", at_least=0)
    at_start: float = generate.size(0.4, "Share of the items that are there from the first record.")
    seed: int = generate.seed()

    def __post_init__(self) -> None:
        if self.categories < SLOTS:
            raise ConfigError(
                f"categories={self.categories}: a record has up to {SLOTS} categories, so at least {SLOTS}"
            )
        if not 0 < self.at_start <= 1:
            raise ConfigError(f"at_start={self.at_start}: a share of the items, above 0 and up to 1")
        if int(self.at_start * self.items) < self.categories:
            raise ConfigError(
                f"items={self.items}: the {100 * self.at_start:g} % there at the start must hold each of "
                f"{self.categories} categories; set items to at least {math.ceil(self.categories / self.at_start)}"
            )
        if self.test_records >= self.records:
            raise ConfigError(f"test_records={self.test_records}: all of records={self.records} and none to train on")
        if self.length < 2 or self.records < 10:
            raise ConfigError(f"length={self.length} must be at least 2 and records={self.records} at least 10")

    @property
    def train_records(self) -> int:
        return self.records - self.test_records if self.test_records else self.records * _TRAIN_TENTHS // 10


@dataclass(frozen=True)
class Chunk:
    """Records and the latent values they were drawn from. Unused slots have prior 0 and category 0.

    record_B: number of the record; items_BN, category_BG, prior_BG, alpha_B; available_BG: items of the slot's category
    that are available; count_BG: events of each slot before the last event.
    """

    record_B: np.ndarray
    items_BN: np.ndarray
    category_BG: np.ndarray
    prior_BG: np.ndarray
    alpha_B: np.ndarray
    available_BG: np.ndarray
    count_BG: np.ndarray


class Stream:
    """The stream of one set of options; chunks can be drawn in any order."""

    def __init__(self, options: StreamOptions) -> None:
        self.options = options
        random = generate.random_stream(options.seed, 0)
        one_of_each = random.permutation(options.categories)
        rest = random.integers(0, options.categories, options.items - options.categories)
        self.category_of_item = np.concatenate([[-1], one_of_each, rest])  # [items + 1], id 0 is in none
        self._by_category = np.argsort(self.category_of_item[1:], kind="stable") + 1
        self._start = np.searchsorted(self.category_of_item[self._by_category], np.arange(options.categories))
        self._keys = self.category_of_item[self._by_category] * (options.items + 1) + self._by_category

    def chunks(self, first: int, stop: int) -> Iterator[Chunk]:
        """Records [first, stop) in order, in chunks of at most 4,096."""
        yield from generate.rows_between(self._draw, generate.HISTORY_CHUNK, first, stop)

    def _draw(self, number: int) -> Chunk:
        options, random = self.options, generate.random_stream(self.options.seed, number + 1)
        record_B = number * generate.HISTORY_CHUNK + np.arange(generate.HISTORY_CHUNK)
        used_BG = np.arange(SLOTS) < random.integers(1, SLOTS + 1, generate.HISTORY_CHUNK)[:, None]
        category_BG = np.where(used_BG, _distinct(random, generate.HISTORY_CHUNK, options.categories), 0)
        weight_BG = random.standard_exponential((generate.HISTORY_CHUNK, SLOTS)) * used_BG
        prior_BG = weight_BG / weight_BG.sum(axis=1, keepdims=True)
        alpha_B = random.uniform(LEAST_ALPHA, LARGEST_ALPHA, generate.HISTORY_CHUNK)
        slot_BN, count_BG = _categories_of_events(random, prior_BG, alpha_B, options.length)
        later_B = (1 - options.at_start) * np.minimum(record_B, options.records - 1) / options.records
        limit_B = ((options.at_start + later_B) * options.items).astype(np.int64)
        ends = np.searchsorted(self._keys, category_BG * (options.items + 1) + limit_B[:, None], side="right")
        available_BG = ends - self._start[category_BG]
        pick_BN = random.random(slot_BN.shape) * np.take_along_axis(available_BG, slot_BN, axis=1)
        start_BN = np.take_along_axis(self._start[category_BG], slot_BN, axis=1)
        items_BN = self._by_category[start_BN + pick_BN.astype(np.int64)]
        return Chunk(record_B, items_BN, category_BG, prior_BG, alpha_B, available_BG, count_BG)


def write_stream(options: StreamOptions, folder: Path, source: str = "gr prepare synthetic") -> dict:
    """Write folder/train, folder/test and folder/oracle.json; returns the content of oracle.json."""
    stream, split = Stream(options), options.train_records
    for part, first, stop in (("train", 0, split), ("test", split, options.records)):
        generate.write_histories(
            folder / part,
            (generate.equal_length_users(chunk.record_B, chunk.items_BN) for chunk in stream.chunks(first, stop)),
            HistoryColumns(),
            items=options.items,
            name=f"synthetic-{part}",
            source=generate.stated(source, options, f", records {first} to {stop - 1}"),
        )
    return generate.write_oracle(folder, bayes_oracle(stream))


def bayes_oracle(stream: Stream) -> dict:
    """Best possible metrics for the newest event of the test records, which no model can exceed in expectation.

    The oracle knows the generator and, of each record, its categories, prior H and alpha (which a model can only
    infer), the category of every item, which items are available, and the history. It does not know the last event.
    It scores an available item of category c with its exact probability (alpha H_c + n_c) / (alpha + N - 1) /
    available_c; items of one category tie, so metrics are expected values over random order of ties. Protocols:
    gr/prepare/oracle.py by_protocol. `loss` knows less: the generator and the category of every item, and of a record
    its history alone (gr/prepare/stream_loss.py).
    """
    about, metrics = stream_oracle(
        stream.options,
        "categories, prior and alpha of each record, category and availability of each item, the history",
        stream.category_of_item,
        _scored(stream),
    )
    options = stream.options
    tested = stream.chunks(options.train_records, options.records)
    loss = float(np.concatenate([_least_losses(stream, chunk) for chunk in tested]).mean())
    return about | {"loss": loss} | metrics["oracle"]


def _least_losses(stream: Stream, chunk: Chunk) -> np.ndarray:
    """The mean loss of exact inference on each record, nats an event, [B]."""
    own_BG = np.where(chunk.prior_BG > 0, chunk.category_BG, -1)
    ends_B2 = stream.category_of_item[chunk.items_BN[:, [0, -1]]]
    first_B, last_B = ((own_BG == ends_B2[:, [end]]).argmax(axis=1) for end in (0, 1))
    count_BG = chunk.count_BG + (np.arange(SLOTS) == last_B[:, None])
    return mean_losses(count_BG, first_B, chunk.available_BG, stream.options.categories)


def _scored(stream: Stream) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]]:
    """(items_BN, candidates of each category [B, C], {"oracle": score of each [B, C]}) of the test records."""
    options = stream.options
    for chunk in stream.chunks(options.train_records, options.records):
        row, slot = np.nonzero(chunk.prior_BG > 0)
        category = chunk.category_BG[row, slot]
        size_BC = np.zeros((len(chunk.items_BN), options.categories), dtype=np.int64)
        size_BC[row, category] = chunk.available_BG[row, slot]
        score_BC = np.zeros(size_BC.shape)
        weight_BG = chunk.alpha_B[:, None] * chunk.prior_BG + chunk.count_BG
        score_BC[row, category] = (weight_BG / chunk.available_BG)[row, slot]
        yield chunk.items_BN, size_BC, {"oracle": score_BC}


def _categories_of_events(
    random: np.random.Generator, prior_BG: np.ndarray, alpha_B: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Slots drawn, int8 [B, N], and how often each was drawn before the last event, int64 [B, G]."""
    counts_BG, row_B = np.zeros(prior_BG.shape, dtype=np.int64), np.arange(len(prior_BG))
    weight_BG = alpha_B[:, None] * prior_BG
    slot_BN = np.empty((len(prior_BG), length), dtype=np.int8)
    slots_B = (prior_BG > 0).sum(axis=1)
    for n in range(length):
        if n:
            counts_BG[row_B, slot_BN[:, n - 1]] += 1
            weight_BG[row_B, slot_BN[:, n - 1]] += 1.0
        slot_BN[:, n] = generate.urn_slots(random, weight_BG, alpha_B + n, slots_B)
    return slot_BN, counts_BG


def _distinct(random: np.random.Generator, records: int, categories: int) -> np.ndarray:
    """SLOTS distinct categories for each record in random order, int64 [records, SLOTS]; Floyd's sampling, shuffled."""
    drawn = np.empty((records, SLOTS), dtype=np.int64)
    for slot in range(SLOTS):
        bound = categories - SLOTS + slot
        draw = random.integers(0, bound + 1, records)
        taken = (drawn[:, :slot] == draw[:, None]).any(axis=1)
        drawn[:, slot] = np.where(taken, bound, draw)
    return random.permuted(drawn, axis=1)
