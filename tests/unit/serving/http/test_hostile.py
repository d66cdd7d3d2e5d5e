"""Each mutation of benchmarks.fuzz_server twice, on a model with an input of every datatype."""

import pytest

from benchmarks import fuzz_server
from benchmarks.hostile_requests import MUTATIONS
from tests.support.toy_server import running
from tests.support.toy_serving import WideVersion


@pytest.fixture(scope="module")
def server():
    with running(WideVersion(), read_seconds=2) as (served, address):
        yield served, address


def test_hostile_requests_are_refused_by_name(server):
    served, address = server
    inputs = fuzz_server.metadata(address, "toy")
    assert {tensor["datatype"] for tensor in inputs} == {"FP32", "FP64", "INT64", "INT32", "BOOL", "BYTES"}
    seeds = range(2 * len(MUTATIONS))
    outcomes = [fuzz_server.attempt(address, "/v2/models/toy/infer", inputs, seed) for seed in seeds]
    assert [outcome for outcome in outcomes if outcome.fault] == []
    assert len({outcome.status for outcome in outcomes}) >= 4
    assert served.bodies == 0


def test_the_request_that_is_changed_is_right(server):
    _, address = server
    draft = fuzz_server.draft("/v2/models/toy/infer", fuzz_server.metadata(address, "toy"), 0)
    assert fuzz_server.exchange(address, draft.bytes()) == (200, "")
