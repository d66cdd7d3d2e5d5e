"""DLRM with a learned weight for each row, against facebookresearch/dlrm --weighted-pooling learned.

The reference is tests/support/dlrm_reference.py; sharded, tests/distributed/test_ranking.py compares them.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from gr.config.click import BCELoss
from gr.config.dlrm import DLRMConfig
from gr.errors import CheckpointError
from gr.models.convert.facebook_dlrm import from_facebook
from gr.models.dlrm import DLRM
from gr.tasks.losses import click_loss
from tests.support.dlrm_reference import ReferenceDLRM
from tests.unit.models.test_dlrm import DENSE, SHAPE, D, batch_of, build, kjt, largest_gap, tables_of

WEIGHTED = replace(SHAPE, row_weights=True)


def test_row_weights_equal_the_published_equations() -> None:
    """Forward, and the gradients of vectors and weights; a weight that is not one shows that it is used."""
    torch.manual_seed(3)
    reference = ReferenceDLRM(WEIGHTED)
    config = DLRMConfig(dim=D, bottom=SHAPE.bottom, top=SHAPE.top, row_weights=True)
    model = DLRM(config, tables_of(SHAPE, config), DENSE)
    model.tables.to_empty(device="cpu")
    model.load_state_dict(from_facebook(without_row_weights(reference), build(SHAPE)), strict=False)
    tables = {f"table_{k}": model.tables.embeddings[f"table_{k}"].weight for k in range(len(SHAPE.rows))}
    with torch.no_grad():
        for k, table in enumerate(tables.values()):
            reference.v_W_l[k].uniform_(0.5, 2.0)
            table.zero_()
            table[:, :D] = reference.emb_l[k].weight
            table[:, D] = reference.v_W_l[k] - 1
    dense, bags, labels = batch_of(SHAPE)
    expected, logits = reference(dense, bags), model(dense, kjt(bags))
    assert largest_gap(logits.sigmoid(), expected) <= 1e-6
    nn.functional.binary_cross_entropy(expected, labels).backward()
    click_loss(logits, labels, BCELoss()).mean().backward()
    for k, table in enumerate(tables.values()):
        vectors, weights = reference.emb_l[k].weight.grad, reference.v_W_l[k].grad
        assert vectors is not None and weights is not None and table.grad is not None and weights.abs().max() > 0
        assert largest_gap(table.grad[:, :D], vectors) <= 1e-7
        assert largest_gap(table.grad[:, D], weights) <= 1e-7
        assert not table.grad[:, D + 1 :].any()


def without_row_weights(reference: ReferenceDLRM) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in reference.state_dict().items() if not name.startswith("v_W_l")}


def test_row_weights_are_not_converted() -> None:
    config = DLRMConfig(dim=D, bottom=SHAPE.bottom, top=SHAPE.top, row_weights=True)
    model = DLRM(config, tables_of(SHAPE, config), DENSE)
    with pytest.raises(CheckpointError, match="keeps weights of rows as they are"):
        from_facebook(ReferenceDLRM(WEIGHTED).state_dict(), model)
