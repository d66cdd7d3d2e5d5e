"""A click model from checkpoint to answers: what a package answers is what the model answers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gr
import gr.serving.export as exporting
from gr.config.click import ClickConfig
from gr.config.export import ExportConfig, RowKind, load_export_config
from gr.data.collate_tabular import tabular_batch
from gr.embeddings import table_weights
from gr.errors import GRError, InstallError, ServingError
from gr.models import build_model
from gr.models.dense import initialise_dense
from gr.models.saved_click import SavedClick
from gr.serving.export import export
from gr.serving.package.version import Version
from gr.serving.passes.click import build
from gr.serving.servable import RequestError
from tests.support.served_click import as_rows, click_columns, write_data
from tests.support.tiny_tabular import DENSE, tiny_click_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def version(click_package: Path) -> Version:
    return Version.open(click_package)


def test_compiled_equals_eager_bit_for_bit(served_run: Path, version: Version) -> None:
    """At every batch from 1 to 4,096: the same packed tables in plain torch."""
    saved = gr.load(served_run)
    kinds = {name: table.dtype for name, table in version.manifest.tables.items()}
    module = build(saved, kinds, ExportConfig()).passes["score"].module
    score = version.verbs["score"]
    for rows in (1, 2, 3, 7, 8, 64, 513, 4096):
        request = score.encode(click_columns(rows, seed=rows))
        with torch.no_grad():
            logits = module(torch.from_numpy(request.dense_BN), torch.from_numpy(request.ids_BH))
        (answer,) = score.run([request])
        assert np.array_equal(answer["score"], logits.sigmoid().numpy()), rows


def test_answers_are_those_of_the_checkpoint(served_run: Path, version: Version) -> None:
    """In the user's own values, but for the rounding of the tables to 8 bits."""
    columns = click_columns(512)
    (answer,) = version.verbs["score"].run([version.verbs["score"].encode(columns)])
    expected = gr.load(served_run).score(as_rows(columns))
    assert np.abs(answer["score"] - expected).max() < 2e-3
    assert np.corrcoef(answer["score"], expected)[0, 1] > 0.9999


def test_requests_in_one_batch_are_answered_as_alone(version: Version) -> None:
    score = version.verbs["score"]
    requests = [score.encode(click_columns(rows, seed=rows)) for rows in (3, 0, 1, 17)]
    together, alone = score.run(requests), [score.run([request])[0] for request in requests]
    assert [len(answer["score"]) for answer in together] == [3, 0, 1, 17]
    assert all(np.allclose(a["score"], b["score"], atol=1e-6) for a, b in zip(together, alone, strict=True))


def test_values_that_training_did_not_see_are_counted(version: Version) -> None:
    columns = click_columns(4)
    before = version.count_unknown.by_column().get("c1", 0)
    columns["c1"] = np.array([b"v01", b"new", b"v02", b"other"], dtype=object)  # text of a protocol is bytes
    assert version.verbs["score"].encode(columns).ids_BH[:, 0].tolist() == [1, 0, 2, 0]
    assert version.count_unknown.by_column()["c1"] == before + 2


@pytest.mark.parametrize(
    ("name", "values", "fault"),
    [
        ("i1", None, "i1: is missing"),
        ("i2", np.zeros(3), r"i2: has shape \[3\], wanted \[rows\]"),
        ("i1", np.array([0, 1, np.inf, 0]), "i1: the request: row 2, column i1: is inf, not a finite number"),
        ("i1", np.array(["a"] * 4, dtype=object), "i1: the request: column i1 has type string, wanted numbers"),
        ("c1", np.arange(4), "c1: column c1: values of type int64 cannot be looked up"),
        ("c1", np.array([b"\xff"] * 4, dtype=object), "c1: cannot be read"),
        ("c1", np.array([{}, 1, "a", None], dtype=object), "c1: cannot be read"),
        ("c2", np.full((4, 3), 64), "c2: the request: row 0, column c2: is id 64, allowed are 0 to 63"),
        ("c2", np.full((4, 3), -1), "c2: the request: row 0, column c2: is id -1"),
        ("c2", np.zeros((4, 2), dtype=int), r"c2: has shape \[4, 2\], wanted \[rows, 3\]"),
        ("label", np.zeros(4), "label: the model has no such column"),
    ],
)
def test_requests_that_are_refused(version: Version, name: str, values: np.ndarray | None, fault: str) -> None:
    columns = {key: column for key, column in click_columns(4).items() if key != name}
    if values is not None:
        columns[name] = values
    with pytest.raises(RequestError, match=fault) as error:
        version.verbs["score"].encode(columns)
    assert error.value.field == name and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        (["tables.own.c9=int4", "tables.dtype=int8", "gate.rows=0"], r"tables\.own: the model has no table c9; "),
        (["gate.rows=0"], "tables.dtype=auto is chosen by the accuracy gate, and gate.rows=0 turns it off"),
        (["tables.dtype=int8"], "was trained without evaluation.path, so the accuracy gate has no rows"),
        (["tables.dtype=int3"], "tables.dtype"),
    ],
)
def test_exports_that_are_refused(served_run: Path, tmp_path: Path, values: list[str], fault: str) -> None:
    with pytest.raises(GRError, match=fault):
        export(served_run, tmp_path / "package", load_export_config(values))


def test_the_gate_measures_what_is_served(served_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2-bit tables fail, with the reason; auto takes types that pass; bfloat16 counts too. Nothing is compiled."""

    def passed(*_: object) -> None:
        raise InstallError("passed the gate")

    monkeypatch.setattr(exporting, "_compile", passed)
    data = ["gate.max_ne_increase=0.02", f"gate.data={served_run.parent / 'data'}"]
    out = tmp_path / "package"
    with pytest.raises(ServingError, match=r"the accuracy gate (fails|has too few rows)"):
        export(served_run, out, load_export_config([*data, "tables.dtype=int2", "gate.max_ne_increase=1e-6"]))
    for values in (["tables.dtype=int8"], ["tables.dtype=auto"], ["tables.dtype=auto", "dense=auto"]):
        with pytest.raises(InstallError, match="passed the gate"):
            export(served_run, out, load_export_config([*data, *values]))


@pytest.mark.parametrize(
    "model",
    [
        {"interaction": {"kind": "cat"}},
        {"interaction": {"kind": "dcn", "layers": 2, "rank": 4}},
        {"interaction": {"kind": "projection", "branch1": [16], "branch2": [16]}},
        {"interaction": {"kind": "dot", "self_interaction": True}},
        {"row_weights": True},
        {"bottom": None},
    ],
)
def test_every_form_of_click_model_is_traced(tmp_path: Path, model: dict[str, Any]) -> None:
    """In full precision its pass equals the model, and torch.export takes it at any batch."""
    dense = () if model.get("bottom", "") is None else DENSE
    data = write_data(tmp_path / "data", dense)
    config = tiny_click_config(data, tmp_path / "run", model=model)
    saved = saved_with_random_weights(config)
    kinds: dict[str, RowKind] = {name: "fp32" for name in table_weights(saved.model)}
    built = build(saved, kinds, ExportConfig())
    columns = {name: values for name, values in click_columns(9).items() if name in dense or name.startswith("c")}
    read, _ = saved.rows.read(as_rows(columns))
    batch = tabular_batch(read, saved.schema)
    with torch.no_grad():
        expected = saved.model(batch.dense_BN, batch.sparse)
        assert torch.allclose(built.served(batch.dense_BN, batch.sparse), expected, atol=1e-6)
        one = built.passes["score"]
        rows = torch.export.Dim("rows", min=1, max=1 << 20)
        traced = torch.export.export(one.module, one.golden, dynamic_shapes=({0: rows}, {0: rows})).module()
        for size in (1, 9):
            inputs = batch.dense_BN[:size], torch.from_numpy(read.ids_BH[:size]).int()
            assert torch.allclose(traced(*inputs), expected[:size], atol=1e-6)


def saved_with_random_weights(config: ClickConfig) -> SavedClick:
    schema = config.load_schema()
    model = build_model(config, schema).to_empty(device="cpu")
    initialise_dense(model, 0)
    for weight in table_weights(model).values():
        torch.nn.init.normal_(weight)
    return SavedClick(model.eval(), schema, config, Path(config.data.path))
