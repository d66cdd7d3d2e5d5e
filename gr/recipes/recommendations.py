"""Recommendations of a retrieval model, as tables in the log's own ids. B users of a batch, K items a user, N rows."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from gr.data.history_batches import UserBatches
from gr.data.vocabulary import Vocabulary
from gr.dist import World
from gr.models.retrieval import RetrievalModel
from gr.recipes.answers import Listed
from gr.schema import USER_COLUMN
from gr.tasks import CorpusRanker


@dataclass(frozen=True)
class Recommendations:
    """The k best items of this rank's users. listed: the users asked for; None: all.

    popular_K: ids for users without a history and for users that are not in the data; None: they get nothing.
    """

    model: RetrievalModel
    ranker: CorpusRanker
    batches: UserBatches
    users: Vocabulary
    items: Vocabulary
    k: int
    listed: Listed | None
    popular_K: np.ndarray | None

    @property
    def schema(self) -> pa.Schema:
        names = {USER_COLUMN: self.users.type, "item_id": self.items.type, "score": pa.float32(), "place": pa.int32()}
        return pa.schema(names)

    @torch.no_grad()
    def tables(self, world: World, counts: dict[str, int]) -> Iterator[pa.Table]:
        """A table a batch, users in the order of the data; counts what it saw once it has ended. Collective."""
        self.model.eval()
        own, left = 0, self.batches.own_rows
        for batch in self.batches:
            moved = batch.to(world.device)
            vectors_BD = self.model.user_vectors(moved)
            ids_BK, scores_BK = (part.cpu() for part in self.ranker.top(vectors_BD, moved, self.k))
            assert batch.user_B is not None
            there_BK = (scores_BK > -torch.inf) & batch.valid_B[:, None]
            if self.popular_K is not None:
                cold_B = ~batch.valid_B & (torch.arange(len(batch.valid_B)) < left)
                ids_BK[cold_B], scores_BK[cold_B] = torch.from_numpy(self.popular_K), torch.nan
                there_BK |= cold_B[:, None]
            there_BK &= torch.arange(self.k) < self._limits(batch.user_B.numpy())[:, None]
            own, left = own + int(batch.valid_B.sum()), left - len(batch.valid_B)
            yield self._table(self.users.values(batch.user_B.numpy()), ids_BK, scores_BK, there_BK)
        if self.listed is not None and self.popular_K is not None and world.rank == world.size - 1:
            yield self._for_strangers(self.listed)
        present = int(world.all_reduce_sum([float(self.batches.own_rows)])[0])
        asked = present if self.listed is None else len(self.listed.ids_N) + len(self.listed.unknown_N)
        known = int(world.all_reduce_sum([float(own)])[0])
        counts |= {"users": known, "without_history": present - known, "unknown_users": asked - present}

    def _limits(self, user_B: np.ndarray) -> torch.Tensor:
        """The number of items of each user, int64 [B]."""
        limits_N = None if self.listed is None else self.listed.limits_N
        if self.listed is None or limits_N is None or not len(limits_N):
            return torch.full((len(user_B),), self.k)
        place_B = np.minimum(np.searchsorted(self.listed.ids_N, user_B), len(limits_N) - 1)
        return torch.from_numpy(limits_N[place_B])

    def _for_strangers(self, listed: Listed) -> pa.Table:
        """The popular items for users that are not in the data."""
        size = len(listed.unknown_N)
        assert self.popular_K is not None
        ids_BK = torch.from_numpy(self.popular_K).expand(size, -1)
        everything = torch.ones(size, self.k, dtype=torch.bool)
        return self._table(
            listed.unknown_N.cast(self.users.type), ids_BK, torch.full((size, self.k), torch.nan), everything
        )

    def _table(
        self, user_B: pa.Array, ids_BK: torch.Tensor, scores_BK: torch.Tensor, there_BK: torch.Tensor
    ) -> pa.Table:
        """The rows where there_BK is true; a score that is NaN is null."""
        row_N, place_N = there_BK.nonzero().numpy().T
        score_N = scores_BK[there_BK].numpy()
        columns = (
            user_B.take(pa.array(row_N)),
            self.items.values(ids_BK[there_BK].numpy()),
            pa.array(score_N, mask=np.isnan(score_N)),
            (place_N + 1).astype(np.int32),
        )
        return pa.table(dict(zip(self.schema.names, columns, strict=True)), schema=self.schema)
