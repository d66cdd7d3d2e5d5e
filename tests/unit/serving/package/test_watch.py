"""Following a package: new versions are swapped in, those that cannot be opened are not."""

import time

import pytest

from gr.errors import ServingError
from gr.serving import Engine
from gr.serving.package.watch import Watch
from tests.support.toy_serving import ToyVersion


def until(condition):
    ends = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.005)


@pytest.fixture
def package():
    """The name of the version to serve; opened makes it, or raises what is put there."""
    return {"name": "step-1", "error": None, "opened": 0}


@pytest.fixture
def engine(package):
    def open_version():
        package["opened"] += 1
        if package["error"] is not None:
            raise package["error"]
        return ToyVersion(int(package["name"].removeprefix("step-")))

    with Engine(ToyVersion(1)) as engine, Watch(engine, lambda: package["name"], open_version, 0.01):
        yield engine


def test_a_new_version_is_served(engine, package):
    time.sleep(0.05)
    assert package["opened"] == 0
    package["name"] = "step-2"
    until(lambda: engine.version.name == "step-2")
    assert engine.score({"x": [1.0]})["y"] == [4]


def test_a_version_that_cannot_be_opened(engine, package, caplog):
    package.update(name="step-2", error=ServingError("other golden rows"))
    until(lambda: engine.metrics.swap_failures)
    time.sleep(0.05)
    assert package["opened"] == engine.metrics.swap_failures == 1
    assert engine.score({"x": [1.0]})["y"] == [2]
    package.update(name="step-3", error=None)
    until(lambda: engine.version.name == "step-3")


def test_what_may_pass_is_tried_again(engine, package):
    package.update(name="step-2", error=OSError(116, "Stale file handle"))
    until(lambda: package["opened"] > 2)
    assert engine.metrics.swap_failures == 0
    package["error"] = None
    until(lambda: engine.version.name == "step-2")
