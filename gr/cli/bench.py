"""`gr bench`: how many requests a second a package answers in time, in process and over HTTP."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gr.cli.lazy import FiniteRange
from gr.cli.out import dump, say
from gr.cli.serve import require_serve
from gr.config.serving import EngineConfig, ServeConfig
from gr.errors import ConfigError

if TYPE_CHECKING:
    from gr.serving.load.load_test import Run, Target
    from gr.serving.servable import ServedVersion

_PATIENCE_MS = 1e7  # of the scenario offline, where every request waits for the others


@dataclass(frozen=True)
class Bench:
    """One measurement. p99_ms: the bound, and the deadline of requests. seconds: of each run."""

    package: Path
    file: Path
    rows: int
    scenario: str
    p99_ms: float
    seconds: float
    http: bool

    @property
    def loadgen(self) -> bool:
        """Whether requests arrive as MLPerf's LoadGen says."""
        from gr.serving.load.loadgen import installed

        return installed() and self.scenario == "server" and not self.http


@click.command(
    help="Find the most requests a second that PACKAGE answers with a p99 within --p99-ms, and what it answers in time "
    "of three times as many (server); or what it answers of all at once (offline). Requests arrive as a Poisson "
    "process, in process that of MLPerf's LoadGen where the extra loadgen is installed. They come from --input, whose "
    "columns are the model's inputs, in your own values."
)
@click.argument("package", type=click.Path(path_type=Path))
@click.option("--input", "file", required=True, type=click.Path(path_type=Path), help="Parquet file of rows.")
@click.option("--rows", default=32, show_default=True, type=click.IntRange(1), help="Rows of a request.")
@click.option("--scenario", default="server", show_default=True, type=click.Choice(["server", "offline"]))
@click.option("--p99-ms", default=60.0, show_default=True, type=FiniteRange(0, min_open=True))
@click.option("--seconds", default=3.0, show_default=True, type=FiniteRange(0, min_open=True), help="Of a run.")
@click.option("--http", is_flag=True, help="Ask a server in a process of its own, not the engine in this one.")
@click.option(
    "--against",
    type=click.Choice(["one-by-one", "eager"]),
    help="Measure this too: each request alone, by the package or by the model of --checkpoint in torchrec.",
)
@click.option("--checkpoint", help="The checkpoint of the package, for --against eager.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(against: str | None, checkpoint: str | None, as_json: bool, **options: Any) -> None:
    bench = Bench(**options)
    if (against == "eager") != (checkpoint is not None):
        raise ConfigError("--against eager and --checkpoint go together")
    if bench.http:
        require_serve("gr bench --http")
        if bench.scenario == "offline":
            raise ConfigError("--http measures the scenario server; leave --scenario out")
    results = {"package": _measure(bench, None, as_json)}
    if not as_json:
        say("arrivals: MLPerf LoadGen" if bench.loadgen else "arrivals: gr's own generator")
    if against is not None:
        results[against] = _measure(bench, against, as_json, checkpoint)
        if not as_json:
            own, other = results.values()
            if bench.scenario == "offline":  # rates depend on what else the machine does
                ratio = other["processor_us_per_request"] / own["processor_us_per_request"]
            else:
                ratio = own["requests_per_second"] / other["requests_per_second"]
            say(f"package over {against}: {ratio:.1f}x")
    if as_json:
        dump(json.dumps(results))


def _measure(bench: Bench, against: str | None, quiet: bool, checkpoint: str | None = None) -> dict[str, float]:
    """Figures of the package, or of what it is compared with."""
    from gr.serving.engine import Engine, settle_process
    from gr.serving.load.load_test import offline, read_requests
    from gr.serving.load.loadgen import LoadGenTarget
    from gr.serving.load.server_process import MODEL, server
    from gr.serving.load.targets import EngineTarget, HttpTarget
    from gr.serving.package.version import Version

    open_version: Callable[[], ServedVersion] = partial(Version.open, bench.package)
    if checkpoint is not None:
        from gr.serving.load.eager import EagerClick  # imports torchrec

        open_version = partial(EagerClick.of, checkpoint, bench.package)
    version = open_version()
    verb, servable = next(iter(version.verbs.items()))
    requests = read_requests(bench.file, servable.inputs, bench.rows)
    servable.encode(requests[0])  # raises ServingError where the file lacks what the model needs
    batch_rows = EngineConfig().batch_rows if against is None else 1
    name = against or "package"
    # What is compared with has no admission, whose refusals would count: its p99 alone says what it can take.
    deadline_ms = bench.p99_ms if bench.scenario == "server" and against is None else _PATIENCE_MS
    if bench.http:
        version.close()
        with server(open_version, ServeConfig(port=0, batch_rows=batch_rows, deadline_ms=deadline_ms)) as address:
            return _within(bench, name, HttpTarget(address, MODEL, requests, servable.inputs), quiet)
    settle_process()  # as the server does
    most = EngineConfig().queue_rows if bench.scenario == "server" else len(requests) * bench.rows
    with Engine(version, EngineConfig(batch_rows=batch_rows, deadline_ms=deadline_ms, queue_rows=most)) as engine:
        if bench.scenario == "server":
            target = (LoadGenTarget if bench.loadgen else EngineTarget)(engine, verb, requests)
            return _within(bench, name, target, quiet)
        rate, used = offline(engine, verb, requests, len(requests))
    if not quiet:
        say(f"{name}: {rate:,.0f} requests/s, all at once, {1e6 * used:,.0f} us of processor time each")
    return {"requests_per_second": rate, "processor_us_per_request": 1e6 * used}


def _within(bench: Bench, name: str, target: "Target", quiet: bool) -> dict[str, float]:
    """The largest rate within the bound, and three times that rate."""
    from gr.serving.load.load_test import largest_rate, overload

    bound = bench.p99_ms / 1e3
    show: Callable[[Run], None] | None = None if quiet else lambda run: say(f"  {run.describe(bound)}")
    best = largest_rate(target, bound, bench.seconds, show=show)
    if name != "package":
        if not quiet:
            say(f"{name}: {best.describe(bound)}")
        return {"requests_per_second": best.offered, "p99_ms": 1e3 * best.percentile(99)}
    over = overload(target, best.offered, bench.seconds)
    if not quiet:
        say(f"{name}: {best.describe(bound)}", f"{name}, 3 times that: {over.describe(bound)}")
    return {
        "requests_per_second": best.offered,
        "p50_ms": 1e3 * best.percentile(50),
        "p99_ms": 1e3 * best.percentile(99),
        "goodput_per_second": best.goodput(bound),
        "goodput_per_second_at_3_times": over.goodput(bound),
    }
