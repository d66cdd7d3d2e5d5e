"""DLRM (arXiv 1906.00091): pooled tables and a bottom MLP -> interaction -> top MLP. Single device; sharding is
applied beside it.

B examples, N dense features, F categorical features, D width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from gr.config.click import ClickConfig
from gr.config.dlrm import DLRMConfig
from gr.config.inventory import TableConfig
from gr.embeddings import build_tables, pooled_vectors, row_weighted_vectors
from gr.errors import ConfigError
from gr.schema import TabularSchema
from gr.towers.dlrm import MLP, build_interaction, mlp_linear


class DLRM(nn.Module):
    """Logit of a click from dense features and bags of ids. The tables are on meta, the rest on the default device.

    The tables' start is gr.embeddings.initialise_tables', `uniform_rows` being the published one.
    """

    fsdp_modules = ("bottom", "interaction", "top")

    def __init__(
        self,
        config: DLRMConfig,
        tables: Sequence[TableConfig],
        dense_features: int,
        columns: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """columns: the categorical features that read each table, by its name; None: one each, of that name.

        Raises ConfigError where there are no tables, where one is not as config.table_layout says, where config.bottom
        does not go with dense_features, or nothing interacts.
        """
        super().__init__()
        if not tables:
            raise ConfigError("DLRM has no categorical features; it needs at least one")
        if fault := config.dense_fault(dense_features):
            raise ConfigError(f"model.{fault}")
        for table in tables:
            if (table.kind, table.dim) != config.table_layout:
                kind, dim = config.table_layout
                raise ConfigError(
                    f"table {table.name}: DLRM reads {kind} tables of {dim} columns, not {table.kind}, {table.dim}"
                )
        self.config = config
        self.columns = columns or {table.name: (table.name,) for table in tables}
        self.features = [name for names in self.columns.values() for name in names]
        self.tables = build_tables(tables, self.columns)
        linear = mlp_linear(config)
        self.bottom = MLP(dense_features, config.bottom, linear=linear) if config.bottom else None
        self.interaction = build_interaction(config, len(self.features) + (self.bottom is not None))
        if not self.interaction.width:
            raise ConfigError("DLRM has one categorical feature and no dense ones: model.interaction=dot has no pairs")
        self.top = MLP(self.interaction.width, config.top, linear=linear, logit=True)

    def forward(self, dense_BN: Tensor, sparse: KeyedJaggedTensor, looked_up: Any = None) -> Tensor:
        """Logits, float [B]. sparse: a key for each feature; an empty bag is a zero vector.

        looked_up: the output of the tables for `sparse`; None: look it up. Sharded tables give a promise: the bottom
        MLP runs beside their all-to-all.
        """
        looked_up = self.tables(sparse) if looked_up is None else looked_up
        dense_BD = None if self.bottom is None else self.bottom(dense_BN)
        vectors = row_weighted_vectors if self.config.row_weights else pooled_vectors
        vectors_BFD = vectors(looked_up, self.features, self.config.dim)
        return self.top(self.interaction(dense_BD, vectors_BFD)).squeeze(1)


def build_dlrm(config: ClickConfig, schema: TabularSchema) -> DLRM:
    """The model of a click experiment on data of `schema`. Build it on meta."""
    return DLRM(config.model, config.tables(schema), len(schema.dense), config.columns_by_table(schema))
