"""A stream of records from a Dirichlet process over item categories (arXiv 2402.17152, section 3.2 and appendix C).

The generator, all of it from one seed (and numpy's sampling methods, which a new numpy may change):

1.  Items are ids 1..items. Each is in one category, drawn uniformly; the first `categories` ids are one of each, so
    that no category is empty at any time.
2.  Record r of R sees items 1..floor((0.4 + 0.6 r / R) items): 40 % at the start, the rest at equal intervals.
3.  A record has k categories, k uniform on 1..5, distinct, drawn uniformly; a prior H over them, Dirichlet(1, ..., 1);
    and a strength alpha, uniform on [1, 500).
4.  Event n = 1, 2, ... has category c with probability (alpha H_c + n_c) / (alpha + n - 1), where n_c counts the
    record's earlier events of c (a Polya urn; the appendix's draw from H with probability alpha / (alpha + n - 1),
    else an old category in proportion to n_c).
5.  The item is uniform over the available items of its category, with replacement. The paper does not say how items
    are chosen, so its absolute numbers are not promised; compare with the oracle and with other models on this stream.

The first 90 % of the records are train/, the last 10 % test/, file order is time order; there are no timestamps.
Train with data.shuffle=false, data.train_holdout=0 for one pass, and evaluate on the newest event of test/.

B records of a chunk, N events of a record, G = 5 slots for the categories of a record.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gr.errors import ConfigError
from gr.prepare.oracle import averaged, by_protocol, seen_in_groups
from gr.prepare.write import ROWS_PER_GROUP, FolderWriter, Users
from gr.schema import HistoryColumns

SLOTS = 5
_CHUNK = (
    8 * ROWS_PER_GROUP
)  # records drawn together; part of the definition, since each chunk has its own random stream
_AVAILABLE_AT_START = 0.4
_TRAIN_TENTHS = 9
ORACLE_FILE = "oracle.json"


@dataclass(frozen=True)
class StreamOptions:
    """Size of a stream. length: events of each record. Raises ConfigError on sizes the definition does not allow."""

    items: int = 20_000
    categories: int = 100
    records: int = 1_000_000
    length: int = 128
    seed: int = 1

    def __post_init__(self) -> None:
        if self.categories < SLOTS:
            raise ConfigError(
                f"categories={self.categories}: a record has up to {SLOTS} categories, so at least {SLOTS}"
            )
        if int(_AVAILABLE_AT_START * self.items) < self.categories:
            raise ConfigError(
                f"items={self.items}: the 40 % there at the start must hold each of {self.categories} categories; "
                f"set items to at least {-(-self.categories * 5 // 2)}"
            )
        if self.length < 2 or self.records < 10:
            raise ConfigError(f"length={self.length} must be at least 2 and records={self.records} at least 10")

    @property
    def train_records(self) -> int:
        return self.records * _TRAIN_TENTHS // 10


@dataclass(frozen=True)
class Chunk:
    """Records and the latent values they were drawn from. Unused slots have prior 0 and category 0.

    items_BN, category_BG, prior_BG, alpha_B; available_BG: items of the slot's category that are there; count_BG:
    events of each slot before the last event; last_B: slot of the last event.
    """

    first: int
    items_BN: np.ndarray
    category_BG: np.ndarray
    prior_BG: np.ndarray
    alpha_B: np.ndarray
    available_BG: np.ndarray
    count_BG: np.ndarray
    last_B: np.ndarray


class Stream:
    """The stream of one set of options; chunks can be drawn in any order."""

    def __init__(self, options: StreamOptions) -> None:
        self.options = options
        random = random_stream(options.seed, 0)
        one_of_each = random.permutation(options.categories)
        rest = random.integers(0, options.categories, options.items - options.categories)
        self.category_of_item = np.concatenate([[-1], one_of_each, rest])  # [items + 1], id 0 is in none
        self._by_category = np.argsort(self.category_of_item[1:], kind="stable") + 1
        self._start = np.searchsorted(self.category_of_item[self._by_category], np.arange(options.categories))
        self._keys = self.category_of_item[self._by_category] * (options.items + 1) + self._by_category

    def chunks(self, first: int, stop: int) -> Iterator[Chunk]:
        """Records [first, stop) in order, in chunks of at most 4,096."""
        for number in range(first // _CHUNK, -(-stop // _CHUNK)):
            chunk = self._draw(number)
            keep = slice(max(first - chunk.first, 0), min(stop - chunk.first, _CHUNK))
            kept = {name: value[keep] for name, value in vars(chunk).items() if name != "first"}
            yield Chunk(chunk.first + keep.start, **kept)

    def _draw(self, number: int) -> Chunk:
        options, random = self.options, random_stream(self.options.seed, number + 1)
        first = number * _CHUNK
        record_B = np.minimum(np.arange(first, first + _CHUNK), options.records - 1)
        used_BG = np.arange(SLOTS) < random.integers(1, SLOTS + 1, _CHUNK)[:, None]
        category_BG = np.where(used_BG, _distinct(random, _CHUNK, options.categories), 0)
        weight_BG = random.standard_exponential((_CHUNK, SLOTS)) * used_BG
        prior_BG = weight_BG / weight_BG.sum(axis=1, keepdims=True)
        alpha_B = random.uniform(1.0, 500.0, _CHUNK)
        slot_BN, count_BG = _urn(random, prior_BG, alpha_B, options.length)
        fraction_B = _AVAILABLE_AT_START + (1 - _AVAILABLE_AT_START) * record_B / options.records
        there_B = (fraction_B * options.items).astype(np.int64)
        ends = np.searchsorted(self._keys, category_BG * (options.items + 1) + there_B[:, None], side="right")
        available_BG = ends - self._start[category_BG]
        pick_BN = random.random((_CHUNK, options.length)) * np.take_along_axis(available_BG, slot_BN, axis=1)
        start_BN = np.take_along_axis(self._start[category_BG], slot_BN, axis=1)
        items_BN = self._by_category[start_BN + pick_BN.astype(np.int64)]
        return Chunk(
            first, items_BN, category_BG, prior_BG, alpha_B, available_BG, count_BG, slot_BN[:, -1].astype(np.int64)
        )


def write_stream(options: StreamOptions, folder: Path, source: str = "gr prepare synthetic") -> dict:
    """Write folder/train, folder/test and folder/oracle.json; returns what oracle.json says."""
    stream = Stream(options)
    corpus = np.arange(1, options.items + 1)
    split = options.train_records
    with tqdm(total=options.records, unit="record", desc="synthetic", disable=None) as bar:
        for part, first, stop in (("train", 0, split), ("test", split, options.records)):
            writer = FolderWriter(folder / part, HistoryColumns(), item_cardinality=options.items + 1)
            for chunk in _whole_groups(stream, first, stop):
                writer.write(as_users(chunk.first, chunk.items_BN))
                bar.update(len(chunk.items_BN))
            stated = f"{source} {json.dumps(asdict(options))}, records {first} to {stop - 1}"
            writer.close(name=f"synthetic-{part}", order="as generated, oldest first", source=stated, corpus=corpus)
    oracle = bayes_oracle(stream)
    (folder / ORACLE_FILE).write_text(json.dumps(oracle, indent=2) + "\n", encoding="utf-8")
    return oracle


def bayes_oracle(stream: Stream) -> dict:
    """Best possible metrics for the newest event of the test records, which no model can exceed in expectation.

    The oracle knows the generator and, of each record, its categories, prior H and alpha (which a model can only
    infer), the category of every item, which items are available, and the history. It does not know the last event.
    It scores an available item of category c with its exact probability (alpha H_c + n_c) / (alpha + N - 1) /
    available_c; items of one category tie, so metrics are expected values over random order of ties. Protocols:
    gr/prepare/oracle.py by_protocol.
    """
    options, ranks, repeats = stream.options, [], []
    for chunk in stream.chunks(options.train_records, options.records):
        weight_BG = chunk.alpha_B[:, None] * chunk.prior_BG + chunk.count_BG
        size_BG = np.where(chunk.prior_BG > 0, chunk.available_BG, 0)
        history_BN, target_B = chunk.items_BN[:, :-1], chunk.items_BN[:, -1]
        seen_BC = seen_in_groups(history_BN, target_B, stream.category_of_item, options.categories)
        seen_BG = np.where(chunk.prior_BG > 0, np.take_along_axis(seen_BC, chunk.category_BG, axis=1), 0)
        repeats.append((history_BN == target_B[:, None]).any(axis=1))
        ranks.append(by_protocol(weight_BG / chunk.available_BG, size_BG, seen_BG, chunk.last_B, repeats[-1]))
    return {
        "options": asdict(options),
        "target": "newest event of each record of test/",
        "records": options.records - options.train_records,
        "repeated_targets": float(np.concatenate(repeats).mean()),
        "knows": "categories, prior and alpha of each record, category and availability of each item, the history",
    } | averaged(ranks)


def as_users(first: int, items_BN: np.ndarray, times_BN: np.ndarray | None = None) -> Users:
    """Records of equal length as users numbered from `first`."""
    offsets = np.arange(len(items_BN) + 1, dtype=np.int64) * items_BN.shape[1]
    users = np.arange(first, first + len(items_BN))
    return Users(users, offsets, items_BN.ravel(), None if times_BN is None else times_BN.ravel())


def _whole_groups(stream: Stream, first: int, stop: int) -> Iterator[Chunk]:
    """Chunks of [first, stop) that each begin a row group of the file: the split may cut a chunk anywhere."""
    held: Chunk | None = None
    for chunk in stream.chunks(first, stop):
        chunk = chunk if held is None else _joined(held, chunk)
        whole = len(chunk.items_BN) // ROWS_PER_GROUP * ROWS_PER_GROUP
        held = _cut(chunk, whole, len(chunk.items_BN))
        if whole:
            yield _cut(chunk, 0, whole)
    if held is not None and len(held.items_BN):
        yield held


def _cut(chunk: Chunk, start: int, stop: int) -> Chunk:
    parts = {name: value[start:stop] for name, value in vars(chunk).items() if name != "first"}
    return Chunk(chunk.first + start, **parts)


def _joined(one: Chunk, two: Chunk) -> Chunk:
    parts = {name: np.concatenate([value, vars(two)[name]]) for name, value in vars(one).items() if name != "first"}
    return Chunk(one.first, **parts)


def _urn(
    random: np.random.Generator, prior_BG: np.ndarray, alpha_B: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Slots drawn, int8 [B, N], and how often each was drawn before the last event, int64 [B, G]."""
    records = len(prior_BG)
    weight_BG = alpha_B[:, None] * prior_BG
    counts_BG, row_B = np.zeros((records, SLOTS), dtype=np.int64), np.arange(records)
    slot_BN = np.empty((records, length), dtype=np.int8)
    last_used_B = (prior_BG > 0).sum(axis=1) - 1
    for n in range(length):
        if n:
            counts_BG[row_B, slot_BN[:, n - 1]] += 1
            weight_BG[row_B, slot_BN[:, n - 1]] += 1.0
        level_B = random.random(records) * (alpha_B + n)
        drawn_B = (np.cumsum(weight_BG, axis=1) <= level_B[:, None]).sum(axis=1)
        slot_BN[:, n] = np.minimum(drawn_B, last_used_B)  # rounding may put the level at the very end
    return slot_BN, counts_BG


def _distinct(random: np.random.Generator, records: int, categories: int) -> np.ndarray:
    """SLOTS distinct categories for each record in random order, int64 [records, SLOTS]; Floyd's sampling, shuffled."""
    out = np.empty((records, SLOTS), dtype=np.int64)
    for slot in range(SLOTS):
        bound = categories - SLOTS + slot
        draw = random.integers(0, bound + 1, records)
        taken = (out[:, :slot] == draw[:, None]).any(axis=1)
        out[:, slot] = np.where(taken, bound, draw)
    return random.permuted(out, axis=1)


def random_stream(seed: int, stream: int) -> np.random.Generator:
    """Numbers of their own for each (seed, stream)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)))
