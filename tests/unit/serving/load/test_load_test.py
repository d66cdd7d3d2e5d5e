"""The load generator: latencies from the time that was due, the largest rate, overload; in process and over HTTP."""

import math
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.config.serving import EngineConfig
from gr.errors import DataError, ServingError
from gr.serving import Engine, TensorSpec
from gr.serving.load.load_test import (
    Run,
    largest_rate,
    offline,
    overload,
    poisson,
    read_requests,
)
from gr.serving.load.loadgen import LoadGenTarget
from gr.serving.load.targets import EngineTarget, HttpTarget
from tests.support.toy_server import running
from tests.support.toy_serving import ToyVersion

REQUESTS = [{"x": np.arange(rows, dtype=np.float32)} for rows in (1, 2, 3)]


def test_arrivals_are_poisson():
    arrivals = poisson(100, 50, np.random.default_rng(0))
    gaps = np.diff(arrivals)
    assert len(arrivals) == 5000 and gaps.mean() == pytest.approx(0.01, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)


def test_what_is_refused_counts_in_the_percentile():
    run = Run(100, np.array([0.01] * 98 + [math.inf] * 2), 2, 0, 1.0)
    assert run.percentile(50) == 0.01 and run.percentile(99) == math.inf
    assert run.goodput(0.02) == 98


def test_a_latency_counts_from_when_its_request_was_due():
    with Engine(ToyVersion(1, fixed=0.2), EngineConfig(deadline_ms=10_000, batch_rows=1)) as engine:
        run = EngineTarget(engine, "score", REQUESTS[:1]).run(np.array([0.0, 0.0, 0.01]))
    assert [round(float(latency), 1) for latency in run.latencies] == pytest.approx([0.2, 0.4, 0.6], abs=0.11)


class OneServer:
    """Answers one request after another, in 4 ms each, and refuses what it cannot within 100 ms; in no time."""

    def run(self, arrivals):
        free, latencies = 0.0, np.full(len(arrivals), math.inf)
        for number, due in enumerate(arrivals):
            ends = max(free, due) + 0.004
            if ends - due <= 0.1:
                free, latencies[number] = ends, ends - due
        refused = int(np.isinf(latencies).sum())
        return Run(len(arrivals) / arrivals[-1], latencies, refused, 0, max(free, arrivals[-1]))


def test_the_largest_rate_and_overload():
    shown = []
    best = largest_rate(OneServer(), 0.06, 20.0, start=20, show=shown.append)
    assert 200 < best.offered < 250 and best.percentile(99) <= 0.06
    assert len(shown) < 15 and best in shown and any(run.percentile(99) > 0.06 for run in shown)
    over = overload(OneServer(), best.offered, 20.0)
    assert over.refused > 0.6 * len(over.latencies)
    assert over.goodput(0.1) > best.goodput(0.1)


def test_a_bound_that_no_request_meets():
    class Slow:
        def run(self, arrivals):
            return Run(1.0, np.full(len(arrivals), 0.5), 0, 0, 1.0)

    with pytest.raises(ServingError, match=r"p99 is 500.0 ms at"):
        largest_rate(Slow(), 0.1, 1.0)


def test_over_http():
    with running(ToyVersion(1)) as (served, address):
        target = HttpTarget(address, "toy", REQUESTS, served.engine.servable("score").inputs)
        run = target.run(poisson(500, 0.2, np.random.default_rng(0)))
        assert len(run.latencies) == 200 and not run.failed and not run.refused
        assert run.percentile(100) < 10
        wrong = HttpTarget(address, "toys", REQUESTS, served.engine.servable("score").inputs)
        assert wrong.run(np.array([0.0, 0.001])).failed == 2


def test_offline():
    with Engine(ToyVersion(1), EngineConfig(deadline_ms=10_000)) as engine:
        started = time.perf_counter()
        rate, used = offline(engine, "score", REQUESTS, 100)
        assert rate > 100 / (time.perf_counter() - started) * 0.5 and used > 0


INPUTS = [TensorSpec("n", "INT64", (-1,)), TensorSpec("t", "BYTES", (-1,))]


def test_requests_of_a_file(tmp_path):
    pq.write_table(pa.table({"t": list("abcdefg"), "n": range(7), "other": [0.5] * 7}), tmp_path / "rows.parquet")
    first, last = read_requests(tmp_path / "rows.parquet", INPUTS, 3)
    assert first["n"].tolist() == [0, 1, 2] and last["t"].tolist() == ["d", "e", "f"] and last["t"].dtype == object
    pq.write_table(pa.table({"t": [["a", "b"], []], "n": [5, 6]}), tmp_path / "lists.parquet")
    first, last = read_requests(tmp_path / "lists.parquet", INPUTS, 3)
    assert first["n"].tolist() == [5] and first["t"].tolist() == ["a", "b"] and last["t"].shape == (0,)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"x": ["a"]}, "has no column that the model reads: n, t"),
        ({"t": ["a", None, "b"], "n": [1, 2, 3]}, "column t has nulls"),
        ({"t": ["a"], "n": [1]}, "has 1 rows, and a request is 3"),
    ],
)
def test_a_file_that_has_no_requests(table, message, tmp_path):
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=message):
        read_requests(tmp_path / "rows.parquet", INPUTS, 3)
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_requests(tmp_path / "none.parquet", INPUTS, 3)


def test_mlperf_loadgen_says_when():
    pytest.importorskip("mlperf_loadgen", reason="the extra loadgen is not installed")
    with Engine(ToyVersion(1, fixed=0.01), EngineConfig(deadline_ms=10_000)) as engine:
        run = LoadGenTarget(engine, "score", REQUESTS).run(poisson(500, 0.4, np.random.default_rng(0)))
    assert (len(run.latencies), run.refused, run.failed) == (200, 0, 0)
    assert run.offered == pytest.approx(500, rel=0.3) and 0.01 < run.percentile(50) < math.inf
    with Engine(ToyVersion(1, fixed=0.05), EngineConfig(deadline_ms=60, batch_rows=3)) as engine:
        over = LoadGenTarget(engine, "score", REQUESTS).run(poisson(500, 0.4, np.random.default_rng(0)))
    assert over.refused > 100 and int(np.isinf(over.latencies).sum()) == over.refused
