"""What every test shares: threads, data sets, a count of what was skipped for want of them, the CPU that it took."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.support import forks

# Before anything imports torch: several workers, and ranks under them, share few cores.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
os.environ.setdefault("PYTHONFAULTHANDLER", "1")  # a program that a signal ends says where it was

# An example may take long where ranks of other tests share its cores; speed is the benchmarks' business.
hypothesis.settings.register_profile("gr", deadline=None)
# Where no test says how many examples it takes; make check asks for it.
hypothesis.settings.register_profile("quick", deadline=None, max_examples=20)
hypothesis.settings.load_profile("gr")
# They run in a process of their own, which tests/ops/test_triton.py starts.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]

_SKIPPABLE = ("gpu", "data")
_QUICK_TIER = ("tests/unit", "tests/architecture")
_SLOW_CPU_SECONDS = 1.0  # the rule for the marker slow
_SLOW_MARKERS = ("slow", "cluster")


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


@pytest.fixture(scope="session")
def python() -> Iterator[Path]:
    """Takes the place of sys.executable in commands that load torch, and saves them the time of that."""
    with forks.python() as client:
        yield client


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """A test that changes torch's thread count does not slow down or speed up the next one."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else None
    yield
    if torch and torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker takes all tests with fixtures of one module: two would make them twice."""
    for item in items:
        if _has_module_fixture(item) and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
        if "test_data" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.data)
    wanting_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if wanting_gpu and not _has_gpu():
        for item in wanting_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Builds the C++ operators on a machine that has none, so that no test is taken for the one that needs 15 CPU-s."""
    operators = sys.modules.get("gr.ops.backend")
    if operators is not None and not session.config.option.collectonly:
        operators.backend_for(sys.modules["torch"].device("cpu"))


def _has_module_fixture(item: pytest.Item) -> bool:
    fixtures = item._fixtureinfo.name2fixturedefs if isinstance(item, pytest.Function) else {}
    return any(each.scope == "module" for stack in fixtures.values() for each in stack)


def _has_gpu() -> bool:
    import torch  # only when there are GPU tests to decide on: most runs of single tests need no torch

    return torch.cuda.is_available()


def pytest_exception_interact(call: pytest.CallInfo[object], report: pytest.TestReport) -> None:
    """A report of a program that failed shows what it said."""
    error = call.excinfo.value if call.excinfo else None
    if isinstance(error, subprocess.CalledProcessError) and error.stderr:
        said = error.stderr if isinstance(error.stderr, str) else error.stderr.decode(errors="replace")
        report.sections.append(("standard error of the program", said))


def _measured(phase: str) -> Callable[[pytest.Item], Generator[None, object, object]]:
    """A hook that notes the CPU seconds of a phase of a test, of this process and of those that it waited for."""

    @pytest.hookimpl(wrapper=True)
    def hook(item: pytest.Item) -> Generator[None, object, object]:
        before = _cpu_seconds()
        try:
            return (yield)
        finally:
            item.user_properties.append((f"cpu {phase}", _cpu_seconds() - before))

    return hook


def _cpu_seconds() -> float:
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used) + forks.cpu_seconds()


pytest_runtest_setup, pytest_runtest_call = _measured("setup"), _measured("call")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [each for reports in terminalreporter.stats.values() for each in reports]
    finished = [each for each in reports if getattr(each, "when", None) == "teardown"]
    total = sum(seconds for each in finished for _, seconds in each.user_properties)
    terminalreporter.write_line(f"CPU seconds of tests, with what they started: {total:.0f}")
    for each in finished:
        seconds = dict(each.user_properties).get("cpu call", 0.0)
        in_quick_tier = each.nodeid.startswith(_QUICK_TIER)
        if seconds > _SLOW_CPU_SECONDS and in_quick_tier and not any(name in each.keywords for name in _SLOW_MARKERS):
            terminalreporter.write_line(f"not marked slow: {each.nodeid} took {seconds:.1f} CPU seconds")
    skipped = terminalreporter.stats.get("skipped", [])
    counts = {marker: sum(marker in report.keywords for report in skipped) for marker in _SKIPPABLE}
    terminalreporter.write_line("skipped: " + ", ".join(f"{count} {marker}" for marker, count in counts.items()))
