"""Layer by layer: which differ, by how much, and in what order."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gr
from gr.cli import main
from gr.config import RunConfig
from gr.config.export import ExportConfig
from gr.embeddings import table_weights
from gr.errors import ServingError
from gr.serving.gate.accuracy_gate import Limits
from gr.serving.gate.calibration import calibration
from gr.serving.gate.dtypes import choose, rounded
from gr.serving.gate.numerics import compare_layers, first_that_differs, package_layers, rounded_layers
from gr.serving.package.layout import read_current, read_manifest


class Twice(nn.Module):
    """It calls one layer twice, and returns a dictionary."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, width)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.last(self.inner(self.inner(x))), "n": torch.arange(3)}


def call(model: nn.Module, x: Tensor) -> object:
    return model(x)


def test_layers_come_in_order_with_their_ratio() -> None:
    ours, theirs = Twice(), Twice()
    batches = [torch.randn(5, 4), torch.randn(3, 4)]
    same = compare_layers(ours, theirs, batches, call)
    assert [layer.layer for layer in same] == ["inner", "inner#2", "last", "model[y]"]
    assert all(layer.snr == math.inf and layer.largest == 0 for layer in same) and first_that_differs(same) is None
    with torch.no_grad():
        theirs.last.bias += torch.tensor([0.5, 0.0, 0.0, -0.25])
    layers = {layer.layer: layer for layer in compare_layers(ours, theirs, batches, call)}
    assert not layers["inner#2"].differs and first_that_differs(list(layers.values())) == layers["last"]
    outputs = torch.cat([ours(x)["y"].detach() for x in batches]).double()
    noise = (0.25 + 0.0625) / 4
    last = layers["last"]
    assert last.kind == "Linear" and last.values == 32 and last.largest == pytest.approx(0.5)
    assert last.signal == pytest.approx(float(outputs.square().mean().sqrt()))
    assert last.snr == pytest.approx(10 * math.log10(float(outputs.square().mean()) / noise), abs=1e-4)
    assert layers["model[y]"].snr == last.snr


def test_outputs_that_are_not_finite_differ_unless_both_are_alike() -> None:
    ours, theirs, x = Twice(), Twice(), [torch.randn(2, 4)]
    with torch.no_grad():
        theirs.last.bias[1] = torch.nan
    assert compare_layers(ours, theirs, x, call)[2].snr == -math.inf
    with torch.no_grad():
        ours.last.bias[1] = torch.nan
    assert compare_layers(ours, theirs, x, call)[2].snr == math.inf


def test_models_of_other_forms_are_one_line() -> None:
    with pytest.raises(ServingError, match=r"layer last gives \(2, 4\) in one model and \(2, 5\) in the other"):
        compare_layers(Twice(), Twice(5), [torch.randn(2, 4)], call)
    with pytest.raises(ServingError, match="no layer in common"):
        compare_layers(Twice(), Twice(), [], call)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "table"),
    [
        ("click_run", "embedding_bags.c2"),
        ("ranking_run", "embeddings.category"),
        ("retrieval_run", "embeddings.item_id"),
    ],
)
def test_a_rounded_table_is_the_first_that_differs(run: str, table: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(run).run_dir
    saved, other = gr.load(folder), gr.load(folder)
    rows = calibration(saved, rows=50)
    with rounded(other.model, {table.split(".")[1]: "int4"}):
        layers = compare_layers(saved.model, other.model, rows.batches, rows.forward)
    first = first_that_differs(layers)
    assert first is not None and first.layer == f"tables.{table}" and 10 < first.snr < 40
    assert layers[-1].differs


@pytest.mark.slow
def test_pictures(click_run: RunConfig, tmp_path: Path) -> None:
    from gr.serving.gate.pictures import draw_layers, draw_sensitivities

    saved, other = gr.load(click_run.run_dir), gr.load(click_run.run_dir)
    rows = calibration(saved, rows=100)
    with rounded(other.model, {"c1": "int8"}):
        draw_layers(compare_layers(saved.model, other.model, rows.batches, rows.forward), tmp_path / "layers.png")
    options = ExportConfig(dense="auto").options(list(table_weights(saved.model)), ["bottom.0"])
    draw_sensitivities(choose(rows, Limits(ne=0.01), options), tmp_path / "tables.svg")
    assert (tmp_path / "layers.png").stat().st_size > 5_000
    assert all(name in (tmp_path / "tables.svg").read_text() for name in ("<svg", "c2", "bottom.0"))


@pytest.mark.slow
def test_the_command(click_run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["numerics", "--checkpoint", click_run.run_dir, "--rows", "64"]
    assert main([*arguments, "--dtype", "int8", "--picture", str(tmp_path / "layers.svg")]) == 0
    shown = capsys.readouterr().out
    assert "the first layer that differs: tables.embedding_bags.c1" in shown and (tmp_path / "layers.svg").exists()
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line.strip()}
    assert rows["bottom.0"][-1] == "equal" and 20 < float(rows["model"][-1]) < 80
    assert main([*arguments, "--dtype", "int3"]) == 2
    assert main([*arguments, "--dtype", "int8", "--picture", str(tmp_path / "layers.txt")]) == 2
    assert main([*arguments, "--dtype", "int8", "--data", str(tmp_path / "none")]) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors and errors.count("error: ") == 3


@pytest.mark.slow
def test_the_types_of_a_package(
    served_run: Path, click_package: Path, ranking_run: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = read_manifest(click_package, read_current(click_package)).tables
    data = served_run.parent / "data"
    layers = package_layers(click_package, served_run, rows=64, data=data)
    by_hand = rounded_layers(served_run, {name: table.dtype for name, table in tables.items()}, rows=64, data=data)
    assert layers == by_hand and first_that_differs(layers) is not None
    in_bf16 = {layer.layer: layer for layer in rounded_layers(served_run, "bf16", rows=64, data=data)}
    assert not in_bf16["tables"].differs and 30 < in_bf16["model"].snr < 70
    named = ["numerics", str(click_package), "--checkpoint"]
    assert main([*named, ranking_run.run_dir]) == 2
    assert "serves a click model" in capsys.readouterr().err
    assert main([*named, str(served_run), "--dtype", "int8"]) == 2
    assert "PACKAGE or --dtype, and not both" in capsys.readouterr().err
