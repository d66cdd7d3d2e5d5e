"""One job, one uninterrupted run of it, one cluster for all tests here."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launcher import job
from tests.launcher.hosts import need_root
from tests.launcher.slurm import PROGRAMS, Slurm
from tests.support import ROOT


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker at a time has a cluster: there are few cores."""
    for item in items:
        if item.get_closest_marker("cluster"):
            item.add_marker(pytest.mark.xdist_group("cluster"))


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Path:
    """A folder to submit from, with what the repository's has that jobs need."""
    folder = tmp_path_factory.mktemp("workspace")
    for name in ("launch", "configs", ".torchxconfig"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="session")
def experiment(tmp_path_factory) -> Path:
    return job.write_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="session")
def whole(experiment) -> dict[int, float]:
    """Loss by step of a run of the job that nobody interrupts, on 2 ranks."""
    return job.undisturbed(experiment, experiment.parent / "whole", ranks=2)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Slurm]:
    need_root(*PROGRAMS)
    with Slurm(["n1", "n2", "n3", "n4"]) as slurm:
        yield slurm
