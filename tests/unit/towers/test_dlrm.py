"""DLRM's interactions by hand, their initial weights, and what a configuration may not say.

Whole models: tests/unit/models/test_dlrm.py.
"""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from gr.config.dlrm import (
    CatInteraction,
    DCNInteraction,
    DLRMConfig,
    DotInteraction,
    Interaction,
    ProjectionInteraction,
)
from gr.towers.dlrm import MLP, CrossLayer, NormalLinear, build_interaction, mlp_linear

D, T = 4, 3
INTERACTIONS = [
    DotInteraction(),
    DotInteraction(self_interaction=True),
    CatInteraction(),
    DCNInteraction(layers=2, rank=3),
    ProjectionInteraction(branch1=(5, 2 * D), branch2=(3 * D,)),
]
IDS = ["dot", "dot with self", "cat", "dcn", "projection"]


def build(interaction: Interaction, **changes: object) -> nn.Module:
    config = DLRMConfig(**{"dim": D, "bottom": (D,), "top": (1,), "interaction": interaction, **changes})
    return build_interaction(config, T)


def parts(vectors_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """The dense vectors and those of tables."""
    return vectors_BTD[:, 0], vectors_BTD[:, 1:]


def test_dot_takes_the_upper_triangle_row_by_row() -> None:
    vectors = torch.tensor([[[1.0, 0, 0, 0], [2, 3, 0, 0], [5, 7, 11, 0]]])
    assert build(DotInteraction())(*parts(vectors)).tolist() == [[1, 0, 0, 0, 2, 5, 31]]
    with_self = build(DotInteraction(self_interaction=True))(*parts(vectors))
    assert with_self.tolist() == [[1, 0, 0, 0, 1, 2, 5, 13, 31, 195]]


def test_without_a_dense_vector_the_products_stand_alone() -> None:
    vectors = torch.tensor([[[1.0, 0, 0, 0], [2, 3, 0, 0], [5, 7, 11, 0]]])
    assert build(DotInteraction(), bottom=None)(None, vectors).tolist() == [[2, 5, 31]]
    projection = ProjectionInteraction(branch1=(5, 2 * D), branch2=(3 * D,))
    alone, beside = build(projection, bottom=None), build(projection)
    alone.load_state_dict(beside.state_dict())
    assert (alone.width, beside.width) == (6, 6 + D)
    assert torch.equal(alone(None, vectors), beside(*parts(vectors))[:, D:])


def test_cat_keeps_every_vector_in_order() -> None:
    vectors = torch.arange(2.0 * T * D).view(2, T, D)
    assert torch.equal(build(CatInteraction())(*parts(vectors)), vectors.view(2, T * D))


def test_cross_layer_by_hand() -> None:
    layer = CrossLayer(2, 1)
    layer.load_state_dict({"v": torch.tensor([[1.0, 2]]), "w": torch.tensor([[3.0], [5]]), "bias": torch.ones(2)})
    x_0, x = torch.tensor([[2.0, -1]]), torch.tensor([[1.0, 4]])
    # V x = 9; W V x + b = [28, 46]
    assert layer(x_0, x).tolist() == [[2 * 28 + 1, -46 + 4]]


@pytest.mark.parametrize("interaction", INTERACTIONS, ids=IDS)
def test_width_is_that_of_the_output_also_of_no_examples(interaction: Interaction) -> None:
    module = build(interaction)
    for batch in (2, 0):
        assert module(*parts(torch.randn(batch, T, D))).shape == (batch, module.width)


@pytest.mark.parametrize("interaction", INTERACTIONS, ids=IDS)
def test_built_on_meta_it_computes_the_same_once_filled(interaction: Interaction) -> None:
    """As TorchRec materialises a model: buffers, if there were any, would come back as zeros."""
    real = build(interaction)
    with torch.device("meta"):
        filled = build(interaction)
    assert not list(filled.buffers())
    filled.to_empty(device="cpu").load_state_dict(real.state_dict())
    vectors = torch.randn(3, T, D)
    assert torch.equal(filled(*parts(vectors)), real(*parts(vectors)))


def test_the_mlp_ends_with_relu_or_with_a_logit() -> None:
    assert [type(step) for step in MLP(3, (4, 2), linear=nn.Linear)] == [nn.Linear, nn.ReLU] * 2
    assert [type(step) for step in MLP(3, (4, 1), linear=nn.Linear, logit=True)] == [nn.Linear, nn.ReLU, nn.Linear]


def test_initial_weights_are_the_published_ones() -> None:
    torch.manual_seed(1)
    linear = NormalLinear(300, 500)
    assert float(linear.weight.detach().mean()) == pytest.approx(0, abs=1e-3)
    assert float(linear.weight.detach().std()) == pytest.approx(math.sqrt(2 / 800), rel=0.01)
    assert float(linear.bias.detach().std()) == pytest.approx(math.sqrt(1 / 500), rel=0.1)
    assert float(linear.weight.detach().abs().max()) > 4 * math.sqrt(2 / 800)  # not uniform
    layer = CrossLayer(300, 100)
    assert float(layer.v.detach().std()) == pytest.approx(math.sqrt(2 / 400), rel=0.02)
    assert float(layer.w.detach().std()) == pytest.approx(math.sqrt(2 / 400), rel=0.02)
    assert not layer.bias.any()


@pytest.mark.parametrize(("mlp_init", "linear"), [("normal", NormalLinear), ("uniform", nn.Linear)])
def test_mlp_init_reaches_every_mlp(mlp_init: str, linear: type) -> None:
    projection = build(ProjectionInteraction(branch1=(5, D), branch2=(D,)), mlp_init=mlp_init)
    linears = [module for module in projection.modules() if isinstance(module, nn.Linear)]
    assert {type(module) for module in linears} == {linear}
    assert mlp_linear(DLRMConfig(dim=D, bottom=(D,), top=(1,), mlp_init=mlp_init)) is linear


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dim": 6, "bottom": (6,)}, "multiple of 4"),
        ({"bottom": (D, 8)}, r"bottom=\[4, 8\] must end with dim=4"),
        ({"bottom": ()}, "at least 1 item"),
        ({"top": (8, 2)}, r"top=\[8, 2\] must end with 1, the logit"),
        (
            {"interaction": {"kind": "projection", "branch1": (8,), "branch2": (9, 6)}},
            r"interaction.branch2=\[9, 6\] must end with a multiple of dim=4",
        ),
        ({"interaction": {"kind": "dot", "rank": 3}}, "Extra inputs"),
    ],
)
def test_a_configuration_with_widths_that_do_not_fit_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DLRMConfig.model_validate({"dim": D, "bottom": (D,), "top": (1,)} | given)
