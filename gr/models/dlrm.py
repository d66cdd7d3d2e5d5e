"""DLRM (arXiv 1906.00091): pooled tables and a bottom MLP -> interaction -> top MLP. Single device; sharding is
applied beside it.

B examples, N dense features, F categorical features, T = F + 1 vectors an example, D width.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from gr.config.dlrm import DLRMConfig
from gr.config.tree import EmbeddingsConfig
from gr.embeddings import (
    PooledTable,
    build_bag_collection,
    build_row_weighted_collection,
    pooled_vectors,
    row_weighted_vectors,
)
from gr.errors import ConfigError
from gr.towers.dlrm import MLP, build_interaction, mlp_linear


class CategoricalFeature(Protocol):
    """A feature and the table of the same name that it alone reads."""

    @property
    def name(self) -> str: ...

    @property
    def rows(self) -> int: ...


class DLRM(nn.Module):
    """Logit of a click from dense features and bags of ids. The tables are on meta, the rest on the default device.

    The tables' start is gr.embeddings.initialise_tables', `uniform_rows` being the published one.
    """

    def __init__(
        self,
        config: DLRMConfig,
        features: Sequence[CategoricalFeature],
        dense_features: int,
        embeddings: EmbeddingsConfig,
    ) -> None:
        """Raises ConfigError where there are no features, or no dense ones, or where two have one name."""
        super().__init__()
        if not features or dense_features < 1:
            raise ConfigError(
                f"DLRM has {len(features)} categorical and {dense_features} dense features; it needs one of each kind"
            )
        self.config = config
        self.features = [feature.name for feature in features]
        tables = [PooledTable(feature.name, feature.rows, config.dim, (feature.name,)) for feature in features]
        build = build_row_weighted_collection if config.row_weights else build_bag_collection
        self.tables = build(tables, embeddings)
        linear = mlp_linear(config)
        self.bottom = MLP(dense_features, config.bottom, linear=linear)
        self.interaction = build_interaction(config, len(features) + 1)
        self.top = MLP(self.interaction.width, config.top, linear=linear, logit=True)

    def forward(self, dense_BN: Tensor, sparse: KeyedJaggedTensor, found: Any = None) -> Tensor:
        """Logits, float [B]. sparse: a key for each feature; an empty bag is a zero vector.

        found: what the tables have for `sparse`; None: look it up. Of sharded tables it is a promise: the bottom MLP
        runs beside their all-to-all.
        """
        found = self.tables(sparse) if found is None else found
        dense_BD = self.bottom(dense_BN)
        if self.config.row_weights:
            pooled = row_weighted_vectors(found, self.features, self.config.dim)
        else:
            pooled = pooled_vectors(found, self.features)
        vectors_BTD = torch.stack([dense_BD, *pooled], dim=1)
        return self.top(self.interaction(vectors_BTD)).squeeze(1)
