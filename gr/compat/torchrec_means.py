"""torchrec 1.8.0: beside a table of means that is sharded by rows, tables sharded otherwise come out divided too.

A table sharded by rows (row_wise, table_row_wise) returns sums, which ShardedEmbeddingBagCollection divides by the
lengths of the bags, together with the output of every other table of the collection. It spares those that
`_pooling_type_to_rs_features` names as sums, and names only tables sharded by rows: the sums and means of tables under
any other sharding type are divided as well, without an error. The repair names them all.
"""

from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.modules.embedding_configs import PoolingType

BY_ROWS = {"row_wise", "table_row_wise"}


def divided_by_mistake(collection: ShardedEmbeddingBagCollection) -> list[str]:
    """Features whose pooled vectors `collection`, as it stands now, divides by the bag's length and should not."""
    by_rows = collection._pooling_type_to_rs_features
    if not by_rows.get(PoolingType.MEAN.value):
        return []
    return [
        feature
        for table in collection._embedding_bag_configs
        if collection.module_sharding_plan[table.name].sharding_type not in BY_ROWS
        for feature in table.feature_names
        if feature not in by_rows[PoolingType.SUM.value]
    ]


def divide_only_row_shards(collection: ShardedEmbeddingBagCollection) -> None:
    """Call it on every collection that was sharded, before its first forward. Idempotent."""
    mistaken = divided_by_mistake(collection)
    if mistaken:
        collection._pooling_type_to_rs_features[PoolingType.SUM.value].extend(mistaken)
