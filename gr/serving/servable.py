"""The joint between kinds of models and the engine: what a version of a package can be asked, and how."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gr.errors import ServingError


class RequestError(ServingError):
    """A request is wrong in one field; the server answers 400. field: its name, as the request writes it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class Unavailable(ServingError):
    """Nothing is wrong with a request or with the model, but this engine cannot answer now; the server answers 503."""


def require_finite(values: np.ndarray) -> None:
    """Raises ServingError where a number that the model gave is not finite."""
    if not np.isfinite(values).all():
        raise ServingError("the model's answer is not finite")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a request or of an answer. datatype: of the Open Inference Protocol; shape: -1 for any size.

    NaN in an answer is a value that there is none of.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]


class Encoded(Protocol):
    """A request that was checked and whose ids are those of the model. Each servable has its own."""

    @property
    def rows(self) -> int:
        """The size of the request, in what a batch is limited by: examples or candidates."""
        ...


class Servable(Protocol):
    """One verb of a version: `score` of a click model, `rank` of a ranking model, `retrieve` of a retrieval model."""

    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]

    def encode(self, columns: Mapping[str, np.ndarray]) -> Encoded:
        """The request, checked, with the user's own ids mapped to the model's. Raises RequestError."""
        ...

    def run(self, requests: Sequence[Encoded]) -> Sequence[dict[str, np.ndarray] | RequestError]:
        """One answer a request, by the names of `outputs`; they go through the model as one batch where they can.

        What is found wrong with a request only when it is read with its batch is its answer.
        """
        ...


class UnknownCounts(Protocol):
    """Counts of values in requests that training did not see."""

    def by_column(self) -> Mapping[str, int]:
        """Values so far, by input."""
        ...


class ServedVersion(Protocol):
    """One version that the engine serves: weights behind compiled passes. It never changes. name: of it, in answers."""

    name: str
    kind: str
    verbs: Mapping[str, Servable]

    @property
    def count_unknown(self) -> UnknownCounts:
        """Counters of this version alone."""
        ...

    @property
    def ready(self) -> bool:
        """Whether it can answer; once it cannot, it never can again."""
        ...

    def close(self) -> None:
        """Gives the weights back. The engine calls it when the last request of the version is answered."""
        ...
