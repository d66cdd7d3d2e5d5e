"""The cells of a grid: their sizes, which are left out, and what is wrong with a grid."""

import json
import re
from pathlib import Path

import pytest

from gr.cli import main
from gr.errors import ConfigError, DataError
from gr.prepare.synthetic import StreamOptions, write_stream
from gr.scaling.grid import CELL, REPORT, finished, load_grid, share

GRID = Path(__file__).parents[3] / "configs/scaling/stream.yaml"
SMALL = ["lengths=[15]", "widths=[4, 8]", "budgets=[2e7, 5e7]", "seeds=[1]", "min_steps=15"]


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    options = StreamOptions(items=60, categories=12, records=1640, length=16, test_records=40, at_start=1.0)
    write_stream(options, folder / "data/stream")
    return folder


@pytest.fixture(autouse=True)
def beside_the_data(stream: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stream)


def test_steps_follow_from_the_budget_by_one_formula() -> None:
    grid = load_grid(GRID, SMALL)
    cells = {cell.name: cell for cell, _ in grid.cells}
    assert [cell.budget for cell, _ in grid.cells] == sorted(cell.budget for cell, _ in grid.cells)
    for cell, config in grid.cells:
        assert abs(cell.flops / cell.budget - 1) < 0.5 / cell.steps + 1e-9
        assert cell.tokens == cell.steps * 8 * 15
        assert (config.trainer.steps, config.model.dim, config.seed) == (cell.steps, cell.width, cell.seed)
        assert config.run_dir == f"runs/scaling-stream/{cell.name}"
    # HSTU of width 8: W_uvqk, W_o and its bias, biases of 29 distances, in two layers; positions.
    hstu = cells["hstu-w8-n15-c5e+07-s1"]
    assert hstu.parameters == 2 * (8 * 32 + 8 * 8 + 8 + 29) + 15 * 8
    per_token = 3 * (2 * 2 * (8 * 32 + 8 * 8) + 2 * 8 * 60)  # products and the loss, forward and backward
    scores = 3.5 * (2 * 2 * 16) * 15 * 16 / 2
    assert hstu.flops == hstu.steps * 8 * (15 * per_token + scores)


def test_the_width_sets_the_sizes_and_the_rate() -> None:
    by_width = {config.model.dim: config for cell, config in load_grid(GRID, SMALL).cells if cell.tower == "hstu"}
    assert by_width[8].model.tower.qk_dim == 8 and by_width[4].model.tower.v_dim == 4
    assert (by_width[4].optimizer.lr, by_width[8].optimizer.lr) == (0.06, 0.03)


def test_cells_that_repeat_data_or_hardly_train_are_left_out() -> None:
    grid = load_grid(GRID, [*SMALL, "budgets=[2e6, 2e7, 1e11]"])
    assert grid.left_out == {"fewer than 15 steps": 4, "more than one pass of data/stream/train": 4}
    with pytest.raises(ConfigError, match="no cell is left to run: 4 have more than one pass of data/stream/train"):
        load_grid(GRID, [*SMALL, "budgets=[1e12]"])


def test_shards_have_every_cell_once() -> None:
    grid = load_grid(GRID, SMALL)
    shares = [[cell.name for cell, _ in share(grid, shard, 3)] for shard in range(3)]
    assert sorted(name for own in shares for name in own) == sorted(cell.name for cell, _ in grid.cells)


def test_a_finished_cell_is_skipped_and_another_grids_is_refused(tmp_path: Path) -> None:
    overrides = [*SMALL, f"out={tmp_path}"]
    grid = load_grid(GRID, overrides)
    cell, config = grid.cells[0]
    folder = Path(config.run_dir)
    folder.mkdir()
    (folder / CELL).write_text(json.dumps(vars(cell)))
    assert len(list(share(grid, 0, 1))) == len(grid.cells)
    (folder / REPORT).write_text('{"model": {"loss": 3.0}}')
    assert len(list(share(grid, 0, 1))) == len(grid.cells) - 1
    assert finished(tmp_path)[0] | {"loss": 3.0, "tower": cell.tower} == finished(tmp_path)[0]
    (folder / CELL).write_text(json.dumps(vars(cell) | {"steps": 7}))
    with pytest.raises(ConfigError, match=rf"has steps=7, the grid {cell.steps}: set another out, or remove it"):
        list(share(grid, 0, 1))
    (folder / CELL).write_text("{")
    with pytest.raises(DataError, match=r"cell\.json: cannot be read: line"):
        finished(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", str(GRID), *SMALL, "lengths=[64]"], r"lengths=64, but data/stream/train has 15\.0 events to read"),
        (["run", str(GRID), *SMALL, "experiment=retrieval/synthetic-hstu"], "set task.kind=retrieval with "),
        ([str(GRID), *SMALL, "--shard", "4/4"], "--shard=4/4: expected I/N with I from 0 to N - 1, as 0/4"),
        (["fit", "."], "holds no finished cell of `gr scale GRID`: name the grid's folder `out`"),
        (["fit", ".", "--oracle", "none.json"], "holds no finished cell"),
        ([str(GRID), *SMALL, "width=[4]"], "width: unknown key; did you mean 'widths'"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", *arguments]) == 2
    shown = capsys.readouterr().err
    assert re.search(re.escape(message) if "\\" not in message else message, shown), shown
    assert shown.count("\n") == 1 and shown.startswith("error: ")


def test_a_grid_is_no_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(GRID)]) == 2
    assert f"{GRID}: a grid of experiments: use gr scale {GRID}" in capsys.readouterr().err


def test_ranks_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["scale", str(GRID), *SMALL]) == 2
    assert "this is one of 2 ranks: start it without torchrun" in capsys.readouterr().err
