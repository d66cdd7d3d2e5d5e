"""Measures gr and its alternatives in turns, in one run, and reports it.

    python -m benchmarks.run hstu_attention|layer|llama|loss|mixture|step_scaling|towers|train_step|all
        [--device cpu|cuda] [--data DIR] [--peer DIR] [--case NAME] [--rounds N]

--data: what `gr prepare movielens-1m` wrote, for step_scaling, towers and train_step. --peer: a checkout of
meta-recsys/generative-recommenders, measured beside the rest. A benchmark whose correctness tests fail is not
measured. On CPU everything is one thread and CPU time, so that ratios hold on a busy machine. Writes a dated report, a
picture and rows of results.csv to --out.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

from benchmarks import attention, layer, llama, loss, mixture, step_scaling, towers, train_step
from benchmarks.case import Case, Options
from benchmarks.compare import Timing, Variant, compare
from benchmarks.machine import Peaks, describe, peak_kib, peaks, reset_peak
from benchmarks.results import Row, append_csv, table

BENCHMARKS: dict[str, ModuleType] = {
    "hstu_attention": attention,
    "layer": layer,
    "llama": llama,
    "loss": loss,
    "mixture": mixture,
    "step_scaling": step_scaling,
    "towers": towers,
    "train_step": train_step,
}


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1) if arguments.device == "cpu" else None
    options = Options(arguments.device, arguments.data, arguments.peer)
    for name in BENCHMARKS if arguments.benchmark == "all" else [arguments.benchmark]:
        _run(name, options, arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", choices=[*BENCHMARKS, "all"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--case", default="", help="only cases with this in their name")
    parser.add_argument("--rounds", type=int, help="turns of a case, instead of its own number")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no GPU here")
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds} is below 1")
    return arguments


def _run(name: str, options: Options, arguments: argparse.Namespace) -> None:
    module = BENCHMARKS[name]
    cases = [case for case in module.cases(options) if arguments.case in case.name]
    if not cases:
        raise SystemExit(
            f"{name} has no case with {arguments.case!r}; there are {[each.name for each in module.cases(options)]}"
        )
    _progress(name, "its correctness tests")
    _require_green(name, module.TESTS)
    machine, found = describe(options.device), peaks(options.device)
    print(f"{machine}\n{_peak_line(found)}", flush=True)
    rows: list[Row] = []
    for number, case in enumerate(cases, start=1):
        timings = compare(
            case.variants,
            rounds=arguments.rounds or case.rounds,
            warmups=case.warmups,
            device=options.device,
            progress=partial(_progress, f"{name}, case {number} of {len(cases)}, {case.name}"),
        )
        memory = {name: _peak_of(run, options.device) for name, run in case.variants.items() if case.memory}
        rows += _rows(name, case, timings, memory, found)
        print(f"\n{table(rows[-len(timings) :])}", flush=True)
    lines = list(module.notes(options)) if hasattr(module, "notes") else []
    _write(name, options, (machine, found), cases, rows, lines, arguments.out)


def _progress(case: str, line: str) -> None:
    print(f"{case}: {line}", file=sys.stderr, flush=True)


def _require_green(name: str, tests: Sequence[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout[-3000:]}\n{name} is not measured: its tests fail")


def _rows(name: str, case: Case, timings: dict[str, Timing], memory: dict[str, float], found: Peaks) -> Iterator[Row]:
    base = timings[case.baseline].median
    for variant, timing in timings.items():
        rate = case.work / timing.median
        yield Row(
            benchmark=name,
            case=case.name,
            variant=variant,
            seconds=timing,
            ratio=base / timing.median,
            rate=rate,
            fraction=rate / found.of(variant),
            mebibytes=memory.get(variant),
        )


def _peak_of(run: Variant, device: str) -> float:
    """MiB that a call adds, over its inputs, to what the process holds."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    reset_peak()
    before = peak_kib()
    run()
    return (peak_kib() - before) / 1024


def _peak_line(found: Peaks) -> str:
    return (
        f"Measured peaks: {found.float32 / 1e9:,.0f} GFLOP/s in float32, {found.bfloat16 / 1e9:,.0f} in bfloat16 "
        f"(square products), {found.copy / 1e9:.1f} GB/s copying."
    )


def _flags(options: Options) -> str:
    """Without the folders, which are of no use elsewhere."""
    device = f" --device {options.device}" if options.device != "cpu" else ""
    return device + " --data DIR" * (options.data is not None) + " --peer DIR" * (options.peer is not None)


def _write(
    name: str,
    options: Options,
    on: tuple[str, Peaks],
    cases: list[Case],
    rows: list[Row],
    lines: list[str],
    out: Path,
) -> None:
    machine, found = on
    today = f"{date.today()}"
    stem = f"{today}-{name.replace('_', '-')}"
    text = [
        f"# {today}, {name}",
        f"    python -m benchmarks.run {name}{_flags(options)}",
        BENCHMARKS[name].__doc__ or "",
    ]
    text += [f"{machine}. {_peak_line(found)} Medians of turns, quartiles in brackets.", *lines]
    for case in cases:
        text += [f"## {case.name}", table([row for row in rows if row.case == case.name])]
    out.mkdir(parents=True, exist_ok=True)
    if any(case.series for case in cases):
        BENCHMARKS[name].draw(cases, rows, found, out / f"{stem}.png")
        text.append(f"![{name}]({stem}.png)")
    (out / f"{stem}.md").write_text("\n\n".join(part.strip("\n") for part in text) + "\n")
    append_csv(out / "results.csv", today, machine, rows)
    print(f"\nwrote {out / stem}.md and rows of {out / 'results.csv'}")


if __name__ == "__main__":
    main()
