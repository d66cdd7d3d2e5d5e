"""Fixtures of the operator tests."""

from collections.abc import Iterator

import pytest
import torch

from gr.errors import InstallError
from gr.ops import cpp_extension
from gr.ops.backend import Backend


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(params=["native", "torch"])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "native":
        try:
            cpp_extension.load()
        except InstallError as error:
            pytest.skip(f"no C++ operators here: {error}")
    return request.param
