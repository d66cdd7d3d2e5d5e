"""The table of `gr prepare`: every row names code that exists, and nothing is imported before it is needed."""

import errno
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from gr.cli import main
from gr.cli.prepare import _ROWS, _load, command
from gr.errors import DataError
from gr.prepare.write import PartWriter, writing


@pytest.mark.parametrize("name", _ROWS)
def test_a_row_names_a_function_that_takes_its_options(name: str) -> None:
    row = _ROWS[name]
    options = {"options"} if row.sizes else {option.name for option in row.options} - {"out", "force", "sha256"}
    if row.sizes and any(option.name == "source" for option in row.options):
        options.add("source")
    inspect.signature(_load(row.run)).bind(folder=None, **row.fixed, **dict.fromkeys(options))


@pytest.mark.parametrize("name", command.commands)
def test_help(name: str) -> None:
    result = CliRunner().invoke(command, [name, "--help"])
    assert result.exit_code == 0 and "--out" in result.output


def test_the_list_of_commands_imports_no_numpy() -> None:
    code = "import sys\nfrom gr.cli import main\nmain(['prepare', '--help'])\nprint('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_an_option_given_twice_is_not_taken_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["prepare", "clicks", "--out", f"{tmp_path}/a", "--out", f"{tmp_path}/b"]) == 2
    assert capsys.readouterr().err == "error: --out is given 2 times, and takes one value\n"
    assert main(["prepare", "clicks", "--out", "a\0b"]) == 2
    for day in (0, 1):
        (tmp_path / f"day_{day}").write_text("1" + "\t" * 39 + "\n")
    places = [word for day in (0, 1) for word in ("--source", f"{tmp_path}/day_{day}")]
    assert main(["prepare", "criteo", *places, "--out", f"{tmp_path}/c"]) == 0
    assert "2 rows of 2 files" in capsys.readouterr().out


@pytest.mark.parametrize("out", ["/proc/gr", "a" * 300, "/dev/full/x"])
def test_where_nothing_can_be_written(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "clicks", "--rows", "100", "--test-rows", "10", "--out", out]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {out}: cannot be written: ") and error.count("\n") == 1


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(self: PartWriter, table: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PartWriter, "write", full)
    (tmp_path / "day_0").write_text("1" + "\t" * 39 + "\n")
    for arguments in (["clicks", "--rows", "100"], ["criteo", "--source", f"{tmp_path}/day_0"]):
        assert main(["prepare", *arguments, "--out", f"{tmp_path}/out"]) == 2
        assert "out: cannot be written: No space left on device; make room" in capsys.readouterr().err


def test_a_source_that_cannot_be_read_is_no_fault_of_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"/proc/1/cwd: cannot be read: Permission denied; name what this user may"):  # noqa: SIM117
        with writing(tmp_path / "out"):
            raise PermissionError(errno.EACCES, "Permission denied", "/proc/1/cwd")


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["events", "--source=", "--user=u", "--item=i", "--out=o"], "'--source' is empty: write a value, or leave it"),
        (["criteo", "--source", "a", "", "--out=o"], "'[MORE]...' is empty: write a value"),
        (["events", "--source=a", "--user=u", "--item=i", "--out=o", "--test-users=nan"], "nan is no finite number"),
        (["events", "--source=a", "--user=u", "--item=i", "--out=o", "--memory=inf"], "inf is not in the range"),
        (["synthetic", "--length", f"{1 << 70}", "--out=o"], "is not in the range"),
        (["synthetic", "--seed", f"{1 << 63}", "--out=o"], "is not in the range"),
        (["clicks", "--rows", f"{1 << 63}", "--out=o"], "rows=9223372036854775808: must be at most"),
    ],
)
def test_values_that_nobody_means(arguments: list[str], fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", *arguments]) == 2
    assert fault in capsys.readouterr().err


def test_more_memory_than_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "synthetic", "--items", "10000000000000", "--out", f"{tmp_path}/out"]) == 2
    assert "needs more memory than there is" in capsys.readouterr().err and not any(tmp_path.iterdir())
