"""Tables on meta, sequence (EmbeddingCollection) and pooled (EmbeddingBagCollection), and a step's lookups in them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    JaggedTensor,
    KeyedJaggedTensor,
    KeyedTensor,
)
from torchrec.modules.embedding_configs import DataType, PoolingType

from gr.batch import ITEM_FEATURE
from gr.config.inventory import TableConfig
from gr.errors import ConfigError

CANDIDATE_FEATURE = "candidate_id"


_DATA_TYPES = {"fp32": DataType.FP32, "fp16": DataType.FP16, "bf16": DataType.BF16}


def build_tables(
    tables: Sequence[TableConfig], feature_names: Mapping[str, Sequence[str]] | None = None
) -> EmbeddingCollection | EmbeddingBagCollection:
    """The tables of a model, all sequence tables or all pooled ones, without storage (on meta).

    feature_names: the features that read a table; unset, the one of the table's name. Raises ConfigError where kinds
    are mixed, where tables or features are named twice, or where torch takes no table of that name.
    """
    names = {table.name: list((feature_names or {}).get(table.name, [table.name])) for table in tables}
    _check(tables, names)
    shared = [
        {
            "name": table.name,
            "num_embeddings": table.rows,
            "embedding_dim": table.dim,
            "feature_names": names[table.name],
            "data_type": _DATA_TYPES[table.dtype],
        }
        for table in tables
    ]
    meta = torch.device("meta")
    if tables[0].kind == "sequence":
        return EmbeddingCollection([EmbeddingConfig(**each) for each in shared], device=meta)
    poolings = [PoolingType.MEAN if table.pooling == "mean" else PoolingType.SUM for table in tables]
    configs = [EmbeddingBagConfig(**each, pooling=pooling) for each, pooling in zip(shared, poolings, strict=True)]
    return EmbeddingBagCollection(configs, device=meta)


def _check(tables: Sequence[TableConfig], names: Mapping[str, Sequence[str]]) -> None:
    kinds = sorted({table.kind for table in tables})
    if len(kinds) != 1:
        raise ConfigError(f"one collection has tables of one kind, not {', '.join(kinds) or 'none'}")
    for what, all_names in (
        ("table", [table.name for table in tables]),
        ("feature", [feature for features in names.values() for feature in features]),
    ):
        if repeated := sorted(name for name, times in Counter(all_names).items() if times > 1):
            raise ConfigError(
                f"embedding tables: {what} {', '.join(repeated)} is named more than once; the names of the tables must "
                "differ, and so must the features that they read"
            )
    for table in tables:
        if "." in table.name or hasattr(nn.ModuleDict(), table.name):
            raise ConfigError(
                f"column {table.name}: no table may have this name (a dot, or a name of torch.nn.ModuleDict); "
                "rename it in the data, or leave it out of model.features"
            )


def table_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weight of every table of a model that is not sharded, by the table's name."""
    weights: dict[str, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, EmbeddingCollection):
            weights |= {name: table.weight for name, table in module.embeddings.items()}
        elif isinstance(module, EmbeddingBagCollection):
            weights |= {name: table.weight for name, table in module.embedding_bags.items()}
    return weights


def move_tables_to_meta(model: nn.Module) -> None:
    """Gives back the storage of the tables of a model that is not sharded."""
    for module in model.modules():
        if isinstance(module, EmbeddingCollection | EmbeddingBagCollection):
            module.to("meta")


def candidate_feature(column: str) -> str:
    """The feature of the candidates' ids of a column; the history's has the column's name."""
    return CANDIDATE_FEATURE if column == ITEM_FEATURE else f"candidate/{column}"


def is_candidate(feature: str) -> bool:
    """Whether a feature has the ids of candidates."""
    return feature == CANDIDATE_FEATURE or feature.startswith("candidate/")


def lookup(
    collection: torch.nn.Module,
    history: KeyedJaggedTensor,
    candidates_K: Tensor,
    dim: int,
    item_features: Mapping[str, Tensor] = MappingProxyType({}),
) -> tuple[Tensor, Tensor]:
    """Vectors of the history's tokens and of the candidates, float [T, dim] and [K, dim], from the (sharded) tables."""
    return sequence_vectors(collection(with_candidates(history, candidates_K, item_features)), dim, item_features)


def with_candidates(
    history: KeyedJaggedTensor, candidates_K: Tensor, item_features: Mapping[str, Tensor] = MappingProxyType({})
) -> KeyedJaggedTensor:
    """The ids of both, so that there is one pass over the tables and one all-to-all a step.

    item_features: ids of further columns, [E] by item, where their device has room for all items; those of the items of
    both are looked up, too. Candidates belong to no example and are filed under the first.
    """
    lengths, items_T = history.lengths(), history.values()
    filed = torch.zeros_like(lengths)
    filed[0] = candidates_K.numel()
    values = [items_T, candidates_K]
    for ids_E in item_features.values():
        values += [ids_E[items.to(ids_E.device)].to(items_T) for items in (items_T, candidates_K)]
    columns = [ITEM_FEATURE, *item_features]
    return KeyedJaggedTensor(
        keys=[key for column in columns for key in (column, candidate_feature(column))],
        values=torch.cat(values),
        lengths=torch.cat([lengths, filed] * len(columns)),
    )


def sequence_vectors(
    looked_up: Mapping[str, JaggedTensor], dim: int, item_features: Iterable[str] = ()
) -> tuple[Tensor, Tensor]:
    """The vectors of a lookup with_candidates: of the history's tokens [T, dim] and of the candidates [K, dim].

    Those of an item and of its features are added.
    """
    history_TD, candidates_KD = (looked_up[key].values()[:, :dim] for key in (ITEM_FEATURE, CANDIDATE_FEATURE))
    for column in item_features:
        history_TD = history_TD + looked_up[column].values()[:, :dim]
        candidates_KD = candidates_KD + looked_up[candidate_feature(column)].values()[:, :dim]
    return history_TD, candidates_KD


def pooled_lookup(collection: torch.nn.Module, features: KeyedJaggedTensor, names: Sequence[str]) -> list[Tensor]:
    """The pooled vectors of `names`, float [B, dim] each, from a (sharded) collection that may read other features too.

    Models go by name, as here: the order of the columns in the collection's own output depends on the plan.
    """
    by_name = collection(features).to_dict()
    return [by_name[name] for name in names]


def pooled_vectors(pooled: KeyedTensor, names: Sequence[str], dim: int) -> Tensor:
    """The vectors of `names` in a collection's output, float [B, F, dim]: where it has them in this order, no copy."""
    vectors_BFD = pooled.values().unflatten(1, (-1, dim))
    keys = pooled.keys()
    if list(names) == keys:
        return vectors_BFD
    by_name = dict(zip(keys, vectors_BFD.unbind(1), strict=True))
    return torch.stack([by_name[name] for name in names], dim=1)


def row_weighted_vectors(rows: Mapping[str, JaggedTensor], names: Sequence[str], dim: int) -> Tensor:
    """The sum over each bag of its rows times their weights, [B, F, dim], from a row-weighted collection's output.

    As facebookresearch/dlrm --weighted-pooling learned, whose weights start at one.
    """
    return torch.stack([_weighted_sum(rows[name], dim) for name in names], dim=1)


def _weighted_sum(bag: JaggedTensor, dim: int) -> Tensor:
    rows_T, lengths_B = bag.values(), bag.lengths()
    weighted_TD = rows_T[:, :dim] * (1 + rows_T[:, dim : dim + 1])
    examples = torch.arange(len(lengths_B), device=lengths_B.device)
    example_T = torch.repeat_interleave(examples, lengths_B, output_size=len(rows_T))
    return weighted_TD.new_zeros(len(lengths_B), dim).index_add(0, example_T, weighted_TD)
