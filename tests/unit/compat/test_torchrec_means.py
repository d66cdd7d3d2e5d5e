"""TorchRec's wrong division beside row-wise means is still there, and the repair is right."""

import pytest
import torch
from torch import Tensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.types import EnumerableShardingSpec, ParameterSharding, ShardingEnv, ShardMetadata

from gr.compat import divide_only_row_shards
from gr.compat.torchrec_means import divided_by_mistake
from gr.dist import World

ROWS, DIM = 6, 4
# Features by name of their table: what it is sharded by, and pooled by.
TABLES = {
    "rw_mean": ("row_wise", PoolingType.MEAN),
    "rw_sum": ("row_wise", PoolingType.SUM),
    "tw_sum": ("table_wise", PoolingType.SUM),
    "cw_mean": ("column_wise", PoolingType.MEAN),
    "dp_sum": ("data_parallel", PoolingType.SUM),
}
MISTAKEN = ["tw_sum", "cw_mean", "dp_sum"]
LENGTHS, IDS = [2, 1, 3], [0, 1, 2, 3, 4, 5]


def sharded(*names: str) -> ShardedEmbeddingBagCollection:
    configs = [
        EmbeddingBagConfig(
            name=name, num_embeddings=ROWS, embedding_dim=DIM, feature_names=[name], pooling=TABLES[name][1]
        )
        for name in names
    ]
    specification = EnumerableShardingSpec([ShardMetadata([0, 0], [ROWS, DIM], "rank:0/cpu")])
    plan = {}
    for name in names:
        kind = TABLES[name][0]
        plan[name] = ParameterSharding(kind, "dense" if kind == "data_parallel" else "fused", [0], specification)
    env = ShardingEnv.from_process_group(torch.distributed.group.WORLD)
    collection = EmbeddingBagCollection(configs, device=torch.device("meta"))
    return EmbeddingBagCollectionSharder().shard(collection, plan, env, torch.device("cpu"))


def pooled(collection: ShardedEmbeddingBagCollection, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Divided by what is right, so that every entry is near 1: all weights are ones."""
    for lookup in collection._lookups:
        for kernel in (m for m in lookup.modules() if hasattr(m, "emb_module")):
            for weight in kernel.split_embedding_weights():
                weight.detach().fill_(1.0)
    features = KeyedJaggedTensor(
        keys=list(names), values=torch.tensor(IDS * len(names)), lengths=torch.tensor(LENGTHS * len(names))
    )
    out = collection(features)
    right = {PoolingType.SUM: torch.tensor(LENGTHS).unsqueeze(1), PoolingType.MEAN: torch.ones(3, 1)}
    return {name: out[name].detach() / right[TABLES[name][1]] for name in names}


def wrong(vectors: dict[str, Tensor]) -> list[str]:
    return [name for name, values in vectors.items() if not torch.allclose(values, torch.ones(3, DIM), atol=1e-4)]


def test_the_installed_release_has_the_defect(alone: World) -> None:
    names = tuple(TABLES)
    collection = sharded(*names)
    assert divided_by_mistake(collection) == MISTAKEN
    assert wrong(pooled(collection, names)) == MISTAKEN, "upstream has fixed it, remove the repair"


def test_the_repair_divides_what_it_should_and_can_be_called_again(alone: World) -> None:
    names = tuple(TABLES)
    collection = sharded(*names)
    for _ in range(2):
        divide_only_row_shards(collection)
        assert divided_by_mistake(collection) == []
    assert wrong(pooled(collection, names)) == []


@pytest.mark.parametrize("names", [("rw_mean", "rw_sum"), ("rw_sum", "tw_sum", "cw_mean"), ("tw_sum",)], ids=str)
def test_what_is_not_broken_is_left_alone(alone: World, names: tuple[str, ...]) -> None:
    collection = sharded(*names)
    assert divided_by_mistake(collection) == []
    before = dict(collection._pooling_type_to_rs_features)
    divide_only_row_shards(collection)
    assert dict(collection._pooling_type_to_rs_features) == before
    assert wrong(pooled(collection, names)) == []
