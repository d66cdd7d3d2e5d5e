"""Requests, batches, deadlines, overload and swaps, with a toy version of real tensors."""

import threading
import time
from concurrent.futures import Future

import numpy as np
import pytest
import torch

from gr.config.serving import EngineConfig
from gr.errors import ServingError
from gr.serving import Engine, RequestError
from gr.serving.batch_queue import Overloaded
from tests.support.toy_serving import ToyVersion

PATIENT = EngineConfig(deadline_ms=10_000)  # for tests of something else, on machines that are busy


@pytest.fixture
def version():
    return ToyVersion(1)


@pytest.fixture
def engine(version):
    with Engine(version, PATIENT) as engine:
        yield engine


def test_an_answer_is_of_its_request(engine):
    futures = [engine.submit("score", {"x": np.arange(rows) + rows}) for rows in range(1, 30)]
    for rows, future in enumerate(futures, 1):
        answer = future.result()
        assert answer.version == "step-1"
        np.testing.assert_array_equal(answer.outputs["y"], np.arange(rows) + rows + 1)


def test_score_takes_lists(engine):
    np.testing.assert_array_equal(engine.score({"x": [1, 2]})["y"], [2, 3])


def test_what_waits_is_one_batch(engine, version):
    with version.busy(engine) as first:
        futures = [first, *(engine.submit("score", {"x": np.ones(1)}) for _ in range(20))]
    for future in futures:
        future.result()
    assert version.servable.batches == [1, 20]


def test_a_batch_has_at_most_its_rows(version):
    with Engine(version, EngineConfig(batch_rows=4, request_rows=9, deadline_ms=10_000)) as engine:
        with version.busy(engine):
            futures = [engine.submit("score", {"x": np.ones(rows)}) for rows in (3, 3, 2, 2, 9, 1)]
        for future in futures:
            future.result()
        assert version.servable.batches == [1, 3, 3, 4, 9, 1]
        with pytest.raises(RequestError, match="10 in one request, at most 9"):
            engine.score({"x": np.ones(10)})


def test_a_wrong_request_names_its_field(engine):
    with pytest.raises(RequestError, match="x: is missing") as caught:
        engine.score({})
    assert caught.value.field == "x"
    with pytest.raises(ServingError, match="a click model has no rank"):
        engine.rank(user=1)
    assert engine.metrics.verbs["score"].outcomes == {"invalid": 1}


def test_a_request_that_fails_fails_alone(engine, version):
    version.servable.fails = 7.0
    with version.busy(engine):
        futures = [engine.submit("score", {"x": np.array([x])}) for x in (2.0, 7.0, 4.0)]
    assert [futures[number].result().outputs["y"][0] for number in (0, 2)] == [3, 5]
    with pytest.raises(ArithmeticError):
        futures[1].result()
    assert engine.metrics.verbs["score"].outcomes == {"ok": 3, "failed": 1}


def test_overload_is_refused_at_once_and_what_is_accepted_is_in_time():
    with Engine(ToyVersion(1, fixed=0.01, row=0.0025), EngineConfig(batch_rows=16, deadline_ms=300)) as engine:
        for _ in range(5):
            engine.score({"x": np.ones(4)})
        futures: list[Future] = []
        refused = 0
        for _ in range(400):
            try:
                futures.append(engine.submit("score", {"x": np.ones(4)}))
            except Overloaded as error:
                refused += 1
                assert 0 < error.retry_after < 1
        seconds = []
        for future in futures:
            try:
                answer = future.result()
                seconds.append(answer.queue_seconds + answer.run_seconds)
            except Overloaded:
                refused += 1
        assert refused > 300 and len(seconds) >= 10
        assert engine.metrics.verbs["score"].outcomes["overloaded"] == refused


def test_a_lone_request_is_run_whatever_the_estimate(engine):
    engine._queues["score"].time.add(1, 100.0)  # as a first batch may, that compiles something
    assert engine.score({"x": [1.0]})["y"] == [2]


def test_a_request_past_its_deadline_costs_nothing(engine, version):
    with version.busy(engine) as first:
        late = engine.submit("score", {"x": np.ones(2)}, deadline_ms=20)
        cancelled = engine.submit("score", {"x": np.ones(3)})
        assert cancelled.cancel()
        time.sleep(0.03)
    first.result()
    with pytest.raises(Overloaded, match="not answered in its"):
        late.result()
    engine.score({"x": [1.0]})
    assert version.servable.batches == [1, 1]
    assert engine.metrics.verbs["score"].outcomes == {"ok": 2, "overloaded": 1, "cancelled": 1}


def test_queue_rows_bound_what_waits(version):
    with Engine(version, EngineConfig(queue_rows=8, deadline_ms=10_000)) as engine, version.busy(engine):
        engine.submit("score", {"x": np.ones(8)})
        with pytest.raises(Overloaded, match="8 rows wait, at most 8"):
            engine.submit("score", {"x": np.ones(1)})


def test_swap_answers_with_the_version_that_encoded(version):
    with Engine(version, PATIENT) as engine:
        with version.busy(engine) as first:
            old = [first, *(engine.submit("score", {"x": np.ones(1)}) for _ in range(3))]
            second = ToyVersion(2)
            assert engine.swap(second) < 0.01
            assert not version.closed.is_set()
            new = engine.submit("score", {"x": np.ones(1)})
        assert [future.result().version for future in old] == ["step-1"] * 4
        assert new.result().version == "step-2"
        assert version.closed.wait(10)
    assert second.closed.is_set()


def test_swaps_under_load_mix_no_answer():
    first = ToyVersion(1)
    versions, stop = [first], threading.Event()
    bad, answered = [], []

    def hammer():
        while not stop.is_set():
            futures = [engine.submit("score", {"x": [1.0]}) for _ in range(8)]
            for future in futures:
                answer = future.result()
                said = {float(answer.outputs[name][0]) for name in ("before", "after")}
                said.add(float(answer.outputs["y"][0]) / 2)
                if {f"step-{number:.0f}" for number in said} != {answer.version}:
                    bad.append((said, answer.version))
            answered.append(len(futures))

    with Engine(first, PATIENT) as engine:
        threads = [threading.Thread(target=hammer) for _ in range(3)]
        for thread in threads:
            thread.start()
        for number in range(2, 60):
            versions.append(ToyVersion(number))
            engine.swap(versions[-1])
            time.sleep(0.005)
        stop.set()
        for thread in threads:
            thread.join()
    assert not bad and sum(answered) > 100
    assert all(version.closed.is_set() for version in versions)


def test_swap_refuses_another_kind(engine):
    other = ToyVersion(2, kind="ranking", verb="rank")
    with pytest.raises(ServingError, match="of a ranking model with rank; served is a click model with score"):
        engine.swap(other)
    assert other.closed.is_set() and engine.version.name == "step-1"


def test_close_answers_what_waits(version):
    engine = Engine(version, PATIENT)
    with version.busy(engine) as first:
        futures = [first, *(engine.submit("score", {"x": np.ones(1)}) for _ in range(2))]
    engine.close()
    engine.close()
    assert [future.result().outputs["y"][0] for future in futures] == [2, 2, 2]
    assert version.closed.is_set()
    with pytest.raises(ServingError, match="the engine is closed"):
        engine.score({"x": [1.0]})


def test_workers_pin_their_threads():
    counts = []
    version = ToyVersion(1)
    run = version.servable.run
    version.servable.run = lambda requests: counts.append(torch.get_num_threads()) or run(requests)
    before = torch.get_num_threads()
    with Engine(version, PATIENT) as engine:
        engine.score({"x": [1.0]})
    assert counts == [1] and torch.get_num_threads() == before
