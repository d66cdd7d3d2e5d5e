"""Dense layers with products in bfloat16: what the gate measures has the bits of what a package keeps."""

import copy

import pytest
import torch

from gr.serving.gate.dense_layers import dense_layers, in_bf16, layer_bytes, put_in_bf16
from gr.serving.passes.ranking import ranking_passes
from tests.support.float_tables import FloatTables
from tests.unit.serving.passes.test_ranking import APPENDED, FORMS, example, full, model_of


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_passes_have_the_bits_of_what_was_measured(form: str) -> None:
    model = model_of(FORMS[form])
    layers = dense_layers(model)
    assert set(layers) == {
        *(f"tower.layers.{place}" for place in range(len(model.tower.layers))), "head.layers.0", "head.layers.1"
    }  # fmt: skip
    user, batch = example(model, 9, 5)
    trained = full(model, batch)
    with in_bf16(layers.values()):
        measured = full(copy.deepcopy(model), batch)
    assert torch.equal(full(model, batch), trained), "the model is as it was"
    assert not torch.equal(measured, trained)
    before = {name: layer_bytes(layer, "bf16") for name, layer in layers.items()}
    for layer in layers.values():
        put_in_bf16(layer)
    stored = {name: sum(each.nbytes for each in layer.parameters()) for name, layer in layers.items()}
    assert stored == before
    passes = ranking_passes(model, lambda features: FloatTables(model, features))
    kv = passes["prefill"](*user.events, user.tokens(9), *user.context, *user.times(9))
    scored = passes["score"](kv, user.tokens(9), *user.candidates, *user.ages(len(kv)))
    torch.testing.assert_close(scored, measured, rtol=0, atol=0.02)
    if form in APPENDED:
        assert torch.equal(full(model, batch), measured)
