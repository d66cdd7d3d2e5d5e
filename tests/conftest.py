"""What every test shares: threads, data sets, and a count of what was skipped for want of them."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# Before anything imports torch: several workers, and ranks under them, share few cores.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

# An example may take long where ranks of other tests share its cores; speed is the benchmarks' business.
hypothesis.settings.register_profile("gr", deadline=None)
hypothesis.settings.load_profile("gr")
# They run in a process of their own, which tests/ops/test_triton.py starts.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]

_SKIPPABLE = ("gpu", "data")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder with the public data sets, from GR_TEST_DATA."""
    name = os.environ.get("GR_TEST_DATA")
    if not name:
        pytest.skip("GR_TEST_DATA is not set: no public data sets to test on")
    folder = Path(name)
    if not folder.is_dir():
        pytest.fail(f"GR_TEST_DATA={name} is not a folder")
    return folder


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """A test that changes torch's thread count does not slow down or speed up the next one."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else None
    yield
    if torch and torch.get_num_threads() != before:
        torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "test_data" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.data)
    wanting_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if wanting_gpu and not _has_gpu():
        for item in wanting_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_gpu() -> bool:
    import torch  # only when there are GPU tests to decide on: most runs of single tests need no torch

    return torch.cuda.is_available()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    counts = {marker: sum(marker in report.keywords for report in skipped) for marker in _SKIPPABLE}
    terminalreporter.write_line("skipped: " + ", ".join(f"{count} {marker}" for marker, count in counts.items()))
