"""A version with real tensors whose answers say twice, from two tensors, which version they are of."""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from gr.serving import Answer, Engine, RequestError, TensorSpec
from gr.serving.package.version import Unseen


@dataclass(frozen=True)
class ToyRows:
    x: torch.Tensor  # [B]

    @property
    def rows(self) -> int:
        return len(self.x)


class ToyServable:
    """y = x * number + number; `before` and `after` are the version's number from two tensors, read apart in time.

    A batch takes `fixed + row * rows` seconds at least; x of `fails` breaks the batch that it is in, by `fault`.
    begun is set when a batch runs, which then waits until `go` is set, as it is at first.
    """

    inputs = (TensorSpec("x", "FP32", (-1,)),)
    outputs = (TensorSpec("y", "FP32", (-1,)), TensorSpec("before", "FP32", (1,)), TensorSpec("after", "FP32", (1,)))

    def __init__(self, number: float, fixed: float = 0.0, row: float = 0.0, fails: float | None = None) -> None:
        self.weight, self.bias = torch.full((8,), number), torch.full((1,), number)
        self.fixed, self.row, self.fails = fixed, row, fails
        self.fault: Exception = ArithmeticError("the toy fails")
        self.batches: list[int] = []
        self.begun, self.go = threading.Event(), threading.Event()
        self.go.set()

    def encode(self, columns: Mapping[str, np.ndarray]) -> ToyRows:
        if "x" not in columns:
            raise RequestError("x", "is missing")
        x = np.asarray(columns["x"], np.float32)
        if x.ndim != 1 or not len(x):
            raise RequestError("x", f"has shape {list(x.shape)}, expected [B] with at least one row")
        return ToyRows(torch.from_numpy(x))

    def run(self, requests: Sequence[ToyRows]) -> list[dict[str, np.ndarray]]:
        x = torch.cat([request.x for request in requests])
        self.batches.append(len(x))
        if self.fails is not None and (x == self.fails).any():
            raise self.fault
        before = self.weight.mean()
        self.begun.set()
        assert self.go.wait(30)
        if wait := self.fixed + self.row * len(x):
            time.sleep(wait)
        after = self.bias.mean()
        y = x * before + after
        number = {"before": before.reshape(1).numpy(), "after": after.reshape(1).numpy()}
        return [{"y": part.numpy(), **number} for part in y.split([request.rows for request in requests])]


class WideVersion:
    """As ToyVersion(1), with an input of every datatype, which it checks and leaves out of its answers."""

    ready = True

    def __init__(self) -> None:
        self.name, self.kind, self.servable, self.count_unknown = "step-1", "click", ToyServable(1.0), Unseen()
        shapes = {"INT64": (-1, 3), "INT32": (-1,), "FP64": (-1,), "BOOL": (-1,), "BYTES": (-1,)}
        wide = [TensorSpec(datatype.lower(), datatype, shape) for datatype, shape in shapes.items()]
        self.servable.inputs = (*ToyServable.inputs, *wide)
        self.verbs = {"score": self.servable}

    def close(self) -> None:
        self.verbs = {}


class ToyVersion:
    ready = True

    def __init__(self, number: int, kind: str = "click", verb: str = "score", **servable: float) -> None:
        self.name, self.kind = f"step-{number}", kind
        self.servable = ToyServable(float(number), **servable)
        self.verbs = {verb: self.servable}
        self.count_unknown = Unseen()
        self.closed = threading.Event()

    @contextmanager
    def busy(self, engine: Engine) -> Iterator[Future[Answer]]:
        """While a first request runs, and so all others wait."""
        self.servable.go.clear()
        first = engine.submit("score", {"x": np.ones(1)})
        assert self.servable.begun.wait(30)
        try:
            yield first
        finally:
            self.servable.go.set()

    def close(self) -> None:
        assert not self.closed.is_set()
        self.closed.set()
        self.servable.weight.fill_(-1)  # an answer after this shows itself
        self.servable.bias.fill_(-2)
