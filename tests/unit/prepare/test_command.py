"""The table of `gr prepare`: every row names code that exists, and nothing is imported before it is needed."""

import inspect
import subprocess
import sys

import pytest
from click.testing import CliRunner

from gr.cli.prepare import _ROWS, _load, command


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
