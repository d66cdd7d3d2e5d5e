"""A rank alone looks up as TorchRec's stages do. Several ranks: tests/distributed/test_pooled_parity.py."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.distributed.model_parallel import get_unwrapped_module

from gr.config.run import EmbeddingsConfig
from gr.embeddings import PipelinedLookup, local_shards
from tests.support.sharded import PooledTable

BAGS = (
    PooledTable("users", 9, 8, ("user", "friend")),
    PooledTable("words", 7, 4, ("query", "title"), "mean"),
    PooledTable("shops", 5, 12, ("shop",)),
)
KEYS = ["title", "shop", "user", "query", "friend"]  # not in the order of the tables


@pytest.mark.parametrize("kind", ["sgd", "rowwise_adagrad", "adagrad", "adam"])
def test_a_rank_alone_has_what_the_stages_have(make_bags: Callable, kind: str) -> None:
    """Three steps; bags of 0 to 3 ids, of fused kernels with sums and with means, or of dense ones (adam)."""
    config = EmbeddingsConfig.model_validate({"optimizer": {"kind": kind}})
    outcomes: list[list[Tensor]] = []
    for pipelined in (True, False):
        model = make_bags(BAGS, dict.fromkeys(("users", "words", "shops"), "table_wise"), config)
        tables, random = get_unwrapped_module(model).tables, torch.Generator().manual_seed(1)
        outcome = []
        for _ in range(3):
            lengths = torch.randint(0, 4, (len(KEYS) * 6,), generator=random)
            ids = torch.randint(0, 5, (int(lengths.sum()),), generator=random)
            features = KeyedJaggedTensor(keys=KEYS, values=ids, lengths=lengths)
            lookup = PipelinedLookup(tables, features)
            lookup.send()
            by_name = (lookup.rows() if pipelined else tables(features)).to_dict()
            outcome += [by_name[name].detach().clone() for name in KEYS]
            torch.cat([by_name[name] for name in KEYS], dim=1).square().sum().backward()
        outcomes.append([*outcome, *(shard.weight.clone() for shard in local_shards(model))])
    for got, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("sharding", ["row_wise", "data_parallel"])
def test_tables_that_are_cut_or_copied_go_through_the_stages(make_bags: Callable, sharding: str) -> None:
    model = make_bags(BAGS[:1], {"users": sharding})
    (shard,) = local_shards(model)
    features = KeyedJaggedTensor(
        keys=["user", "friend"], values=torch.tensor([4, 4, 3]), lengths=torch.tensor([2, 0, 1, 0])
    )
    looked_up = PipelinedLookup(get_unwrapped_module(model).tables, features).rows().to_dict()
    torch.testing.assert_close(looked_up["user"], torch.stack([2 * shard.weight[4], torch.zeros(8)]))
    torch.testing.assert_close(looked_up["friend"], torch.stack([shard.weight[3], torch.zeros(8)]))
