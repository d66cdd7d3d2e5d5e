"""A click model from checkpoint to answers: what a package answers is what the model answers."""

from pathlib import Path

import numpy as np
import pytest
import torch

import gr
from gr.config.export import load_export_config
from gr.errors import ConfigError
from gr.serving.passes.click import build
from gr.serving.servable import RequestError
from gr.serving.version import Version
from tests.support.served_click import as_rows, click_columns

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def version(click_package: Path) -> Version:
    return Version.open(click_package)


def test_compiled_equals_eager_bit_for_bit(served_run: Path, version: Version) -> None:
    """At every batch from 1 to 4,096: the same packed tables in plain torch."""
    saved = gr.load(served_run)
    module = build(saved, version.manifest.export).passes["score"].module
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


def test_tables_that_are_not_there(served_run: Path) -> None:
    with pytest.raises(ConfigError, match=r"tables\.own: the model has no table c9; "):
        build(gr.load(served_run), load_export_config(["tables.own.c9=int4"]))
