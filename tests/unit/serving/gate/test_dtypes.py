"""The kinds of rows that are chosen: the path to fewer bytes, what is measured on it; the model stays as it is."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
import torch

import gr
from gr.config import RunConfig
from gr.config.export import ExportConfig, Kind
from gr.embeddings import table_weights
from gr.errors import ServingError
from gr.models.saved import Saved
from gr.serving.gate.accuracy_gate import Limits
from gr.serving.gate.calibration import Calibration, calibration
from gr.serving.gate.dense_layers import dense_layers
from gr.serving.gate.dtypes import Sensitivity, bytes_by_part, choose, measure, rounded, steps_to_fewer_bytes, taken
from gr.serving.tables.quantize import ROW_KINDS, bytes_of, round_trip


@pytest.fixture(scope="module")
def clicks(click_run: RunConfig) -> Calibration:
    return calibration(gr.load(click_run.run_dir))


def every_kind(rows: Calibration) -> dict[str, Sequence[Kind]]:
    return ExportConfig(dense="auto").options(
        list(table_weights(rows.saved.model)), list(dense_layers(rows.saved.model))
    )


def weights(saved: Saved) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in table_weights(saved.model).items()}


def test_a_rounded_model_gets_its_weights_back(clicks: Calibration) -> None:
    saved, before = clicks.saved, weights(clicks.saved)
    with pytest.raises(KeyboardInterrupt), rounded(saved.model, {"c1": "int4", "c3": "fp32"}):
        during = weights(saved)
        raise KeyboardInterrupt
    assert torch.equal(during["c1"], round_trip(before["c1"], "int4")) and not torch.equal(during["c1"], before["c1"])
    assert all(torch.equal(during[name], before[name]) for name in ("c2", "c3"))
    assert all(torch.equal(weight, before[name]) for name, weight in weights(saved).items())
    with (
        pytest.raises(ServingError, match=r"no table c9: .*c1, c2, c3"),
        rounded(saved.model, {"c9": "int8"}),
    ):
        raise AssertionError("it must not come so far")


@pytest.mark.parametrize("seed", range(5))
def test_every_choice_on_the_path_is_the_best_of_its_bytes(seed: int) -> None:
    random = np.random.default_rng(seed)
    shapes = {"a": (7, 8), "b": (100, 16), "c": (31, 8)}
    measured = [
        Sensitivity(
            part=table, kind=kind, bytes=bytes_of(*shape, kind), sensitivity=float(random.exponential(10.0**-place)),
            measure="ne", change=0.0, error=0.0, verdict="pass", clipped=0,
        )
        for table, shape in shapes.items()
        for place, kind in zip((6, 4, 2, 1), ROW_KINDS[1:], strict=True)
    ]  # fmt: skip
    cost = {(each.part, each.kind): each.sensitivity for each in measured}
    fp32_bytes = {name: bytes_of(*shape, "fp32") for name, shape in shapes.items()}
    steps = steps_to_fewer_bytes(measured, fp32_bytes)
    every = [dict(zip(shapes, kinds, strict=True)) for kinds in product(ROW_KINDS, repeat=3)]
    size = {id(choice): sum(bytes_of(*shapes[name], kind) for name, kind in choice.items()) for choice in every}
    total = {id(choice): sum(cost.get(each, 0.0) for each in choice.items()) for choice in every}
    for count in range(len(steps) + 1):
        chosen = next(choice for choice in every if choice == taken(steps[:count], dict.fromkeys(shapes, "fp32")))
        no_larger = [total[id(choice)] for choice in every if size[id(choice)] <= size[id(chosen)]]
        assert total[id(chosen)] <= min(no_larger) * (1 + 1e-9)
    assert taken(steps, {}) == dict.fromkeys(shapes, "int2")


@pytest.mark.slow
def test_the_choice_is_the_cheapest_that_passes(clicks: Calibration) -> None:
    model = clicks.saved.model
    tight, usual, loose = (choose(clicks, Limits(ne=ne), every_kind(clicks)) for ne in (1e-12, 0.003, 10.0))
    assert set(tight.kinds.values()) == {"fp32"} and tight.bytes == tight.fp32_bytes
    assert loose.kinds == {**dict.fromkeys(table_weights(model), "int2"), **dict.fromkeys(dense_layers(model), "bf16")}
    assert loose.bytes == sum(bytes_by_part(model, loose.kinds).values())
    assert tight.bytes > usual.bytes >= loose.bytes
    for choice, ne in ((tight, 1e-12), (usual, 0.003), (loose, 10.0)):
        assert choice.gate.verdict == "pass"
        assert measure(clicks, choice.kinds, Limits(ne=ne)) == choice.gate
    tables = product(table_weights(model), ROW_KINDS[1:])
    assert {(each.part, each.kind) for each in usual.sensitivities} == {
        *tables,
        *product(dense_layers(model), ["bf16"]),
    }
    by_kind = [max(each.sensitivity for each in usual.sensitivities if each.kind == kind) for kind in ROW_KINDS[1:]]
    assert by_kind == sorted(by_kind), "fewer bits, more change"
    assert type(usual).model_validate_json(usual.model_dump_json()) == usual


def test_kinds_that_are_not_named_are_not_chosen(clicks: Calibration) -> None:
    tables, layers = table_weights(clicks.saved.model), dense_layers(clicks.saved.model)
    options = {**dict.fromkeys(tables, ("fp32", "fp16")), **dict.fromkeys(layers, ("bf16",))}
    choice = choose(clicks, Limits(ne=10.0), options)
    assert choice.kinds == {**dict.fromkeys(tables, "fp16"), **dict.fromkeys(layers, "bf16")}
    assert {each.kind for each in choice.sensitivities} == {"fp16"}


@pytest.mark.slow
@pytest.mark.parametrize("run", ["ranking_run", "retrieval_run"])
def test_histories_have_a_choice_too(run: str, request: pytest.FixtureRequest) -> None:
    rows = calibration(gr.load(request.getfixturevalue(run).run_dir))
    choice = choose(rows, Limits(ne=10.0, ranking=10.0), every_kind(rows))
    assert choice.gate.verdict == "pass" and choice.bytes < 0.55 * choice.fp32_bytes
    assert {name for name, kind in choice.kinds.items() if kind == "bf16"} == set(dense_layers(rows.saved.model))
