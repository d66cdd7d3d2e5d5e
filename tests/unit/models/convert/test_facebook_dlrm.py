"""Published DLRM weights to gr and back, and why the triangle has to be permuted."""

import pytest
import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

from gr.config.dlrm import CatInteraction, DCNInteraction, DLRMConfig, DotInteraction, Interaction
from gr.errors import CheckpointError
from gr.models.convert.facebook_dlrm import from_facebook, to_facebook
from gr.models.dlrm import DLRM
from tests.support.dlrm_reference import ReferenceDLRM, Shape, tables_for

D, ROWS, DENSE = 4, (6, 9, 5), 3
INTERACTIONS: dict[str, Interaction] = {
    "dot": DotInteraction(),
    "dot_itself": DotInteraction(self_interaction=True),
    "cat": CatInteraction(),
}


def on_meta(interaction: Interaction, rows: tuple[int, ...] = ROWS) -> DLRM:
    config = DLRMConfig(dim=D, bottom=(8, D), top=(7, 1), interaction=interaction)
    with torch.device("meta"):
        return DLRM(config, tables_for(config, {f"c{k}": n for k, n in enumerate(rows)}), DENSE)


def published(pairs: str) -> ReferenceDLRM:
    torch.manual_seed(1)
    return ReferenceDLRM(Shape(ROWS, DENSE, D, (8, D), (7, 1), pairs))


def predictions(weights: dict[str, Tensor], interaction: Interaction) -> Tensor:
    model = on_meta(interaction)
    model.load_state_dict(weights, assign=True)
    dense = torch.linspace(-1, 1, 2 * DENSE).view(2, DENSE)
    ids = KeyedJaggedTensor(
        keys=["c0", "c1", "c2"], values=torch.tensor([5, 0, 8, 2, 4, 1]), lengths=torch.tensor([1, 1, 2, 0, 1, 1])
    )
    return model(dense, ids).sigmoid()


@pytest.mark.parametrize("pairs", INTERACTIONS)
def test_there_and_back_is_bit_equal(pairs: str) -> None:
    state = published(pairs).state_dict()
    model = on_meta(INTERACTIONS[pairs])
    ours = from_facebook(state, model)
    assert ours.keys() == model.state_dict().keys()
    back = to_facebook(ours, model)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    again = from_facebook(back, model)
    assert all(torch.equal(again[name], ours[name]) for name in ours)


@pytest.mark.parametrize("pairs", INTERACTIONS)
def test_tables_are_shared_and_not_copied(pairs: str) -> None:
    state = published(pairs).state_dict()
    ours = from_facebook(state, on_meta(INTERACTIONS[pairs]))
    assert ours["tables.embedding_bags.c1.weight"].data_ptr() == state["emb_l.1.weight"].data_ptr()


@pytest.mark.parametrize("pairs", ["dot", "dot_itself"])
def test_without_the_permutation_the_predictions_differ(pairs: str) -> None:
    """Every shape fits, so that nothing but the predictions would tell."""
    reference = published(pairs)
    state = reference.state_dict()
    ours = from_facebook(state, on_meta(INTERACTIONS[pairs]))
    naive = {**ours, "top.0.weight": state["top_l.0.weight"]}
    dense = torch.linspace(-1, 1, 2 * DENSE).view(2, DENSE)
    expected = reference(dense, [[[5], [0]], [[8, 2], []], [[4], [1]]])
    assert float((predictions(ours, INTERACTIONS[pairs]) - expected).abs().max().detach()) < 1e-6
    assert float((predictions(naive, INTERACTIONS[pairs]) - expected).abs().max().detach()) > 1e-3


def test_columns_by_hand() -> None:
    """Three tables: the lower triangle is 10 20 21 30 31 32, the upper one 01 02 03 12 13 23."""
    model = on_meta(DotInteraction())
    state = published("dot").state_dict()
    state["top_l.0.weight"] = torch.tensor([0.0, 0, 0, 0, 10, 20, 21, 30, 31, 32]).expand(7, -1)
    assert from_facebook(state, model)["top.0.weight"][0].tolist() == [0, 0, 0, 0, 10, 20, 30, 21, 31, 32]


def test_what_does_not_fit_is_named() -> None:
    state = published("dot").state_dict()
    model = on_meta(DotInteraction())
    with pytest.raises(CheckpointError, match=r"emb_l\.1\.weight has shape \[9, 4\], expected \[8, 4\]"):
        from_facebook(state, on_meta(DotInteraction(), (6, 8, 5)))
    with pytest.raises(CheckpointError, match=r"top_l\.0\.weight has shape \[7, 10\], expected \[7, 14\]"):
        from_facebook(state, on_meta(DotInteraction(self_interaction=True)))
    with pytest.raises(CheckpointError, match=r"bot_l\.0\.bias is missing; v_W_l\.0 is unknown$"):
        state["v_W_l.0"] = state.pop("bot_l.0.bias")
        from_facebook(state, model)
    with pytest.raises(CheckpointError, match=r"^DLRM weights do not fit the model: .* is missing.* and \d+ more$"):
        to_facebook(state, model)


def test_interactions_that_were_never_published_are_refused() -> None:
    with pytest.raises(CheckpointError, match="no interaction 'dcn', only dot and cat"):
        from_facebook({}, on_meta(DCNInteraction()))


def test_features_that_share_a_table_are_refused() -> None:
    """The published code has a table for each feature."""
    config = DLRMConfig(dim=D, bottom=(8, D), top=(7, 1))
    with torch.device("meta"):
        model = DLRM(config, tables_for(config, {"c0": 6}), DENSE, {"c0": ("c0", "c1")})
    with pytest.raises(CheckpointError, match="has a table for each feature, and here features share one"):
        to_facebook(model.state_dict(), model)
