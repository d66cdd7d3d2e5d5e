"""DLRM on data without dense columns: no bottom MLP, and the vectors of the tables interact alone."""

import pytest
import torch

from gr.config.dlrm import DLRMConfig
from gr.errors import ConfigError
from gr.models.dlrm import DLRM
from tests.unit.models.test_dlrm import SHAPE, B, D, batch_of, kjt, tables_of


def test_the_products_of_the_tables_go_into_the_top_mlp() -> None:
    config = DLRMConfig(dim=D, top=(16, 1))
    tables = tables_of(SHAPE, config)
    model = DLRM(config, tables, 0)
    model.tables.to_empty(device="cpu")
    for bag in model.tables.embedding_bags.values():
        torch.nn.init.normal_(bag.weight)
    _, bags, _ = batch_of(SHAPE)
    vectors = [
        torch.stack([bag.weight[ids].sum(0) for ids in examples])
        for bag, examples in zip(model.tables.embedding_bags.values(), bags, strict=True)
    ]
    products = [(vectors[i] * vectors[j]).sum(1) for i, j in ((0, 1), (0, 2), (1, 2))]
    logits = model(torch.empty(B, 0), kjt(bags))
    torch.testing.assert_close(logits, model.top(torch.stack(products, 1)).squeeze(1))
    with pytest.raises(
        ConfigError, match="bottom is missing: the layer widths of the MLP that reads the 5 dense features"
    ):
        DLRM(config, tables, 5)
    with pytest.raises(ConfigError, match="no dense ones: model\\.interaction=dot has no pairs"):
        DLRM(config, tables[:1], 0)
