"""What benchmarks.run measures: a case is one piece of work, done by several variants in turns.

A benchmark module has TESTS (the correctness tests that must pass before its figures mean anything) and
cases(options) -> list[Case].
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gr.ops.backend import Backend, force_backend


@dataclass(frozen=True)
class Options:
    """device: "cpu" or "cuda". data: what `gr prepare movielens-1m` wrote, or None. peer: a checkout, or None."""

    device: str
    data: Path | None = None
    peer: Path | None = None


@dataclass(frozen=True)
class Case:
    """variants build their inputs when called first, so that the memory of one can be measured alone.

    work: useful floating-point operations of a call, 0 where a rate says nothing. series, at: the line of a picture
    this case is a point of, and its place there. memory: whether to measure each variant's peak too.
    """

    name: str
    variants: Mapping[str, Callable[[], object]]
    baseline: str
    work: float = 0.0
    rounds: int = 7
    warmups: int = 2
    series: str = ""
    at: int = 0
    memory: bool = False


def lazy(build: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """A variant that is built when it is called first."""
    built = functools.cache(build)
    return lambda: built()()


def on_backend(name: Backend, run: Callable[[], object]) -> Callable[[], object]:
    def forced() -> object:
        with force_backend(name):
            return run()

    return forced


def own_backend(device: str) -> Backend:
    """What gr runs there at its best."""
    return "native" if device == "cpu" else "triton"
