"""TextDataset and TextPass: documents of token ids, packed into examples of one length.

Each token but a document's last is one place of the stream: a token with the one that follows it. N places are an
example. A document goes on in the next example where it is cut, as a sequence that begins at its own place 0.
T tokens of a batch on this rank, B pieces of documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from gr.batch import TokenBatch
from gr.data.collate import Counts
from gr.data.columns import ColumnType, read_column
from gr.data.loader import Places, ResumableSource, checksums, rank_batch_size
from gr.data.order import TrainingOrder
from gr.data.parquet import Parts
from gr.errors import ConfigError, DataError
from gr.logging import get_logger, log_once
from gr.schema import TextSchema

log = get_logger(__name__)
TOKENS, LENGTH, PROMPT = "tokens", "length", "prompt_length"


@dataclass(frozen=True)
class Documents:
    """Documents of one row group. ids_T: packed. offsets_B1: int64. prompt_B: tokens of each that are its prompt."""

    ids_T: np.ndarray
    offsets_B1: np.ndarray
    prompt_B: np.ndarray


class TextDataset:
    """A text folder: schema, row groups known from footers, and documents read on demand. Safe to read from threads.

    lengths_D: int64, the tokens of every document, in file order.
    """

    def __init__(self, path: Path, schema: TextSchema, parts: Parts) -> None:
        self.path, self.schema, self._parts = path, schema, parts
        self.row_groups, self.row_counts = parts.row_groups, parts.row_counts
        lengths = [self._column(index, LENGTH) for index in range(len(parts.row_groups))]
        self.lengths_D = np.concatenate([np.empty(0, dtype=np.int64), *lengths])

    @classmethod
    def open(cls, path: Path | str, schema: TextSchema) -> "TextDataset":
        """Reads the footers and the lengths. Raises DataError, naming file and column, where they do not fit schema."""
        path = Path(path)
        types = {TOKENS: ColumnType("id", True), LENGTH: ColumnType("id")}
        if schema.prompts:
            types[PROMPT] = ColumnType("id")
        parts = Parts.open(path, types)
        for problem in parts.wrong_rows(path, "documents", schema.documents):
            raise DataError(problem)
        dataset = cls(path, schema, parts)
        if (tokens := int(dataset.lengths_D.sum())) != schema.tokens:
            raise DataError(f"{path}: the column {LENGTH} adds up to {tokens}, schema.json says tokens={schema.tokens}")
        return dataset

    def _column(self, index: int, name: str) -> np.ndarray:
        group, table = self._parts.read(index, [name])
        column = read_column(table.column(name), ColumnType("id"))
        if column.nulls.any() or column.lost is not None or (column.filled < 0).any():
            raise DataError(f"{group}, column {name}: has a value that is no number of tokens, or none")
        return column.filled.astype(np.int64)

    def read_row_group(self, index: int) -> Documents:
        """Decodes and checks one row group. Raises DataError, naming row and value, where it does not fit schema."""
        group, table = self._parts.read(index, [TOKENS])
        column = read_column(table.column(TOKENS), ColumnType("id", True))
        ids_T, offsets_B1 = column.filled, column.offsets
        assert offsets_B1 is not None, "it is a list"
        length_B = self._column(index, LENGTH)
        prompt_B = self._column(index, PROMPT) if self.schema.prompts else np.zeros(len(length_B), dtype=np.int64)
        wrong_T = (ids_T < 0) | (ids_T >= self.schema.vocabulary) | column.missing()
        if column.lost is not None:
            wrong_T |= column.lost
        for wrong, problem in (
            (np.diff(offsets_B1) != length_B, f"has another number of tokens than column {LENGTH} says"),
            (prompt_B > length_B, f"has a {PROMPT} beyond its tokens"),
        ):
            if wrong.any():
                raise DataError(
                    f"{group}, row {int(wrong.argmax())}: {problem}; correct it where the folder is written"
                )
        if wrong_T.any():
            place = int(wrong_T.argmax())
            row = int(np.searchsorted(offsets_B1, place, side="right")) - 1
            raise DataError(
                f"{group}, row {row}, column {TOKENS}: is {column.stored[place].as_py()}, allowed are ids from 0 to "
                f"{self.schema.vocabulary - 1}; prepare the text again"
            )
        return Documents(ids_T, offsets_B1, prompt_B)


class TextPass(ResumableSource[Documents, TokenBatch]):
    """Examples [b*G, (b+1)*G) of a pass over the documents, of which rank r takes the r-th of world_size equal slices.

    The cursor is the step: batches before this one.
    """

    order_name = "pass over the text"
    identity_keys = "data folder, data.max_length, batch size and seed"
    read_threads = prefetch = 2
    capacity = 4

    def __init__(
        self,
        dataset: TextDataset,
        *,
        global_batch_size: int,
        max_length: int,
        rank: int,
        world_size: int,
        shuffle_seed: int | None = None,
        drop_last: bool = True,
        epochs: int = 1,
    ) -> None:
        """global_batch_size: G, examples of max_length = N tokens a step over all ranks. shuffle_seed: documents in
        another random order in each epoch, the same at any world size; None: in file order. drop_last: leave out the
        last tokens of an epoch, which fill no batch.

        Raises ConfigError if the world size does not divide G or there is no whole batch.
        """
        self._own = rank_batch_size("global_batch_size", global_batch_size, world_size) * max_length
        self._dataset, self._rank, self._length = dataset, rank, max_length
        self._size = global_batch_size * max_length
        self._order = TrainingOrder(
            dataset.row_counts, lanes=1, seed=shuffle_seed or 0, shuffle=shuffle_seed is not None
        )
        self._places = int(np.maximum(dataset.lengths_D - 1, 0).sum())
        batches, rest = divmod(self._places, self._size)
        self._batches = batches if drop_last or not rest else batches + 1
        self._dropped = rest if drop_last else 0
        self.stop = epochs * self._batches
        self._epoch = lru_cache(maxsize=2)(self._ordered)
        if not self.stop:
            raise ConfigError(
                f"{dataset.path}: {self._places} tokens that another follows do not fill one batch of "
                f"{global_batch_size} examples of {max_length}; set a smaller batch size or data.max_length"
            )
        if self._dropped:
            log_once(log, f"{dataset.path}: the last {rest} tokens of an epoch do not fill a batch: left out")
        self.identity = {
            "global_batch_size": global_batch_size,
            "max_length": max_length,
            "shuffle_seed": shuffle_seed,
            **checksums(dataset.row_counts, dataset.schema),
        }

    def read(self, row_group: int) -> Documents:
        return self._dataset.read_row_group(row_group)

    def steps(self, epochs: int) -> int:
        return epochs * self._batches

    def _ordered(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of an epoch that have places, in their order, and the first place of each and the end."""
        rows_D = self._order.lane_rows(0, epoch * self._order.rows, self._order.rows)
        rows_D = rows_D[self._dataset.lengths_D[rows_D] > 1]
        return rows_D, np.concatenate([[0], np.cumsum(self._dataset.lengths_D[rows_D] - 1)])

    def _span(self, cursor: int) -> tuple[int, int, int, int, int]:
        """Epoch, this rank's places [start, stop) in it, and the documents [first, last) that have them."""
        epoch, batch = divmod(cursor, self._batches)
        start = min(batch * self._size + self._rank * self._own, self._places)
        stop = min(start + self._own, self._places)
        _, begins_D1 = self._epoch(epoch)
        first = int(np.searchsorted(begins_D1, start, side="right")) - 1
        last = int(np.searchsorted(begins_D1, stop, side="left"))
        return epoch, start, stop, first, last if stop > start else first

    def rows(self, cursor: int) -> Places:
        epoch, _, _, first, last = self._span(cursor)
        return self._order.locate(self._epoch(epoch)[0][first:last])

    def collate(self, cursor: int, groups: Sequence[Documents], places: Places) -> tuple[TokenBatch, Counts]:
        epoch, start, stop, first, last = self._span(cursor)
        begins_D1 = self._epoch(epoch)[1]
        ids, targets, scored = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, bool)]
        for group_index, row in zip(*places, strict=True):
            group = groups[group_index]
            document = group.ids_T[group.offsets_B1[row] : group.offsets_B1[row + 1]].astype(np.int64)
            ids.append(document[:-1])
            targets.append(document[1:])
            scored.append(np.arange(1, len(document)) >= group.prompt_B[row])
        lead = start - int(begins_D1[first]) if last > first else 0
        own = slice(lead, lead + stop - start)
        # A piece ends where its document ends, and where an example does.
        bounds = np.concatenate([begins_D1[first : last + 1] - start, np.arange(0, stop - start, self._length)])
        offsets_B1 = np.unique(np.append(bounds.clip(0, stop - start), (0, stop - start)))
        batch = TokenBatch(
            ids_T=torch.from_numpy(np.concatenate(ids)[own]),
            target_ids_T=torch.from_numpy(np.concatenate(targets)[own]),
            scored_T=torch.from_numpy(np.concatenate(scored)[own]),
            offsets_B1=torch.from_numpy(offsets_B1.astype(np.int64)),
        )
        return batch, Counts()

    def counters(self, counts: Counts) -> dict[str, int]:
        """Places of an epoch that no rank gives: those after the last whole batch."""
        return {"dropped_tokens": self._dropped}
