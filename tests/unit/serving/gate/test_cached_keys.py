"""The gate's model with rounded keys, beside passes that keep their keys so."""

import pytest
import torch

import gr
import gr.serving.export as exporting
from gr.config import RunConfig
from gr.config.export import load_export_config
from gr.embeddings import table_weights
from gr.errors import ServingError
from gr.serving.gate.accuracy_gate import GateReport
from gr.serving.gate.cached_keys import rounded_keys
from gr.serving.passes.ranking import ranking_passes
from gr.serving.passes.ranking_build import build
from tests.support.float_tables import FloatTables
from tests.unit.serving.passes.test_ranking import APPENDED, FORMS, example, full, model_of


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_as_passes_that_keep_fewer_bits(form: str, dtype: torch.dtype) -> None:
    model = model_of(FORMS[form])
    passes = ranking_passes(model, lambda features: FloatTables(model, features), cache_dtype=dtype)
    user, batch = example(model, 9, 5)
    trained = full(model, batch)
    kv = passes["prefill"](*user.events, user.tokens(9), *user.context, *user.times(9))
    served = passes["score"](kv, user.tokens(9), *user.candidates, *user.ages(len(kv)))
    with rounded_keys(model, dtype):
        rounded = full(model, batch)
    assert torch.equal(full(model, batch), trained), "the model is as it was"
    assert kv.dtype == dtype and not torch.equal(rounded, trained)
    error, difference = (rounded - trained).abs().max(), (rounded - served).abs().max()
    assert difference < 2 * error, (error, difference)
    with rounded_keys(model, torch.float32):
        assert torch.equal(full(model, batch), trained)


def test_layers_without_keys_are_refused() -> None:
    model = model_of(APPENDED["all, hstu"])
    model.tower.layers[0] = torch.nn.Identity()
    with pytest.raises(ServingError, match="Identity has no method"), rounded_keys(model, torch.bfloat16):
        pass


@pytest.mark.parametrize("cache", ["fp32", "int8"])
def test_the_gate_of_an_export_measures_them(
    absolute_ranking_run: RunConfig, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GateReport, "require", lambda report: None)  # the tiny run has too few rows to pass
    saved = gr.load(absolute_ranking_run.run_dir)
    config = load_export_config(["tables.dtype=fp32", f"cache={cache}"])
    built = build(saved, dict.fromkeys(table_weights(saved.model), "fp32"), config)
    report = exporting._gate(built, exporting._gate_rows(saved, config), config)
    assert report is not None and (report.sensitivity > 0) == (cache == "int8")
