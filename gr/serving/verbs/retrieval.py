"""`retrieve`: the best items for a history, in the log's own ids.

T events, B requests, F features of an item, E items, D width, K results.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from gr.data.vocabulary import Vocabulary
from gr.errors import nearest
from gr.serving.index.exact import Seen
from gr.serving.servable import Encoded, RequestError, TensorSpec
from gr.serving.tables.id_rows import ALL_DENSE, IdRows
from gr.serving.verbs.request_ids import ids_of

FilterSeen = Literal["window", "all", "none"]
ITEM = "item_id"
HISTORY, TIMES, K, ITEMS, SCORES = "history", "times", "k", "items", "scores"
DEFAULT_K = 100
_NO_SCORES = np.empty(0, np.float32)


class Index(Protocol):
    """ExactIndex or ApproximateIndex."""

    def __len__(self) -> int: ...

    def top(self, queries_BD: Tensor, k: int, seen: Seen | None = None) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class RetrieveRequest:
    """ids_T: int64, the newest known events, oldest first; rows_T: the rows of their items. times_T: int64. seen_S:
    int64, items that are left out.
    """

    ids_T: np.ndarray
    rows_T: np.ndarray
    times_T: np.ndarray
    seen_S: np.ndarray
    k: int

    @property
    def rows(self) -> int:
        """The events that the model reads."""
        return len(self.ids_T)


@dataclass(frozen=True)
class RetrievalForm:
    """The part of a model's configuration on which its requests depend."""

    max_length: int
    item_cardinality: int
    timed: bool
    filter_seen: FilterSeen
    unknown: Literal["zero", "reject"]


class RetrieveServable:
    """The verb `retrieve`. One request is one history; requests of a batch share the search of the index."""

    def __init__(
        self,
        form: RetrievalForm,
        items: Vocabulary,
        item_features: Sequence[np.ndarray],
        index: Index,
        query: Callable[[Tensor, Tensor], Sequence[Tensor]],
        count_unknown: Callable[[Mapping[str, int]], None],
        id_rows: IdRows = ALL_DENSE,
    ) -> None:
        """item_features: the rows of each feature by item, in the order in which the pass reads them after the item's
        own. query: QueryPass, compiled or not, in a sequence of one. id_rows: of raw item ids.
        """
        self.form, self._items, self._index, self._query = form, items, index, query
        self._features_FE = [torch.from_numpy(ids_E).int() for ids_E in item_features]
        self._count_unknown, self._id_rows = count_unknown, id_rows
        self.inputs: Sequence[TensorSpec]
        self.outputs: Sequence[TensorSpec]
        self.inputs, self.outputs = tensors(items, form)

    def encode(self, columns: Mapping[str, np.ndarray]) -> RetrieveRequest:
        """columns: history, oldest first; times, whole seconds, where the tower reads time; k, 100 unless given.

        Events of items that the model does not know are left out and counted; those of raw ids that have no row read a
        shared one and are counted. Raises RequestError.
        """
        known = [spec.name for spec in self.inputs]
        for name in columns:
            if name not in known:
                raise RequestError(name, f"`retrieve` has no such input; {nearest(name, known, 'it has')}")
        for name in known:
            if name not in columns and name != K:
                raise RequestError(name, "is missing")
        ids_T = ids_of(HISTORY, np.asarray(columns[HISTORY]), self._items, self.form.item_cardinality)
        known_T = ids_T > 0
        rows_T, shared_T = self._id_rows.rows(ITEM, ids_T)
        if unknown := int((~known_T | shared_T).sum()):
            self._count_unknown({HISTORY: unknown})
            if self.form.unknown == "reject":
                raise RequestError(HISTORY, f"{unknown} of its items were not seen in training, which is refused here")
        times_T = self._times(columns, len(ids_T))[known_T]
        ids_T, rows_T = ids_T[known_T], rows_T[known_T]
        newest = slice(-self.form.max_length, None)
        window_T = ids_T[newest]
        seen = {"all": ids_T, "window": window_T, "none": ids_T[:0]}[self.form.filter_seen]
        return RetrieveRequest(window_T, rows_T[newest], times_T[newest], np.unique(seen), self._k(columns))

    def run(self, requests: Sequence[Encoded]) -> list[dict[str, np.ndarray]]:
        """Items and scores of each request, best first; fewer than k where fewer are left, none without history."""
        own = [each for each in requests if isinstance(each, RetrieveRequest)]
        assert len(own) == len(requests), "requests are encoded by the verb that runs them"
        asked = [request for request in own if request.rows]
        answers = iter(self._answers(asked) if asked else [])
        return [next(answers) if request.rows else self._answer(np.empty(0, np.int64), _NO_SCORES) for request in own]

    def _answers(self, requests: Sequence[RetrieveRequest]) -> list[dict[str, np.ndarray]]:
        queries_BD = torch.stack([self._query_of(request)[0] for request in requests])
        lengths_B = torch.tensor([len(request.seen_S) for request in requests])
        offsets_B1 = torch.nn.functional.pad(lengths_B.cumsum(0), (1, 0))
        seen = Seen(torch.from_numpy(np.concatenate([request.seen_S for request in requests])), offsets_B1)
        ids_BK, scores_BK = self._index.top(queries_BD, max(request.k for request in requests), seen)
        there_BK = (scores_BK > -torch.inf).numpy()
        rows = zip(requests, ids_BK.numpy(), scores_BK.numpy(), there_BK, strict=True)
        return [
            self._answer(ids_K[: r.k][there_K[: r.k]], scores_K[: r.k][there_K[: r.k]])
            for r, ids_K, scores_K, there_K in rows
        ]

    def _query_of(self, request: RetrieveRequest) -> Sequence[Tensor]:
        ids_T = torch.from_numpy(request.ids_T)
        ids_FT = torch.stack([torch.from_numpy(request.rows_T).int(), *(ids_E[ids_T] for ids_E in self._features_FE)])
        return self._query(ids_FT, torch.from_numpy(request.times_T))

    def _answer(self, ids_K: np.ndarray, scores_K: np.ndarray) -> dict[str, np.ndarray]:
        own = self._items
        items = ids_K if own.ids_V is None else own.values(ids_K).to_numpy(zero_copy_only=False)
        return {ITEMS: items, SCORES: scores_K}

    def _times(self, columns: Mapping[str, np.ndarray], T: int) -> np.ndarray:
        if not self.form.timed:
            return np.zeros(T, np.int64)
        times_T = np.asarray(columns[TIMES])
        if times_T.shape != (T,):
            raise RequestError(TIMES, f"has shape {list(times_T.shape)}, wanted [{T}], one for each event of {HISTORY}")
        if T and not np.issubdtype(times_T.dtype, np.integer):
            raise RequestError(TIMES, f"is of type {times_T.dtype}, wanted whole seconds since 1970")
        if (np.diff(times_T) < 0).any():
            raise RequestError(TIMES, "go back; events are oldest first")
        return times_T.astype(np.int64)

    def _k(self, columns: Mapping[str, np.ndarray]) -> int:
        if K not in columns:
            return min(DEFAULT_K, len(self._index))
        k = np.asarray(columns[K])
        if k.size != 1 or not np.issubdtype(k.dtype, np.integer):
            raise RequestError(K, f"is {k.dtype} of shape {list(k.shape)}, wanted one whole number")
        if not 1 <= int(k.reshape(())) <= len(self._index):
            raise RequestError(K, f"is {int(k.reshape(()))}; the index has {len(self._index)} items: 1 up to that")
        return int(k.reshape(()))


def tensors(items: Vocabulary, form: RetrievalForm) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs and outputs of `retrieve`."""
    own = "BYTES" if pa.types.is_string(items.type) else "INT64"
    timed = (TensorSpec(TIMES, "INT64", (-1,)),) if form.timed else ()
    inputs = (TensorSpec(HISTORY, own, (-1,)), *timed, TensorSpec(K, "INT64", (1,)))
    return inputs, (TensorSpec(ITEMS, own, (-1,)), TensorSpec(SCORES, "FP32", (-1,)))
