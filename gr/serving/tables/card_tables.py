"""A version whose tables lie on cards: the ids of rows -> their pooled vectors -> the compiled dense pass.

The rows of a batch go to the cards BATCH at a time, so that the memory which they share does not grow with a request.

B rows, H ids of a row over all columns, F features, D width.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from gr.errors import ServingError
from gr.serving.package.layout import GOLDEN, CardsRecord, TablesLayout
from gr.serving.package.weights import map_tensors
from gr.serving.tables.cards import Bags, CardGroup, Cards, Lookup
from gr.serving.tables.packed import StoredTables

BATCH = 1024
IDS, VECTORS = "cards/inputs/0", "cards/outputs/0"  # golden rows
# Vectors are fp16 on their way: on another CPU than the package's, sums may round to the number beside.
_TOLERANCE = 2.0**-10


class RowWeightedSums(nn.Module):
    """Pools rows that end with their own weight, as gr.embeddings.row_weighted_vectors does."""

    def __init__(self, tables: StoredTables, dim: int) -> None:
        """tables: without pooling. dim: the columns of a row before its weight."""
        super().__init__()
        self.tables, self.dim = tables, dim

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """float32 [B, sum of the features' D], as of tables that pool."""
        F, dim = len(self.tables.features), self.dim
        rows_TD = self.tables(ids, offsets)
        weighted_TD = rows_TD[:, :dim] * (1 + rows_TD[:, dim : dim + 1])
        lengths_FB = offsets.diff().long()
        bag_T = torch.repeat_interleave(lengths_FB, output_size=len(ids))
        sums = rows_TD.new_zeros(len(lengths_FB), dim).index_add(0, bag_T, weighted_TD)
        return sums.view(F, len(lengths_FB) // F, dim).transpose(0, 1).reshape(-1, F * dim)


def pooling(tables: StoredTables, dim: int, row_weights: bool) -> StoredTables | RowWeightedSums:
    """The pooling that a card runs."""
    return RowWeightedSums(tables, dim) if row_weights else tables


def open_tables(path: Path, layout: TablesLayout, dim: int, row_weights: bool) -> Lookup:
    """The tables of a card, mapped; called in its process."""
    return pooling(StoredTables(layout, map_tensors(path)), dim, row_weights)


class TablesOnCards:
    """The processes that hold a version's tables. Close it."""

    def __init__(self, folder: Path, record: CardsRecord) -> None:
        """folder: of the version, whose files were verified. Raises ServingError where a card does not start."""
        self._columns, self._features = record.columns, record.features
        groups = []
        for card in record.cards:
            opened = partial(open_tables, folder / card.file, card.layout, record.dim, record.row_weights)
            groups.append([CardGroup(dict.fromkeys(card.layout.features, record.dim), opened)])
        ids = max(sum(dict(record.columns)[name] for name in card.layout.features) for card in record.cards)
        self._cards = Cards(groups, bags=BATCH, ids=BATCH * ids)

    def __call__(self, ids_BH: Tensor) -> Tensor:
        """The pooled vectors, float32 [B, F, D] with the values of fp16. ids_BH: int32, within their tables.

        May be called by several threads; they take turns. Raises ServingError where a card has ended.
        """
        return torch.cat([self._look_up(ids) for ids in ids_BH.split(BATCH)])

    def _look_up(self, ids_BH: Tensor) -> Tensor:
        parts = ids_BH.split([hots for _, hots in self._columns], dim=1)
        vectors = self._cards.lookup(
            {
                name: Bags(part.reshape(-1), torch.arange(len(ids_BH) + 1, dtype=torch.int32) * hots)
                for (name, hots), part in zip(self._columns, parts, strict=True)
            }
        )
        return torch.stack([vectors[name] for name in self._features], dim=1)

    def compare_golden(self, folder: Path) -> None:
        """Raises ServingError where the cards' vectors are not those of the golden rows."""
        golden = map_tensors(folder / GOLDEN)
        if missing := [name for name in (IDS, VECTORS) if name not in golden]:
            raise ServingError(f"{folder / GOLDEN}: has no {missing[0]}; export again")
        expected = golden[VECTORS]
        distance = float(((self(golden[IDS]) - expected).abs() / (1 + expected.abs())).max())
        if not distance <= _TOLERANCE:  # also where it is NaN
            raise ServingError(
                f"{folder}: the cards' vectors are {distance:.2g} from the golden rows, allowed is {_TOLERANCE:.2g}; "
                "export again"
            )

    @property
    def running(self) -> bool:
        """Whether no card has ended."""
        return self._cards.running

    def close(self) -> None:
        """Ends the processes."""
        self._cards.close()


class PassOnCards:
    """A pass that takes vectors, asked with ids."""

    def __init__(self, cards: TablesOnCards, run: Callable[..., list[Tensor]]) -> None:
        self._cards, self._run = cards, run

    def __call__(self, dense_BN: Tensor, ids_BH: Tensor) -> list[Tensor]:
        """The answer of the pass that has its tables inside. Raises ServingError where a card has ended."""
        return self._run(dense_BN, self._cards(ids_BH))
