"""Damaged and hostile input through the real entry points, and what becomes of each.

    python -m benchmarks.fuzz --inputs 2000 --seed 0                  # over all targets; one table
    python -m benchmarks.fuzz --only movielens --seed 0 --input 17    # one input again, with what was shown

A target is a function in TARGETS, which `@target` puts there: from a generator of random numbers and an empty folder it
makes one damaged input, and a Trial of it. Modules with targets are named in MODULES. Input n of a target depends on
the seed, the name of the target and n alone.

Good outcomes: equal (exit 0, and the trial finds no difference from what the input says) and an error (exit code 2, one
line, or further ones that are indented). Bad ones: a traceback (also a killed process), a hang of more than LIMIT CPU
seconds, other data (exit 0 with another result), and an unclear error (exit code 1, several lines, control characters).
"""

import argparse
import importlib
import io
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from gr.errors import GRError, TransientError

MODULES = tuple(f"benchmarks.fuzz_{name}" for name in ("raw", "folders", "events", "runs", "answers"))
LIMIT, WAITING = 5.0, 60.0  # seconds of CPU, and of the clock, which also count what others do on this machine
MEMORY = 8 << 30  # bytes of a process beyond what its start took
EQUAL, ERROR, TRACEBACK, HANG, OTHER_DATA, UNCLEAR = KINDS = (
    "equal",
    "error, exit 2",
    "TRACEBACK",
    "HANG",
    "OTHER DATA",
    "UNCLEAR ERROR",
)
GOOD = (EQUAL, ERROR)
# Not "fork": the child of a process with threads waits forever for what they held, OpenMP's above all.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([*MODULES, "gr.experiment", "gr.models.saved"])


@dataclass(frozen=True)
class Trial:
    """run: the entry point on the input; returns an exit code, or raises GRError. difference: after exit 0, what is
    wrong with the result, None if nothing is. mutation: what was done to the input.
    """

    mutation: str
    run: Callable[[], int | None]
    difference: Callable[[], str | None]


@dataclass(frozen=True)
class Outcome:
    kind: str
    mutation: str
    detail: str = ""


Target = Callable[[np.random.Generator, Path], Trial]
TARGETS: dict[str, Target] = {}


def target(name: str) -> Callable[[Target], Target]:
    """Adds a target. Its folder is empty and its own; what all inputs share it may keep at folder.parent / "whole"."""

    def add(function: Target) -> Target:
        TARGETS[name] = function
        return function

    return add


def load_targets(modules: Sequence[str] = MODULES) -> None:
    for module in modules:
        importlib.import_module(module)


class TooLong(BaseException):
    pass


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooLong

    limits = ((signal.ITIMER_PROF, signal.SIGPROF, LIMIT), (signal.ITIMER_REAL, signal.SIGALRM, WAITING))
    for timer, number, seconds in limits:
        signal.signal(number, stop)
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer, _, _ in limits:
            signal.setitimer(timer, 0)


def attempt(name: str, seed: int, number: int, place: Path) -> Outcome:
    """Input `number` of a target, in a new folder below place, which is removed."""
    folder = place / str(number)
    folder.mkdir()
    shown = io.StringIO()
    try:
        with redirect_stdout(shown), redirect_stderr(shown):
            trial = TARGETS[name](np.random.default_rng([seed, zlib.crc32(name.encode()), number]), folder)
            shown.truncate(0)
            kind, detail = _judged(trial, shown)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Outcome(kind, trial.mutation, detail)


def _judged(trial: Trial, shown: io.StringIO) -> tuple[str, str]:
    began = time.process_time()
    try:
        with time_limit():
            code = trial.run() or 0
    except TooLong:
        return HANG, f"stopped after {time.process_time() - began:.1f} CPU-s"
    except GRError as error:
        code = 1 if isinstance(error, TransientError) else 2
        shown.write(f"error: {error}\n")
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "/gr/" in frame.filename][-1:]
        where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in [last, *ours])
        return TRACEBACK, f"{type(error).__name__}: {str(error)[:200]!r} at {where}"
    if code == 0:
        difference = trial.difference()
        return (EQUAL, "") if difference is None else (OTHER_DATA, difference)
    text = shown.getvalue()
    message = text[text.rfind("error: ") :].rstrip("\n") if "error: " in text else ""
    first, *more = message.split("\n")
    clear = message and first.isprintable() and all(line.startswith("  ") for line in more) and len(message) < 2000
    return (ERROR, message) if code == 2 and clear else (UNCLEAR, f"exit code {code}: {text[-300:]!r}")


def outcomes(
    name: str, seed: int, numbers: Sequence[int], place: Path, modules: Sequence[str] = MODULES
) -> Iterator[Outcome]:
    """The outcomes of inputs in order, from a process that is replaced when it dies or does not answer.

    modules: those that have the target.
    """
    place.mkdir(exist_ok=True)
    waiting = list(numbers)
    while waiting:
        receiver, sender = PROCESSES.Pipe(duplex=False)
        child = PROCESSES.Process(target=_serve, args=(sender, modules, name, seed, list(waiting), place))
        child.start()
        sender.close()
        while waiting:
            if not receiver.poll(120):
                yield Outcome(HANG, "unknown", "no answer in 120 s")
                waiting.pop(0)
                break
            try:
                outcome = receiver.recv()
            except EOFError:
                child.join()
                yield Outcome(TRACEBACK, "unknown", f"the process died with exit code {child.exitcode}")
                waiting.pop(0)
                break
            if isinstance(outcome, Exception):
                raise SystemExit(f"{name} {waiting[0]}: the target makes no input: {outcome!r}")
            yield outcome
            waiting.pop(0)
        child.join(0 if waiting else 10)  # after its last input it ends by itself, unless it hangs
        child.kill()
        child.join()


def _serve(
    sender: Connection, modules: Sequence[str], name: str, seed: int, numbers: Sequence[int], place: Path
) -> None:
    load_targets(modules)
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, resource.RLIM_INFINITY))
    for number in numbers:
        shutil.rmtree(place / str(number), ignore_errors=True)  # of a process that died
        try:
            sender.send(attempt(name, seed, number, place))
        except Exception as error:  # of the target itself
            sender.send(error)
            raise


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2000, help="Inputs of all targets together.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="Only these targets.")
    parser.add_argument("--input", type=int, help="Only this input, with what became of it.")
    options = parser.parse_args()
    load_targets()
    os.environ.setdefault("PYTHONWARNINGS", "ignore::RuntimeWarning:runpy")  # each process imports this module again
    names = options.only or list(TARGETS)
    each = -(-options.inputs // len(names))
    numbers = range(each) if options.input is None else [options.input]
    print(f"seed {options.seed}, {len(numbers)} inputs of each of {len(names)} targets\n")
    print("| target | inputs | " + " | ".join(KINDS) + " | seconds |\n" + "|---" * (len(KINDS) + 3) + "|", flush=True)
    bad, total = [], Counter[str]()
    with tempfile.TemporaryDirectory(prefix="gr-fuzz-") as root:
        for name in names:
            began, kinds = time.monotonic(), Counter[str]()
            for number, outcome in zip(numbers, outcomes(name, options.seed, numbers, Path(root) / name), strict=True):
                kinds[outcome.kind] += 1
                if outcome.kind not in GOOD or options.input is not None:
                    bad.append(f"{name} {number}: {outcome.kind}: {outcome.mutation}: {outcome.detail}")
            total += kinds
            seconds = time.monotonic() - began
            print(_row(name, kinds) + f" {seconds:.0f} |", flush=True)
    print(_row("all", total) + " |")
    print("\n".join(["", *bad]))
    return int(any(total[kind] for kind in KINDS if kind not in GOOD))


def _row(name: str, kinds: Counter[str]) -> str:
    return f"| {name} | {kinds.total()} | " + " | ".join(str(kinds[kind]) for kind in KINDS) + " |"


if __name__ == "__main__":
    # The module that the targets know, whose TARGETS they fill, and not its copy called __main__.
    sys.exit(importlib.import_module("benchmarks.fuzz").main())
