"""The protocol between `gr export` and a kind of model, which hands it a builder in gr/serving/passes.

A builder is a function(saved, kinds, config) -> Built. kinds: the type of each table's rows, by name. It makes modules
without data-dependent shapes over the model's own dense part and packed tables, and says what the verbs of the kind
need when a package is opened: gr/serving/verbs/KIND.py has them.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gr.config import RunConfig
from gr.serving.package.layout import VerbRecord
from gr.serving.tables.quantize import RowKind


@dataclass(frozen=True)
class Pass:
    """One forward pass, which is compiled.

    module: in evaluation mode, tensors in and one tensor or a tuple of them out; what it reads are parameters and
    persistent buffers, by which other weights take their place without compiling. golden: the inputs with which it is
    traced, and compared with the model whenever the package is opened. dynamic: for each input, the dims that have any
    size >= 1, with a name; dims of one name are equal.
    """

    module: nn.Module
    golden: tuple[Tensor, ...]
    dynamic: tuple[Mapping[int, str], ...]


@dataclass(frozen=True)
class CardTables:
    """Tables that lie on cards, outside the passes.

    weights: float [E, D] by table. columns: the features that read each. ids: the sparse columns of a row with their
    number of ids, side by side. features: the order in which the pass takes vectors, of dim columns each. row_weights:
    after these a row has its own weight in the sum. golden: ids and their vectors, as the pass takes them.
    """

    weights: Mapping[str, Tensor]
    columns: Mapping[str, Sequence[str]]
    ids: Sequence[tuple[str, int]]
    features: Sequence[str]
    dim: int
    row_weights: bool
    golden: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Built:
    """passes: by name. served: answers as the passes do and is called as the trained model is; the gate compares both.
    None: it is the model itself over rows of those types. verbs: what each is asked with and answers with. tables:
    shape and row type of each, by name.

    form: what else than the tables and the passes' source the compiled code depends on, as JSON has it. artifacts:
    files of the version for the verbs to read, path -> content, or what writes it; written in this order. cards: the
    tables that no pass has, where the configuration asks for cards. rounding: where served is None, what else than the
    tables the passes round, done to the model while it is open.
    """

    passes: Mapping[str, Pass]
    served: nn.Module | None
    verbs: Mapping[str, VerbRecord]
    tables: Mapping[str, tuple[int, int, RowKind]]
    form: Mapping[str, Any]
    artifacts: Mapping[str, bytes | Callable[[Path], None]]
    cards: CardTables | None = None
    rounding: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def kinds(self) -> dict[str, RowKind]:
        """Of the rows of each table."""
        return {name: kind for name, (_, _, kind) in self.tables.items()}


def served_kind(config: RunConfig) -> str:
    """The kind of package that a run's model makes: a preference run has trained a retrieval model further."""
    return "retrieval" if config.kind == "preference" else config.kind
