"""Load on an engine or on a server: requests arrive by a Poisson process, whether or not earlier ones are answered.

A latency counts from the moment at which its request was due, so that a generator that falls behind hides nothing. What
was refused or failed has an infinite latency: the p99 of a run is over everything that was offered.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gr.errors import DataError, ServingError
from gr.serving.engine import Engine
from gr.serving.http.open_inference import DTYPES
from gr.serving.servable import TensorSpec

_FEWEST = 200  # requests of a run: fewer say little about a p99
_PRECISION = 1.05  # of the largest rate, as a ratio
Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Run:
    """offered: requests a second. latencies: seconds of each request, inf where it was refused or failed.

    seconds: from the first arrival to the last answer.
    """

    offered: float
    latencies: np.ndarray
    refused: int
    failed: int
    seconds: float

    def percentile(self, percent: float) -> float:
        """Seconds; inf where too many were refused or failed."""
        return float(np.quantile(self.latencies, percent / 100, method="higher"))

    def goodput(self, deadline: float) -> float:
        """Requests answered within `deadline` seconds, a second."""
        return float((self.latencies <= deadline).sum() / self.seconds)

    def describe(self, deadline: float) -> str:
        """One line. deadline: seconds."""
        p50, p99 = (1e3 * self.percentile(percent) for percent in (50, 99))
        late = int((self.latencies > deadline).sum()) - self.refused - self.failed
        return (
            f"{self.offered:,.0f} requests/s: p50 {p50:.1f} ms, p99 {p99:.1f} ms, "
            f"in time {self.goodput(deadline):,.0f}/s, refused {self.refused:,}, late {late:,}, failed {self.failed:,}"
        )


class Target(Protocol):
    """An engine or a server under load."""

    def run(self, arrivals: np.ndarray) -> Run:
        """Sends a request at each of `arrivals`, seconds from now, ascending, and waits for all answers."""
        ...


def poisson(qps: float, seconds: float, random: np.random.Generator) -> np.ndarray:
    """Arrivals, in seconds from 0: as many as are expected, and enough for a p99."""
    return np.cumsum(random.exponential(1 / qps, max(_FEWEST, round(qps * seconds))))


def largest_rate(
    target: Target, p99: float, seconds: float, *, start: float = 100.0, show: Callable[[Run], None] | None = None
) -> Run:
    """The run with the largest rate whose p99 is within `p99` seconds, by doubling and then halving the interval.

    seconds: of each run. start: requests a second of the first. A run that is not within the bound is repeated once:
    the machine may have stood still for a moment. Raises ServingError where a request alone takes longer.
    """
    random = np.random.default_rng(0)
    best, low, high, rate = None, 0.0, math.inf, start
    while not low or high / low > _PRECISION:
        for _ in range(2):
            run = target.run(poisson(rate, seconds, random))
            if show is not None:
                show(run)
            if run.failed:
                raise ServingError(f"{run.failed} of {len(run.latencies)} requests failed; the log says why")
            if run.percentile(99) <= p99:
                break
        if run.percentile(99) <= p99:
            best, low = run, rate
        else:
            high = rate
        if not low and rate < start / 64:
            raise ServingError(f"p99 is {1e3 * run.percentile(99):.1f} ms at {rate:.2g} requests a second already")
        rate = 2 * low if high == math.inf else math.sqrt(low * high) if low else high / 4
    assert best is not None
    return best


def overload(target: Target, rate: float, seconds: float, times: float = 3.0) -> Run:
    """A run at `times` the rate that the target can take."""
    return target.run(poisson(times * rate, seconds, np.random.default_rng(1)))


def offline(engine: Engine, verb: str, requests: Sequence[Columns], count: int) -> tuple[float, float]:
    """Requests a second where `count` of them are there at once, so that every batch is full; and the processor
    seconds of a request, which depend less on what else the machine does. As many are asked before, to begin with.
    """
    _all_at_once(engine, verb, requests, count)
    started, used = time.perf_counter(), time.process_time()
    _all_at_once(engine, verb, requests, count)
    return count / (time.perf_counter() - started), (time.process_time() - used) / count


def _all_at_once(engine: Engine, verb: str, requests: Sequence[Columns], count: int) -> None:
    futures = [engine.submit(verb, requests[number % len(requests)]) for number in range(count)]
    for future in futures:
        future.result()


def read_requests(file: Path, inputs: Sequence[TensorSpec], rows: int) -> list[Columns]:
    """Requests from a Parquet file that has the columns of a verb, in the user's own values.

    A request is one row where a column of one dim has lists, such as a history, and else `rows` rows. Inputs that the
    file has no column of are left out, as some may be; the engine knows which. Raises DataError for a file that cannot
    be read, has no column of the model's or has nulls, which a request cannot say.
    """
    try:
        table = pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file}: cannot be read as Parquet: {error}") from None
    if not (named := [spec for spec in inputs if spec.name in table.column_names]):
        raise DataError(f"{file}: has no column that the model reads: {', '.join(spec.name for spec in inputs)}")
    names = [spec.name for spec in named]
    table = table.select(names).combine_chunks()
    if nulls := [name for name in names if table.column(name).null_count]:
        raise DataError(f"{file}: column {nulls[0]} has nulls, which a request cannot say; name a file without")
    one = any(_is_list(table.column(spec.name).type) and len(spec.shape) == 1 for spec in named)
    size = 1 if one else rows
    if table.num_rows < size:
        raise DataError(f"{file}: has {table.num_rows} rows, and a request is {size}")
    starts = range(0, table.num_rows - size + 1, size)
    return [{spec.name: _array(table.column(spec.name).slice(start, size), spec) for spec in named} for start in starts]


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _array(column: pa.ChunkedArray, spec: TensorSpec) -> np.ndarray:
    """A column as a request has it; lists are rows of a tensor with several dims, or all of one with one."""
    values = column.combine_chunks()
    if _is_list(values.type):
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False).astype(DTYPES[spec.datatype]).reshape(-1, *spec.shape[1:])
