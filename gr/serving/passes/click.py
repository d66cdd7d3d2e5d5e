"""The forward pass of a click model for a package: packed tables, and DLRM's dense part as it was trained.

B rows, N dense columns, F features of ids, H ids of a row over all features, D width.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from gr.config.click import ClickConfig
from gr.config.export import ExportConfig
from gr.embeddings import IdMap, table_weights
from gr.models.dlrm import DLRM
from gr.models.saved_click import SavedClick
from gr.schema import SCHEMA_FILE, TabularSchema, vocabulary_file
from gr.serving.passes.build import Built, CardTables, Pass
from gr.serving.tables.packed import PackedTables
from gr.serving.tables.quantize import RowKind
from gr.serving.verbs.click import score_record
from gr.towers.dlrm import Dot

GOLDEN_ROWS = 32


class DensePass(nn.Module):
    """Logits of rows from the pooled vectors of their ids, wherever the tables are."""

    bottom: nn.Module | None
    interaction: nn.Module
    top: nn.Module

    def __init__(self, model: DLRM) -> None:
        super().__init__()
        self.bottom, self.interaction, self.top = model.bottom, copy.copy(model.interaction), model.top
        if isinstance(self.interaction, Dot):
            self.interaction.portable = True

    def forward(self, dense_BN: Tensor, vectors_BFD: Tensor) -> Tensor:
        """Logits, float32 [B]. vectors_BFD: float32, in the order of the model's features."""
        dense_BD = None if self.bottom is None else self.bottom(dense_BN)
        return self.top(self.interaction(dense_BD, vectors_BFD)).squeeze(1)


class ClickPass(nn.Module):
    """Logits of rows whose features have a fixed number of ids each, so that no shape depends on a value."""

    hots_F1: Tensor
    starts_F1: Tensor

    def __init__(self, model: DLRM, tables: PackedTables, columns: Sequence[tuple[str, int]], dense: DensePass) -> None:
        """columns: the sparse columns with their ids a row, in the order of the input."""
        super().__init__()
        self.tables, self.dense = tables, dense
        self.row_weights, self.dim, self.features = model.config.row_weights, model.config.dim, list(model.features)
        self.hots = dict(columns)
        names = [name for name, _ in columns]
        self.order = [names.index(name) for name in tables.features]
        hots_F = [self.hots[name] for name in tables.features]
        starts_F = [sum(hots_F[:feature]) for feature in range(len(hots_F) + 1)]
        self.register_buffer("hots_F1", torch.tensor([*hots_F, 0], dtype=torch.int32))
        self.register_buffer("starts_F1", torch.tensor(starts_F, dtype=torch.int32))

    def forward(self, dense_BN: Tensor, ids_BH: Tensor) -> Tensor:
        """Logits, float32 [B]. dense_BN: float32. ids_BH: int32, the columns side by side; ids are not checked."""
        return self.dense(dense_BN, self.look_up(ids_BH))

    def look_up(self, ids_BH: Tensor) -> Tensor:
        """The pooled vectors of the model's features, float32 [B, F, D]."""
        B = ids_BH.shape[0]
        columns = ids_BH.split(list(self.hots.values()), dim=1)
        ids = torch.cat([columns[place].reshape(-1) for place in self.order])
        row_B = torch.arange(B, dtype=torch.int32)
        offsets_F1B = self.starts_F1[:, None] * B + self.hots_F1[:, None] * row_B[None]
        # Where the bags of the feature after the last would begin is where the last bag ends.
        offsets = torch.cat([offsets_F1B[:-1].reshape(-1), offsets_F1B[-1, :1]])
        looked_up = self.tables(ids, offsets)
        by_name = self._row_weighted(looked_up, B) if self.row_weights else self._pooled(looked_up)
        return torch.stack([by_name[name] for name in self.features], dim=1)

    def _pooled(self, looked_up: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.tables.features, looked_up.split(self.tables.widths, dim=1), strict=True))

    def _row_weighted(self, looked_up: Tensor, B: int) -> dict[str, Tensor]:
        """The same as gr.embeddings.row_weighted_vectors, for bags of equal lengths."""
        hots = [self.hots[name] for name in self.tables.features]
        weighted = looked_up[:, : self.dim] * (1 + looked_up[:, self.dim : self.dim + 1])
        bags = weighted.split([B * count for count in hots])
        return {
            name: bag.view(B, count, self.dim).sum(1)
            for name, bag, count in zip(self.tables.features, bags, hots, strict=True)
        }


class PassOfCards(ClickPass):
    """A pass with its own tables that answers as one with tables on cards does: vectors come from cards in fp16."""

    def look_up(self, ids_BH: Tensor) -> Tensor:
        """float32 [B, F, D], with the values of fp16."""
        return super().look_up(ids_BH).half().float()


class Served(nn.Module):
    """A pass that is called as DLRM is."""

    def __init__(self, click_pass: ClickPass, columns: Sequence[tuple[str, int]], id_map: IdMap | None) -> None:
        """id_map: the rows of raw ids, where there are any."""
        super().__init__()
        self.click_pass, self.columns, self.id_map = click_pass, columns, id_map

    def forward(self, dense_BN: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        """Logits, float32 [B]. sparse: the columns in their order, as tabular_batch makes it."""
        sparse = sparse if self.id_map is None else self.id_map.find(sparse)
        parts = sparse.values().split([len(dense_BN) * hots for _, hots in self.columns])
        ids_BH = torch.cat([part.view(-1, hots) for part, (_, hots) in zip(parts, self.columns, strict=True)], dim=1)
        return self.click_pass(dense_BN, ids_BH.int())


def build(saved: SavedClick, kinds: Mapping[str, RowKind], config: ExportConfig) -> Built:
    """The one pass of a click model, `score`: with its tables inside, or for tables on cards."""
    model, schema, run = saved.model, saved.schema, saved.config
    assert isinstance(model, DLRM) and isinstance(run, ClickConfig)
    weights = {name: weight.detach() for name, weight in table_weights(model).items()}
    tables = PackedTables(weights, kinds, model.columns, pooled=not model.config.row_weights)
    columns = [(column.name, column.hots) for column in schema.sparse]
    dense = DensePass(model).eval()
    whole = (PassOfCards if config.cards else ClickPass)(model, tables, columns, dense).eval()
    rows = {name: len(weights[table]) for table, names in model.columns.items() for name in names}
    golden, cards = _golden_rows(schema, rows), None
    dense_BN, ids_BH = golden
    if config.cards:
        with torch.no_grad():
            vectors_BFD = whole.look_up(ids_BH)
        golden = dense_BN, vectors_BFD
        cards = CardTables(
            weights=weights,
            columns=model.columns,
            ids=columns,
            features=model.features,
            dim=model.config.dim,
            row_weights=model.config.row_weights,
            golden=(ids_BH, vectors_BFD),
        )
    vocabularies = [vocabulary_file(name) for name in schema.input_vocabularies]
    return Built(
        passes={"score": Pass(dense if config.cards else whole, golden, ({0: "rows"}, {0: "rows"}))},
        served=Served(whole, columns, saved.id_map),
        verbs={"score": score_record(schema, saved.vocabularies)},
        tables={name: (*weight.shape, kinds[name]) for name, weight in weights.items()},
        form={
            "model": run.model.model_dump(mode="json"),
            "dense columns": list(schema.dense),
            "ids": columns,
            "tables are on cards": bool(config.cards),
        },
        artifacts={
            SCHEMA_FILE: schema.model_dump_json(indent=2).encode(),
            **{name: (saved.folder / name).read_bytes() for name in vocabularies},
        },
        cards=cards,
    )


def _golden_rows(schema: TabularSchema, rows: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """Dense numbers and ids at random, over all rows of the tables. rows: that the ids of each column may be."""
    generator = torch.Generator().manual_seed(0)
    dense_BN = torch.randn(GOLDEN_ROWS, len(schema.dense), generator=generator)
    ids = [
        torch.randint(limit, (GOLDEN_ROWS, column.hots), generator=generator, dtype=torch.int32)
        for column in schema.sparse
        for limit in [min(column.cardinality, rows[column.name])]
    ]
    return dense_BN, torch.cat(ids, dim=1)
