"""A saved retrieval model, asked in the log's own ids. B users, T events, K items, D width."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from gr.batch import ITEM_FEATURE, EvaluationBatch
from gr.data.collate import Rows, collate_evaluation
from gr.data.dataset import Histories, read_corpus, read_item_features
from gr.data.vocabulary import Vocabulary
from gr.errors import ConfigError, DataError
from gr.logging import get_logger
from gr.models.retrieval import RetrievalModel
from gr.models.saved import ALONE, Saved
from gr.tasks import CorpusRanker, require_product

log = get_logger(__name__)


class Recommendation(NamedTuple):
    item: Any
    score: float


class ItemVectors(NamedTuple):
    """ids: the items' own ids, [K]. vectors_KD: float32; the dot product with a user's vector is the score."""

    ids: pa.Array
    vectors_KD: Tensor


class SavedRetrieval(Saved):
    """Histories are lists of item ids, oldest first; times, lists of seconds for those, where the tower reads time."""

    model: RetrievalModel

    def __post_init__(self) -> None:
        features = read_item_features(self.folder, self.schema)
        self.model.item_features = {name: torch.from_numpy(ids_E) for name, ids_E in features.items()}

    @torch.no_grad()
    def recommend(
        self,
        histories: Sequence[Sequence[Any]],
        k: int = 20,
        *,
        times: Sequence[Sequence[int]] | None = None,
        filter_seen: Literal["window", "all", "none"] = "all",
    ) -> list[list[Recommendation]]:
        """The k best items for each history, best first; fewer where fewer are left, none for an empty history.

        Raises ConfigError for a k that the corpus does not have, DataError for items of another kind or missing times.
        """
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= len(self._ranker.ids):
            raise ConfigError(f"k={k}: the corpus has {len(self._ranker.ids)} items; set k to 1 up to that")
        if not len(histories):
            return []
        batch = self._batch(histories, times, filter_seen)
        queries_BD = self.model.user_vectors(batch)
        ids_BK, scores_BK = (part.cpu() for part in self._ranker.top(queries_BD, batch, k))
        there_BK = (scores_BK > -torch.inf) & batch.valid_B.cpu()[:, None]
        return [
            [
                Recommendation(*pair)
                for pair in zip(self._items.values(ids[there].numpy()).to_pylist(), scores[there].tolist(), strict=True)
            ]
            for ids, scores, there in zip(ids_BK, scores_BK, there_BK, strict=True)
        ]

    @torch.no_grad()
    def score(
        self, histories: Sequence[Sequence[Any]], items: Sequence[Any], *, times: Sequence[Sequence[int]] | None = None
    ) -> Tensor:
        """The score of each item for each history, float32 [B, K]. Raises DataError for an item that is not known."""
        ids_K = self._ids(items)
        if (unknown := ids_K == 0).any():
            raise DataError(f"item {items[int(unknown.argmax())]!r} is not known to the model")
        items_KD = self.model.similarity.items(self.model.item_vectors(torch.from_numpy(ids_K).to(self.device)))
        return self.model.similarity.scores(self._queries(histories, times), items_KD)

    def embed_items(self) -> ItemVectors:
        """The vectors of the whole corpus, as the model compares them. Raises ConfigError for a mixture of logits."""
        require_product(self.model.similarity, "embed_items")
        return ItemVectors(self._items.values(self._ranker.ids.cpu().numpy()), self._ranker.items)

    @torch.no_grad()
    def embed_users(
        self, histories: Sequence[Sequence[Any]], *, times: Sequence[Sequence[int]] | None = None
    ) -> Tensor:
        """The vector of each history, float32 [B, D]: its dot product with an item's vector is the score.

        Raises ConfigError for a mixture of logits.
        """
        require_product(self.model.similarity, "embed_users")
        return self._queries(histories, times)

    def _queries(self, histories: Sequence[Sequence[Any]], times: Sequence[Sequence[int]] | None) -> Tensor:
        """The vectors that the similarity compares with those of items, [B, C]."""
        if not len(histories):
            return self._ranker.items[:0]
        return self.model.user_vectors(self._batch(histories, times, "none"))

    def _ids(self, items: Sequence[Any]) -> np.ndarray:
        """The id of each item; 0 for one that the model does not know."""
        try:
            array = pa.array(items)
        except pa.ArrowException as error:
            raise DataError(f"items are of mixed kinds: {error}") from None
        ids = self._items.ids(array)
        return np.where((ids > 0) & (ids < self.schema.item_cardinality), ids, 0)

    @property
    def _items(self) -> Vocabulary:
        return self.vocabularies[ITEM_FEATURE]

    @cached_property
    @torch.no_grad()
    def _ranker(self) -> CorpusRanker:
        corpus_C, _ = read_corpus(self.folder, self.schema)
        return CorpusRanker(torch.tensor(corpus_C), self.model.item_vectors, self.model.similarity, ALONE)

    def _batch(
        self,
        histories: Sequence[Sequence[Any]],
        times: Sequence[Sequence[int]] | None,
        filter_seen: Literal["window", "all", "none"],
    ) -> EvaluationBatch:
        for place, history in enumerate(histories):
            if isinstance(history, str | bytes) or not hasattr(history, "__len__"):  # a text has a length, too
                raise DataError(f"history {place} is {history!r:.40}, wanted a list of items: [[...], ...]")
        lengths_B = np.array([len(history) for history in histories], dtype=np.int64)
        ids_T = self._ids([item for history in histories for item in history])
        user_T = np.repeat(np.arange(len(lengths_B)), lengths_B)
        columns = {"item_ids": ids_T}
        timed = self.config.model.tower.uses_time  # type: ignore[attr-defined]
        if timed and times is None:
            raise DataError("the tower reads time: pass times=, the seconds of each event")
        if times is not None:
            columns["timestamps"] = _seconds([second for seconds in times for second in seconds])
            if [len(seconds) for seconds in times] != lengths_B.tolist():
                raise DataError("times must have a list for each history, of the same length")
            if (back := (np.diff(columns["timestamps"]) < 0) & (np.diff(user_T) == 0)).any():
                raise DataError(f"history {user_T[int(back.argmax())]}: times go back; pass events oldest first")
        known_T = ids_T > 0
        if missing := int((~known_T).sum()):
            log.warning("%d of %d events are of items that the model does not know: left out", missing, len(ids_T))
        counts_B = np.bincount(user_T[known_T], minlength=len(lengths_B))
        offsets = np.concatenate([[0], np.cumsum(counts_B)]).astype(np.int64)
        group = Histories(offsets, {name: values[known_T] for name, values in columns.items()})
        rows = Rows([group], np.zeros_like(lengths_B), np.arange(len(lengths_B)), times is not None)
        length = self.config.data.max_length  # type: ignore[attr-defined]
        batch, _ = collate_evaluation(rows, max_length=length, target_from_end=0, filter_seen=filter_seen)
        return batch.to(self.device)


def _seconds(times_T: Sequence[Any]) -> np.ndarray:
    """int64 [T]. Raises DataError for anything but whole numbers."""
    seconds_T = np.array(times_T) if times_T else np.empty(0, dtype=np.int64)
    if not np.issubdtype(seconds_T.dtype, np.integer):
        raise DataError(
            f"times are whole seconds since 1970, and not of type {type(times_T[0]).__name__}; pandas makes them "
            'of dates with times.astype("datetime64[s]").astype(int), polars with times.dt.epoch("s")'
        )
    return seconds_T.astype(np.int64)
