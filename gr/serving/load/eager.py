"""A click model as torchrec runs it, behind the same engine as a package, to be compared with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from gr.errors import ServingError
from gr.models.saved import load
from gr.models.saved_click import SavedClick
from gr.serving.package.layout import read_current, read_manifest
from gr.serving.package.version import Unseen
from gr.serving.servable import Encoded, Servable, TensorSpec


@dataclass(frozen=True)
class _Rows:
    table: pa.Table

    @property
    def rows(self) -> int:
        return self.table.num_rows


class EagerClick:
    """The verb `score` of a checkpoint: each request alone through gr.load's model."""

    kind, ready = "click", True

    def __init__(self, checkpoint: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        """inputs, outputs: of the package's verb. Raises ServingError for a checkpoint of another kind of model."""
        self.inputs, self.outputs = inputs, outputs
        saved = load(checkpoint)
        if not isinstance(saved, SavedClick):
            raise ServingError(f"{checkpoint}: is a {saved.config.kind} model; eager is for click models")
        self._saved = saved
        self.name = self._saved.folder.name
        self.count_unknown = Unseen()
        self.verbs: Mapping[str, Servable] = {"score": self}

    @classmethod
    def of(cls, checkpoint: str, package: Path) -> "EagerClick":
        """With the inputs and outputs of the package's verb."""
        manifest = read_manifest(package, read_current(package))
        if manifest.kind != "click":
            raise ServingError(f"{package}: serves a {manifest.kind} model; eager is for click models")
        record = manifest.verbs["score"]
        return cls(checkpoint, record.inputs, record.outputs)

    def encode(self, columns: Mapping[str, np.ndarray]) -> _Rows:
        """columns: by name, [B] or [B, ids]."""
        return _Rows(pa.table({name: _as_arrow(values) for name, values in columns.items()}))

    def run(self, requests: Sequence[Encoded]) -> list[dict[str, np.ndarray]]:
        """One answer a request: score, float32 [B]."""
        return [{"score": self._saved.score(request.table)} for request in requests if isinstance(request, _Rows)]

    def close(self) -> None:
        self.verbs = {}


def _as_arrow(values: np.ndarray) -> pa.Array:
    flat = pa.array(values.reshape(-1))
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
