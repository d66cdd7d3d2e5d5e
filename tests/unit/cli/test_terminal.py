"""Names of files and arguments of others, on every way to the terminal: no control character, no forged line."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from gr import logging
from gr.cli import main
from gr.status import RunError, RunStatus, StatusFile

ESC = "\x1b]0;PWN\x07"
NAME = f"a{ESC}\nerror: fake\r\u202eb"
ESCAPED = r"a\x1b]0;PWN\x07\nerror: fake\r\u202eb"
Shown = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def shown(capfd: pytest.CaptureFixture[str]) -> Shown:
    """shown(*arguments): the exit code, and all that is printed, which is checked."""

    def run(*arguments: str) -> tuple[int, str]:
        code = main(arguments)
        text = "".join(capfd.readouterr())
        assert_clean(text)
        return code, text

    return run


def assert_clean(text: str) -> None:
    assert all(line.isprintable() for line in text.split("\n")), repr(text)
    assert not any(line.strip().startswith("error: fake") for line in text.split("\n")), text


def inventory(path: str, rows: int = 1000) -> str:
    tables = [{"name": f"{NAME} {index}", "rows": rows, "dim": 16} for index in range(3)]
    content = {"name": NAME, "rank_batch_size": 64, "tables": tables}
    Path(path).write_text(yaml.safe_dump(content) if path.endswith(".yaml") else json.dumps(tables))
    return path


def test_names_of_tables_and_of_the_model_in_a_plan(shown: Shown) -> None:
    code, text = shown("plan", inventory("i.yaml"), "--topology", "h100x2", "--json", f"{ESC}.json")
    assert code == 0 and ESCAPED in text and r"wrote \x1b]0;PWN\x07.json" in text


def test_a_plan_that_does_not_fit(shown: Shown) -> None:
    code, text = shown("plan", inventory("i.yaml", 10**11), "--topology", "h100x1")
    assert code == 3 and text.startswith(f"error: {ESCAPED} does not fit") and f"{ESCAPED} 0" in text


def test_the_smallest_number_of_ranks(shown: Shown) -> None:
    code, text = shown("plan", inventory("i.yaml"), "--topology", "h100", "--smallest")
    assert code == 0 and ESCAPED in text


def test_the_difference_of_two_plans_whose_tables_move(shown: Shown) -> None:
    before, after = f"{ESC}1.json", f"{ESC}2.json"
    for path, sharding in ((before, "table_wise"), (after, "row_wise")):
        tables = [{"name": NAME, "rows": 100_000, "dim": 16, "sharding_types": [sharding]}]
        Path("i.json").write_text(json.dumps(tables))
        assert shown("plan", "i.json", "rank_batch_size=64", "--topology", "h100x2", "--json", path)[0] == 0
    code, text = shown("plan", "--diff", before, after)
    assert code == 0 and ESCAPED in text and r"from \x1b]0;PWN\x071.json" in text and "1 table changes place" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ("config", "check", NAME),
        ("config", "show", "good.yaml", f"{NAME}=1"),
        ("config", "show", "good.yaml", f"seed={NAME}"),
        ("config", "show", "good.yaml", f"planner.tables={{{NAME}: x}}"),
        ("config", "diff", NAME, NAME),
        ("config", "check", "good.yaml", f"--{NAME}"),
        (NAME,),
        ("train", NAME),
        ("train", "good.yaml", "--plan", NAME),
        ("train", "good.yaml"),
        ("evaluate", "--checkpoint", NAME),
        ("recommend", "--checkpoint", NAME, "--out", NAME),
        ("recommend", "--checkpoint", "x", "--out", f"{ESC}/x"),
        ("export-weights", "--checkpoint", NAME, "--out", f"{ESC}.safetensors"),
        ("status", NAME),
        ("plan", NAME, "--topology", "h100x8"),
        ("plan", "good.yaml", "--topology", NAME),
        ("plan", "good.yaml", "--topology", f"{NAME}.yaml"),
        ("plan", "--diff", NAME, NAME),
        ("prepare", "movielens-1m", "--source", NAME, "--out", NAME),
        ("baselines", NAME),
        ("calibrate", "--hardware", NAME, "--out", NAME),
        ("doctor", NAME),
    ],
    ids=lambda arguments: " ".join(arguments)[:30].split(NAME[0:2])[0],
)
def test_arguments_in_errors(shown: Shown, arguments: tuple[str, ...]) -> None:
    Path("good.yaml").write_text(f"run_dir: r\ndata: {{path: {json.dumps(NAME)}}}\ntrainer: {{steps: 5}}\n")
    code, text = shown(*arguments)
    assert code == 2 and text.startswith("error: ") and len(text.splitlines()) == 1


def test_keys_and_values_of_a_file(shown: Shown) -> None:
    Path("bad.yaml").write_text(f"{json.dumps(NAME)}: 1\nbase: {json.dumps(NAME)}\nx: 2\n")
    code, text = shown("config", "check", "bad.yaml")
    assert code == 2 and ESCAPED in text


def test_what_is_right_is_escaped_too(shown: Shown) -> None:
    Path(f"{ESC}.yaml").write_text("run_dir: r\ndata: {path: d}\ntrainer: {steps: 5}\n")
    Path("b.yaml").write_text(
        Path(f"{ESC}.yaml").read_text() + f"planner: {{tables: {{{json.dumps(NAME)}: row_wise}}}}"
    )
    assert shown("config", "check", f"{ESC}.yaml") == (0, "ok: \\x1b]0;PWN\\x07.yaml\n")
    assert ESCAPED in shown("config", "diff", f"{ESC}.yaml", "b.yaml")[1]
    assert "PWN" in shown("config", "show", "b.yaml")[1]  # YAML has its own escapes


def test_a_status_that_another_program_wrote(shown: Shown) -> None:
    Path(ESC).mkdir()
    StatusFile(Path(ESC)).start(RunStatus("failed", 1, 2, 1, error=RunError(0, NAME, NAME)))
    assert f"rank 0 on {ESCAPED}: {ESCAPED}" in shown("status", ESC)[1]
    assert "PWN" in shown("status", ESC, "--json")[1]
    (Path(ESC) / "status.json").write_text(json.dumps({"error": None, NAME: 1}))
    assert ESCAPED in shown("status", ESC)[1]


def test_log_lines(capfd: pytest.CaptureFixture[str]) -> None:
    logging.configure()
    logging.get_logger("gr.x").warning("table %s", NAME)
    text = capfd.readouterr().err
    assert text == f"warning: table {ESCAPED}\n"


def test_a_run_whose_folder_has_such_a_name(config: str, shown: Shown) -> None:
    code, text = shown("train", config, f"run_dir={json.dumps(f'{ESC}[red]')}")
    assert code == 0 and r"run folder: \x1b]0;PWN\x07[red] (" in text and r"checkpoint: \x1b]0;PWN\x07[red]/" in text
    code, text = shown("evaluate", "--checkpoint", f"{ESC}[red]")
    assert code == 0 and r"checkpoint: \x1b]0;PWN\x07[red]/" in text


def test_the_test_bites() -> None:
    with pytest.raises(AssertionError):
        assert_clean(subprocess.run(["printf", ESC.replace("\x1b", "\\033")], capture_output=True, text=True).stdout)
