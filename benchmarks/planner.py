"""gr's planner beside TorchRec's: the same tables on the same machine in the same run, each planner in its own process.

    python -m benchmarks.planner                                  # every case, TorchRec's search bounded at 300 s
    python -m benchmarks.planner --timeout 0                      # ours alone, in a minute
    python -m benchmarks.planner --case 26x8 --case 100x16 --timeout 60
    python -m benchmarks.planner --verify                         # our reading of TorchRec's costs against its own
    python -m benchmarks.planner --write docs/benchmarks/DATE-planner.md

The exit code is 1 when a gate fails: a plan of ours that costs more than TorchRec's under TorchRec's estimator, or a
budget of CPU seconds, memory or gap that is not kept.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.planner_cases import CASES, GIB, Limits, inventory
from gr.config.inventory import SHARDING_TYPES, InventoryConfig

# TorchRec's enumeration of ways to shard, which its own timeout does not bound.
ENUMERATION_CPU_SECONDS = 300
NOT_RUN = "not run"
Record = dict[str, Any]


def main() -> int:
    arguments = _arguments()
    if arguments.worker:
        _quiet_torchrec()
        record = WORKERS[arguments.worker](arguments)
        print(json.dumps(record | {"peak_bytes": _peak_bytes()}))
        return 0
    if arguments.verify:
        differing = _run("verify", "26x8", arguments.timeout).get("differences", ["the worker failed"])
        print("\n".join(differing) or "26x8: options equal TorchRec's enumeration, each to 1e-9")
        return int(bool(differing))
    from benchmarks.compare import print_machine

    machine = io.StringIO()
    with contextlib.redirect_stdout(machine):
        print_machine()
    print(machine.getvalue())
    names = arguments.case or list(CASES)
    timeout = arguments.timeout
    torchrec = {name: _progress("torchrec", name, timeout) if timeout else {"failure": NOT_RUN} for name in names}
    reports = [_same_costs(names, torchrec, timeout), _own_costs(names, torchrec, timeout)]
    reports = [report for report in reports if report.rows]
    for report in reports:
        report.show()
    if arguments.write:
        where = machine.getvalue().replace(f", {' '.join(sys.argv)}", "")  # the command is given without local paths
        arguments.write.write_text(_markdown(reports, where, arguments))
    return int(any("FAIL" in cell for report in reports for row in report.rows for cell in row))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner")
    parser.add_argument("--case", action="append", choices=CASES, help="Again for more; all without it.")
    parser.add_argument(
        "--timeout", type=int, default=300, help="Of TorchRec's search, in wall seconds (300); 0: no TorchRec."
    )
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--write", type=Path, metavar="FILE.md")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--tables", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.timeout < 0:
        parser.error(f"--timeout {arguments.timeout} is below 0")
    return arguments


# --- one process a planner and case ----------------------------------------------------------------------------------


def _torchrec(arguments: argparse.Namespace) -> Record:
    """TorchRec's planner as it comes, fused kernels only, killed where it takes too many CPU seconds."""
    from benchmarks import torchrec_costs as costs

    messages = _Messages()
    planners = logging.getLogger("torchrec.distributed.planner.planners")
    planners.setLevel(logging.INFO)
    planners.addFilter(messages)
    name = arguments.case[0]
    given = costs.problem(inventory(name), CASES[name].ranks)
    limit = ENUMERATION_CPU_SECONDS + arguments.timeout
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 10))
    started, wall = time.process_time(), time.monotonic()
    try:
        plan, proposals = costs.torchrec_plan(given, arguments.timeout)
    except costs.PlannerError as error:
        return {"failure": str(error).strip().splitlines()[0], "cpu_seconds": time.process_time() - started}
    used = {"cpu_seconds": time.process_time() - started, "wall_seconds": time.monotonic() - wall}
    timed_out = any(line.startswith("Exceeded time limit") for line in messages.lines)
    return used | {"proposals": proposals, "timed_out": timed_out} | _scored(costs.score(given, plan))


def _on_torchrec_costs(arguments: argparse.Namespace) -> Record:
    """Our solver on TorchRec's costs; TorchRec's estimators then score the plan, shard by shard."""
    from benchmarks import torchrec_costs as costs
    from gr.planner.solve import solve

    name = arguments.case[0]
    given = costs.problem(inventory(name), CASES[name].ranks)
    started = time.process_time()
    options, capacity = costs.options(given), given.capacity()
    counted = time.process_time()
    solution = solve(options, capacity)
    ended = time.process_time()
    sharding_types = [SHARDING_TYPES[options.sharding_type_O[option]] for option in solution.option_T]
    score = costs.score(given, costs.placed(given, sharding_types, solution.ranks_T))
    believed_R = np.zeros(capacity.ranks)
    for option, ranks in zip(solution.option_T, solution.ranks_T, strict=True):
        np.add.at(believed_R, ranks, options.seconds_O[option])
    if not np.isclose(believed_R.max(), score.seconds, rtol=1e-9):
        raise ValueError(f"{name}: our options cost {believed_R.max()} s, TorchRec scores the plan {score.seconds} s")
    used = {"costs_cpu_seconds": counted - started, "solve_cpu_seconds": ended - counted}
    return used | {"bound_seconds": solution.bound_seconds} | _scored(score)


def _own(arguments: argparse.Namespace) -> Record:
    """From a Parquet list of tables to a plan on H100s and its estimate, under gr's own costs."""
    from gr.planner.estimate import MEMORY, estimate
    from gr.planner.inventory import load_inventory
    from gr.planner.plan import search
    from gr.planner.topology import parse_topology

    case = CASES[arguments.case[0]]
    model = load_inventory(arguments.tables, [f"rank_batch_size={case.rank_batch_size}"])
    topology = parse_topology(f"h100x{case.ranks}")
    started = time.process_time()
    plan = search(model, topology)
    ended = time.process_time()
    estimated = estimate(plan)
    kinds = [MEMORY.index("tables"), MEMORY.index("table_optimizer")]
    tables_R = estimated.memory_MR[kinds].sum(axis=0)
    return {
        "planning_cpu_seconds": ended - started,
        "seconds": estimated.cost,
        "bound_seconds": plan.bound_seconds,
        "gap": estimated.gap,
        "tables_max": float(tables_R.max()),
        "tables_mean": float(tables_R.mean()),
        "hbm_max": float(estimated.total_memory_R.max()),
        "process_cpu_seconds": time.process_time(),
    }


def _verify(arguments: argparse.Namespace) -> Record:
    from benchmarks import torchrec_costs as costs

    name = arguments.case[0]
    return {"differences": list(costs.differences(costs.problem(inventory(name), CASES[name].ranks)))}


WORKERS: dict[str, Callable[[argparse.Namespace], Record]] = {
    "torchrec": _torchrec,
    "same": _on_torchrec_costs,
    "own": _own,
    "verify": _verify,
}


class _Messages(logging.Filter):
    """Keeps the messages of a logger and lets none of them pass."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        self.lines.append(record.getMessage())
        return False


def _scored(score: Any) -> Record:
    return {"seconds": score.seconds, "hbm_max": float(score.hbm_R.max()), "hbm_mean": float(score.hbm_R.mean())}


def _quiet_torchrec() -> None:
    logging.getLogger("torchrec").setLevel(logging.ERROR)


def _run(worker: str, name: str, timeout: int, *others: str) -> Record:
    """The report of a worker, or its failure with the CPU seconds and memory it took until then."""
    options = ["--worker", worker, "--case", name, "--timeout", str(timeout), *others]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen([sys.executable, "-m", "benchmarks.planner", *options], stdout=output, stderr=errors)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if child.returncode == 0:
            return json.loads(output.read().splitlines()[-1])
        cpu_seconds = usage.ru_utime + usage.ru_stime
        last = (errors.read().strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        failure = f"killed at {cpu_seconds:.0f} CPU s" if child.returncode < 0 else last
        return {"failure": failure, "cpu_seconds": cpu_seconds, "peak_bytes": usage.ru_maxrss * 1024}


def _progress(worker: str, name: str, timeout: int, *others: str) -> Record:
    print(f"{name}: {worker}", file=sys.stderr, flush=True)
    return _run(worker, name, timeout, *others)


def _peak_bytes() -> int:
    """The peak of this program alone: getrusage would count the process that started it too."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))


# --- tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    title: str
    caption: str
    columns: tuple[str, ...]
    rows: list[list[str]]

    def show(self) -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=self.title, caption=self.caption, title_justify="left", caption_justify="left")
        for column in self.columns:
            table.add_column(column, justify="left" if column == "case" else "right")
        for row in self.rows:
            table.add_row(*row)
        Console(width=210).print(table)

    def markdown(self) -> str:
        lines = [self.columns, ["---"] + ["---:"] * (len(self.columns) - 1), *self.rows]
        return f"## {self.title}\n\n{self.caption}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _same_costs(names: list[str], torchrec: dict[str, Record], timeout: int) -> Report:
    rows = [
        _same_costs_row(name, torchrec[name], _progress("same", name, timeout))
        for name in names
        if CASES[name].torchrec_costs
    ]
    return Report(
        "Both under TorchRec's estimator",
        "Cost: of the slowest rank, by TorchRec's estimators and TorchRec's rating. Bound: what no plan can cost less "
        "than, by gr's solver. Gap: cost over bound, less 1. HBM: largest rank / mean rank. CPU s: of planning alone; "
        "gr's are TorchRec's estimates and the solver. TorchRec has its default proposers and fused kernels; "
        f"its search has {timeout} s, * where that ended it.",
        (
            *("case", "TorchRec ms", "gr ms", "TorchRec / gr", "bound ms", "TorchRec gap", "gr gap"),
            *("TorchRec HBM GiB", "gr HBM GiB", "TorchRec CPU s (wall)", "gr CPU s", "of it solver", "CPU ratio"),
            *("TorchRec peak GiB", "gr peak GiB", "proposals", "never worse"),
        ),
        rows,
    )


def _same_costs_row(name: str, theirs: Record, ours: Record) -> list[str]:
    if "failure" in ours:
        return [name, *["-"] * 15, f"FAIL: {ours['failure']}"]
    cpu = ours["costs_cpu_seconds"] + ours["solve_cpu_seconds"]
    bound, mine = ours["bound_seconds"], ours["seconds"]
    if "failure" in theirs:
        cost, ratio, gap, hbm, proposals, gate = "-", "-", "-", "-", theirs["failure"], "-"
        used, cpu_ratio = "-" if "cpu_seconds" not in theirs else f"{theirs['cpu_seconds']:.0f}", "-"
    else:
        cost, ratio = f"{theirs['seconds'] * 1e3:.3f}", f"{theirs['seconds'] / mine:.3f}"
        gap, hbm, used = (
            f"{theirs['seconds'] / bound - 1:.1%}",
            _hbm(theirs),
            f"{theirs['cpu_seconds']:.1f} ({theirs['wall_seconds']:.0f})",
        )
        proposals = f"{theirs['proposals']}{'*' if theirs['timed_out'] else ''}"
        cpu_ratio = f"{theirs['cpu_seconds'] / cpu:.1f}"
        # Sums in another order differ in the last digits.
        gate = "PASS" if mine <= theirs["seconds"] * (1 + 1e-12) else "FAIL"
    return [
        *(name, cost, f"{mine * 1e3:.3f}", ratio, f"{bound * 1e3:.3f}", gap, f"{mine / bound - 1:.2%}"),
        *(hbm, _hbm(ours), used, f"{cpu:.2f}", f"{ours['solve_cpu_seconds']:.2f}", cpu_ratio),
        *(_gib(theirs["peak_bytes"]) if "peak_bytes" in theirs else "-", _gib(ours["peak_bytes"]), proposals, gate),
    ]


def _own_costs(names: list[str], torchrec: dict[str, Record], timeout: int) -> Report:
    rows = []
    for name in names:
        limits = CASES[name].limits
        if limits is None:
            continue
        model = inventory(name)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tables.parquet"
            _write_tables(model, path)
            ours = _progress("own", name, timeout, "--tables", str(path))
        parameters = sum(table.rows * table.dim for table in model.tables)
        rows.append([name, f"{parameters / 1e12:.3f}", *_own_costs_row(limits, ours), _finished(torchrec[name])])
    return Report(
        "gr's planner under its own costs, from a Parquet list of tables to a plan and its estimate",
        "Process CPU s: imports, reading, planning and estimate; planning CPU s: the search alone. Cost: the slowest "
        "rank's share of a step that belongs to tables, h100 topology. Table bytes: weights and optimizer states. "
        "Limits in brackets.",
        (
            *("case", "parameters, 1e12", "process CPU s", "planning CPU s", "peak GiB", "cost ms", "bound ms", "gap"),
            *("table GiB max/mean", "balance", "HBM max GiB", "gates", "TorchRec on these tables"),
        ),
        rows,
    )


def _own_costs_row(limits: Limits, ours: Record) -> list[str]:
    if "failure" in ours:
        return [*["-"] * 9, f"FAIL: {ours['failure']}"]
    measured = (
        (ours["process_cpu_seconds"], limits.process_cpu_seconds, ".2f"),
        (ours["planning_cpu_seconds"], limits.planning_cpu_seconds, ".2f"),
        (ours["peak_bytes"] / GIB, limits.peak_bytes / GIB, ".2f"),
        (ours["gap"], limits.gap, ".2%"),
    )
    cells = [f"{value:{form}}" + (f" [{limit:{form}}]" if limit else "") for value, limit, form in measured]
    kept = all(limit is None or value <= limit for value, limit, _ in measured)
    return [
        *cells[:3],
        *(f"{ours['seconds'] * 1e3:.3f}", f"{ours['bound_seconds'] * 1e3:.3f}", cells[3]),
        f"{_gib(ours['tables_max'])} / {_gib(ours['tables_mean'])}",
        f"{ours['tables_max'] / ours['tables_mean']:.2f}",
        *(_gib(ours["hbm_max"]), "PASS" if kept else "FAIL"),
    ]


def _write_tables(model: InventoryConfig, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = ("name", "rows", "dim", "dtype", "ids_per_example", "skew")
    pq.write_table(pa.table({name: [getattr(table, name) for table in model.tables] for name in columns}), path)


def _finished(theirs: Record) -> str:
    if "failure" in theirs:
        return theirs["failure"] if theirs["failure"] == NOT_RUN else f"no plan: {theirs['failure']}"
    return f"{theirs['cpu_seconds']:.1f} CPU s, {theirs['seconds'] * 1e3:.1f} ms by its own costs"


def _hbm(record: Record) -> str:
    return f"{record['hbm_max'] / GIB:.1f} / {record['hbm_mean'] / GIB:.1f}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _markdown(reports: list[Report], machine: str, arguments: argparse.Namespace) -> str:
    from importlib.metadata import version

    versions = ", ".join(f"{package} {version(package)}" for package in ("torchrec", "numpy", "scipy"))
    tables = "\n".join(report.markdown() for report in reports)
    command = "python -m benchmarks.planner" + "".join(f" --case {name}" for name in arguments.case or ())
    return (
        f"# {arguments.write.stem}\n\n    {command} --timeout {arguments.timeout}\n\n"
        f"    {machine.strip().replace(chr(10), chr(10) + '    ')}\n    {versions}\n\n{tables}"
    )


if __name__ == "__main__":
    sys.exit(main())
