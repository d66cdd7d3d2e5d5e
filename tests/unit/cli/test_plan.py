"""`gr plan`: what it prints, and wrong calls."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gr.cli import main

Refused = Callable[..., str]


def rows_of(shown: str) -> list[list[str]]:
    """The cells of the table that was printed."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in shown.splitlines() if "│" in line]


@pytest.mark.parametrize(
    ("sharding", "expected"),
    [
        ("table_wise", [["item_id", "table_wise", "dense", "0", "0..60", "0..7"]]),
        (
            "row_wise",
            [
                ["item_id", "row_wise", "dense", "0", "0..15", "0..7"],
                ["item_id", "row_wise", "dense", "1", "16..31", "0..7"],
                ["item_id", "row_wise", "dense", "2", "32..47", "0..7"],
                ["item_id", "row_wise", "dense", "3", "48..60", "0..7"],
            ],
        ),
        (
            "column_wise",
            [
                ["item_id", "column_wise", "dense", "0", "0..60", "0..3"],
                ["item_id", "column_wise", "dense", "1", "0..60", "4..7"],
            ],
        ),
        ("data_parallel", [["item_id", "data_parallel", "dense", "all", "all", "all"]]),
    ],
)
def test_plan(config: str, run_dir: Path, capsys: pytest.CaptureFixture[str], sharding: str, expected: list) -> None:
    assert main(["plan", config, "--world-size", "4", f"planner.sharding={sharding}"]) == 0
    shown = capsys.readouterr().out
    assert "sharding plan for 4 ranks" in shown and rows_of(shown) == expected
    assert not run_dir.exists()


def test_the_planner_plans_the_default_optimizer(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "--world-size", "2"]) == 0
    assert {row[0] for row in rows_of(capsys.readouterr().out)} == {"item_id"}


def test_wrong_calls(refused: Refused, config: str, tmp_path: Path) -> None:
    said = refused("plan", config, "--world-size", "3")
    assert said.startswith("data.lanes=4 is not divisible by the 3 ranks of this run: use a number")
    assert "0 is not in the range x>=1" in refused("plan", config, "--world-size", "0")
    assert refused("plan", config, "planner.tables.x=row_wise").startswith(
        "planner.tables: no table named x; the model"
    )
    assert refused("plan", config, f"data.path={tmp_path}/none").startswith(f"{tmp_path}/none/schema.json: cannot be")
    assert refused("plan", f"{tmp_path}/none.yaml") == f"{tmp_path}/none.yaml: no such file"
