"""`gr plan`: what it prints and writes, its exit codes, and wrong calls."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gr.api import planning_problem
from gr.cli import main
from gr.cli.plan import _counted
from gr.errors import PlanError
from gr.planner.estimate import estimate
from gr.planner.planfile import check_plan, load_plan
from tests.support import ROOT

Refused = Callable[..., str]
CRITEO = str(ROOT / "configs/scale/dlrm-v2-criteo.yaml")


@pytest.fixture
def inventory(tmp_path: Path) -> str:
    path = tmp_path / "model.yaml"
    path.write_text(
        "name: two\nrank_batch_size: 64\n"
        "tables:\n- {name: large, rows: 200_000_000, dim: 64}\n- {name: small, rows: 10, dim: 64}\n"
    )
    return str(path)


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise", "column_wise", "data_parallel"])
def test_an_experiment(
    config: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], sharding: str
) -> None:
    written = tmp_path / "plan.json"
    assert main(["plan", config, "--topology", "cpux4", f"planner.sharding={sharding}", "--json", str(written)]) == 0
    shown = capsys.readouterr().out
    assert "4 ranks" in shown and "Fits" in shown and str(written) in shown
    (placement,) = json.loads(written.read_text())["placements"]
    assert (placement["table"], placement["sharding_type"]) == ("item_id", sharding)
    assert not run_dir.exists()


def test_an_inventory_and_its_page(inventory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "plan.html"
    assert main(["plan", inventory, "--topology", "h100x8", "--html", str(page)]) == 0
    assert "two on h100" in capsys.readouterr().out
    assert page.read_text().lower().startswith("<!doctype html>")


def test_files_are_written_before_the_report_is_printed(inventory: str, tmp_path: Path) -> None:
    """As in `gr plan ... --html p.html | head -1`, whose reader is gone."""
    page, plan = tmp_path / "p.html", tmp_path / "p.json"
    command = [sys.executable, "-m", "gr", "plan", inventory, "--topology", "h100x8"]
    read, write = os.pipe()
    os.close(read)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "--html", str(page), "--json", str(plan)], env=environment, stdout=write, stderr=write)
    os.close(write)
    assert page.stat().st_size and json.loads(plan.read_text())["predicted"]["fits"]


def test_files_of_a_model_that_does_not_fit(inventory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, plan = tmp_path / "p.html", tmp_path / "p.json"
    assert main(["plan", inventory, "--topology", "cpux2", "--html", str(page), "--json", str(plan)]) == 3
    shown = capsys.readouterr()
    assert f"wrote {page}: the plan that comes closest, which does not fit" in shown.out
    assert "does not fit cpu x 2: the tables take at least 52.0 GB of 28.0 GB" in shown.err
    assert '"verdict":"Does not fit: memory runs out on 2 of 2 ranks' in page.read_text()
    written = load_plan(plan)
    assert written.topology.hbm_bytes == 16 * 10**9
    # Within 2 % of the least memory that any plan takes.
    assert estimate(written).total_memory_R.max() < 1.02 * (52e9 / 2 + 2e9)
    with pytest.raises(PlanError, match="the plan does not fit its own topology"):
        check_plan(written, written.inventory, written.topology)


@pytest.mark.slow
def test_exit_code_3_names_the_shortfall_and_remedies(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", CRITEO, "--topology", "a100-40gx4"]) == 3
    message = capsys.readouterr().err
    assert "shortfall: " in message and " bytes" in message and "largest tables: t_cat_" in message
    for remedy in ("more hosts: ", "fp16 tables: ", "offload t_cat_", "smaller batch"):
        assert remedy in message


def test_smallest(inventory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", inventory, "--topology", "a100-40g", "--smallest"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == "smallest: 2 ranks of a100-40g"
    assert "the tables take at least" in " ".join(shown.replace("│", " ").split())


def test_smallest_of_an_experiment_divides_its_batches(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`gr train` refuses three ranks, as data.lanes=4 is not divisible by 3."""
    _, _, divides = planning_problem(config, [], "cpux1")
    assert divides == 4
    assert main(["plan", config, "--topology", "cpux1", "--smallest"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "smallest: 1 rank of cpu"


def test_diff(inventory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plans = [str(tmp_path / f"{name}.json") for name in "ab"]
    for plan, skew in zip(plans, ("0", "1.2"), strict=True):
        override = f"tables=[{{name: large, rows: 200_000_000, dim: 64, skew: {skew}, ids_per_example: 20}}]"
        types = "[table_wise]" if skew == "0" else "[row_wise]"
        override = override.replace("}]", f", sharding_types: {types}}}]")
        assert main(["plan", inventory, override, "--topology", "h100x8", "--json", plan]) == 0
    capsys.readouterr()
    assert main(["plan", "--diff", *plans]) == 0
    shown = capsys.readouterr().out
    # One rank of eight keeps its part of the rows and their state.
    moved = 200_000_000 * (64 * 4 + 4) * 7 / 8 / 1e9
    assert f"1 table changes place; {moved:.1f} GB move to another rank" in shown
    assert "step: " in shown and "fullest rank: " in shown
    assert main(["plan", "--diff", plans[0], plans[0]]) == 0
    assert "0 tables change place; 0 B" in capsys.readouterr().out


def test_diff_of_other_models_and_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The names of tables and files look like markup."""
    folder = tmp_path / "["
    folder.mkdir()
    for plan, names, ranks in (("a", ("a[/b]", "[red]x"), 8), ("b", ("a[/b]", "c", "d"), 2)):
        tables = ", ".join(f"{{name: '{name}', rows: 1000, dim: 64, sharding_types: [row_wise]}}" for name in names)
        path = folder / f"{plan}].yaml"
        path.write_text(f"rank_batch_size: 8\ntables: [{tables}]\n")
        json_path = str(folder / f"{plan}].json")
        assert main(["plan", str(path), "--topology", f"h100x{ranks}", "--json", json_path]) == 0
        assert main(["plan", str(path), "--topology", f"h100x{ranks}", "--smallest"]) == 0
    capsys.readouterr()
    assert main(["plan", "--diff", str(folder / "a].json"), str(folder / "b].json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("the plans are for another model: ") and "(2 tables, a[/b] of 1000 x 64" in lines[0]
    assert lines[1].startswith("the plans are for another topology: ") and "2 ranks of 2 a host) after" in lines[1]
    shown = "\n".join(lines)
    assert "[red]x" in shown and "a[/b]" in shown
    assert "2 tables are new, 1 is gone, 1 changes place; " in shown


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((2, 1, 3), "2 tables are new, 1 is gone, 3 change place"),
        ((1, 2, 0), "1 table is new, 2 are gone"),
        ((0, 0, 1), "1 table changes place"),
        ((0, 0, 0), "0 tables change place"),
    ],
)
def test_counts_of_a_diff(counts: tuple[int, int, int], message: str) -> None:
    assert _counted(*counts) == message


def test_files_that_would_not_be_written(refused: Refused, inventory: str, tmp_path: Path) -> None:
    path = str(tmp_path / "plan.out")
    plan = ("plan", inventory, "--topology", "h100x8")
    for option in ("--json", "--html"):
        assert refused(*plan, "--smallest", option, path).startswith("--smallest writes no file: leave out")
    same = f"{tmp_path}/./plan.out"
    assert refused(*plan, "--json", path, "--html", same) == f"--json and --html are both {path}: name two files"
    assert not Path(path).exists()


def test_wrong_calls(refused: Refused, config: str, inventory: str, tmp_path: Path) -> None:
    assert refused("plan").startswith("CONFIG is missing")
    assert refused("plan", inventory).startswith("topology is missing: NAMExRANKS, with NAME one of a100-40g")
    assert refused("plan", config).startswith("topology is missing: cpux2 plans")
    assert "h100" in refused("plan", inventory, "--topology", "h10x8")
    assert refused("plan", f"{tmp_path}/tables.csv", "--topology", "h100x8").startswith(
        f"{tmp_path}/tables.csv: a list of tables is .parquet (a row a table) or .json (a list of objects): write "
    )
    assert refused("plan", config, "--topology", "cpux3").startswith("data.lanes=4 is not divisible by the 3 ranks")
    assert refused("plan", config, "planner.tables.x=row_wise", "--topology", "cpux2").startswith(
        "planner.tables: no table named x; the model"
    )
    assert refused("plan", config, f"data.path={tmp_path}/none", "--topology", "cpux2").startswith(
        f"{tmp_path}/none: no such folder"
    )
    assert refused("plan", f"{tmp_path}/none.yaml", "--topology", "cpux2") == f"{tmp_path}/none.yaml: no such file"
    misspelt = tmp_path / "tabels.yaml"
    misspelt.write_text("rank_batch_size: 8\ntabels:\n- {name: a, rows: 10, dim: 4}\n")
    assert refused("plan", str(misspelt), "--topology", "cpux2") == (
        f"{misspelt}:2: tabels: unknown key; did you mean 'tables', of an inventory?"
    )
    # An experiment beyond what the planner counts.
    assert refused("plan", config, f"model.dim={10**9}", "--topology", "cpux2") == (
        "the planner cannot count this experiment: dim: input should be less than or equal to 1048576, got 1000000000"
    )
    assert refused("plan", "--diff", inventory, inventory).startswith(f"{inventory}: line 1 is not JSON")
    assert refused("plan", inventory, "--diff", inventory, inventory).startswith("--diff takes two plan files")
    unwritable = str(tmp_path / "no" / "plan.json")
    assert refused("plan", inventory, "--topology", "h100x8", "--json", unwritable).startswith(
        f"{unwritable} cannot be written: {tmp_path}/no is no folder"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tables=[{name: a, rows: 0, dim: 4}]", "rows"),
        ("tables=[{name: a, rows: 1, dim: -4}]", "dim"),
        ("tables=[{name: a, rows: 1, dim: 4, ros: 2}]", "rows"),
        ("tables=[]", "tables is empty"),
        (f"tables=[{{name: a, rows: 1{'0' * 400}, dim: 4}}]", "rows: should be less than or equal to"),
        ("tables=[{name: a, rows: 1, dim: 4, ids_per_example: 1.0e+308}]", "ids_per_example: should be less than"),
        (f"rank_batch_size=1{'0' * 29}", "rank_batch_size: should be less than or equal to 9007199254740992"),
    ],
)
def test_wrong_tables(refused: Refused, inventory: str, override: str, message: str) -> None:
    assert message in refused("plan", inventory, override, "--topology", "h100x8")


WITHOUT_TORCH = """
import sys
from gr.cli import main
assert main(sys.argv[1:]) == 0
heavy = {"torch", "torchrec", "fbgemm_gpu", "triton"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("kind", ["experiment", "inventory", "list"])
def test_planning_imports_no_torch(kind: str, config: str, inventory: str, tmp_path: Path) -> None:
    """A plan, its files and its page, in a process of its own: `gr plan` starts in a fraction of a second."""
    call = [inventory]
    if kind == "experiment":
        call = [str(ROOT / "configs/retrieval/ml-1m-hstu.yaml"), f"data.path={tmp_path / 'data'}"]
    elif kind == "list":
        listed = tmp_path / "tables.json"
        listed.write_text(json.dumps([{"name": "items", "rows": 5000, "dim": 64}]))
        call = [str(listed), "rank_batch_size=32"]
    written = ["--json", str(tmp_path / "plan.json"), "--html", str(tmp_path / "plan.html")]
    command = [sys.executable, "-c", WITHOUT_TORCH, "plan", *call, "--topology", "h100x8", *written]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_cards_that_serve(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", CRITEO, "--topology", "t4x6", "--serve", "int8"]) == 0
    shown = capsys.readouterr().out
    assert (
        "int8 tables on 6 cards of t4" in shown and "tables 27.0 GB" in shown and "a batch of 64 takes about" in shown
    )
    assert main(["plan", CRITEO, "--topology", "t4", "--serve", "int8", "--smallest"]) == 0
    assert "smallest: 3 cards of t4" in capsys.readouterr().out
    assert main(["plan", CRITEO, "--topology", "t4x2", "--serve", "fp16"]) == 3
    assert "24.3 GB more than 2 cards" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--serve", "int16"], "--serve int16: no dtype of served tables; did you mean 'int"),
        (["--examples", "8"], "--examples is of a model that is served: add --serve int8"),
        (["--serve", "int8", "--json", "plan.json"], "--serve prints its plan: leave out --json and --html"),
    ],
)
def test_wrong_calls_of_serve(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", CRITEO, "--topology", "t4x6", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_folder_that_is_no_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tmp_path)]) == 2
    assert "is no package, since it has no current.json" in capsys.readouterr().err
    assert main(["plan", str(tmp_path), "--serve", "int8"]) == 2
    assert "is a folder, as a package is, whose cards are what they are" in capsys.readouterr().err
