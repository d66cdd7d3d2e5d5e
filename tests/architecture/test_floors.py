"""Imports go down the floors only (contracts in pyproject.toml), and the ground floor is light."""

import subprocess
import sys

import pytest

from .source import ROOT

_HEAVY = ("torch", "torchrec", "fbgemm_gpu", "triton", "pyarrow", "numpy")


def test_floors():
    """In a process of its own: import-linter configures logging, which silences the loggers of every later test."""
    lint = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", lint], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import gr",
        "import gr.errors, gr.logging, gr.config, gr.schema",
        "import gr.cli, gr.cli.config, gr.cli.doctor",
        "from gr.cli import main; main(['--help'])",
        "from gr.cli import main; main(['config', 'schema'])",
    ],
)
def test_loads_nothing_heavy(code):
    ask = f"{code}\nimport sys\nprint('loaded:', *(m for m in {_HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"
