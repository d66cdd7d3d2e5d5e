"""`score`: the probability of the label for rows that have the columns of a click model's training data. B rows."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from gr.config.export import UnknownPolicy
from gr.data.click_rows import ClickRows, ColumnError
from gr.data.tabular import TabularRows
from gr.data.vocabulary import Vocabulary
from gr.errors import nearest
from gr.schema import TabularSchema
from gr.serving.package.layout import Manifest, VerbRecord
from gr.serving.package.version import Unseen
from gr.serving.servable import Encoded, RequestError, Servable, TensorSpec, require_finite
from gr.serving.tables.id_rows import IdRows
from gr.serving.verbs.request_ids import warm_up

Run = Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]]  # a pass: dense_BN, ids_BH -> logits_B


class ReadRows(NamedTuple):
    """Rows as the pass reads them. dense_BN: float32. ids_BH: int32, rows of their tables."""

    dense_BN: np.ndarray
    ids_BH: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.ids_BH)


@dataclass(frozen=True)
class PlainRows:
    """Columns of float32 and int64 alone, of equal lengths, which are read together with those of the whole batch."""

    columns: Mapping[str, np.ndarray]
    rows: int


class ClickServable:
    """The verb `score`. inputs: one tensor a column of the training data, of equal lengths."""

    def __init__(
        self,
        rows: ClickRows,
        id_rows: IdRows,
        record: VerbRecord,
        run: Run,
        *,
        unknown: UnknownPolicy,
        unseen: Unseen,
    ) -> None:
        self.inputs: Sequence[TensorSpec] = record.inputs
        self.outputs: Sequence[TensorSpec] = record.outputs
        self._rows, self._id_rows = rows, id_rows
        self.compiled_pass, self._unknown, self._unseen = run, unknown, unseen
        self._hots = {column.name: column.hots for column in rows.schema.sparse}
        # Type and ids of a row of each column that a batch of requests reads as one array.
        self._plain = {name: (np.dtype(np.float32), 1) for name in rows.schema.dense} | {
            name: (np.dtype(np.int64), hots) for name, hots in self._hots.items() if rows.vocabularies[name].has_numbers
        }

    def encode(self, columns: Mapping[str, np.ndarray]) -> PlainRows | ReadRows:
        """columns: by name, [B], or [B, ids] where rows have several ids; text or numbers, as in the training data.

        Raises RequestError for a column that is missing, unknown, of another length or type, or has a value that is no
        finite number or no id; and, where the package says so, a value that training did not see. What is wrong with
        values of plain columns is what `run` answers.
        """
        if rows := self._plain_rows(columns):
            return PlainRows(columns, rows)
        known = [spec.name for spec in self.inputs]
        for name in columns:
            if name not in known:
                raise RequestError(name, f"the model has no such column; {nearest(name, known, 'it has')}")
        for name in known:
            if name not in columns:
                raise RequestError(name, "is missing; the model reads it")
        arrays = {name: np.asarray(columns[name]) for name in known}
        self._check_shapes(arrays)
        return self.read(arrays)

    def _plain_rows(self, columns: Mapping[str, np.ndarray]) -> int:
        """The number of rows where these are all plain columns, of the right types and shapes; 0 where they are not."""
        if len(columns) != len(self._plain) or len(self._plain) != len(self.inputs):
            return 0
        first = columns.get(self.inputs[0].name)
        rows = len(first) if isinstance(first, np.ndarray) and first.ndim else 0
        shapes = {1: (rows,)}
        for name, (dtype, hots) in self._plain.items():
            array = columns.get(name)
            if not isinstance(array, np.ndarray) or array.dtype != dtype:
                return 0
            if array.shape != (shapes.get(hots) or (rows, hots)):
                return 0
        return rows

    def read(self, columns: Mapping[str, np.ndarray]) -> ReadRows:
        """The rows of one request, or of several one behind the other. Raises RequestError, as encode does."""
        read, unseen = self._by_rows(*(self._rows.read_plain(columns) or self._read_any(columns)))
        self._count(unseen)
        return read

    def _by_rows(self, read: TabularRows, unseen: Mapping[str, int]) -> tuple[ReadRows, dict[str, int]]:
        """The rows with raw ids as rows of their tables; those that have none are counted with unseen values."""
        counts = Counter(unseen)
        if self._id_rows:
            first = 0
            for name, hots in self._hots.items():
                ids_Bh = read.ids_BH[:, first : first + hots]
                ids_Bh[:], shared_Bh = self._id_rows.rows(name, ids_Bh)
                if shared := int(shared_Bh.sum()):
                    counts[name] += shared
                first += hots
        return ReadRows(read.dense_BN, read.ids_BH.astype(np.int32)), dict(counts)

    def _count(self, unseen: Mapping[str, int]) -> None:
        self._unseen.add(unseen)
        if unseen and self._unknown == "reject":
            name, values = next(iter(unseen.items()))
            raise RequestError(name, f"{values} of its values were not seen in training, which this package refuses")

    def run(self, requests: Sequence[Encoded]) -> list[dict[str, np.ndarray] | RequestError]:
        """One answer a request: score, float32 [B]. All requests go through the model as one batch."""
        (dense_BN, ids_BH), faults = self._read_batch(requests)
        if len(ids_BH):
            (logits_B,) = self.compiled_pass(torch.from_numpy(dense_BN), torch.from_numpy(ids_BH))
            scores_B = logits_B.sigmoid().numpy()
            require_finite(scores_B)
        else:
            scores_B = np.empty(0, dtype=np.float32)
        answers: list[dict[str, np.ndarray] | RequestError] = []
        start = 0
        for place, request in enumerate(requests):
            if (fault := faults.get(place)) is not None:
                answers.append(fault)
            else:
                answers.append({"score": scores_B[start : start + request.rows]})
                start += request.rows
        return answers

    def _read_batch(self, requests: Sequence[Encoded]) -> tuple[ReadRows, dict[int, RequestError]]:
        """The rows of all requests but those at fault, and what is wrong with these, by their places."""
        plain = [each for each in requests if isinstance(each, PlainRows)]
        if len(plain) == len(requests):
            read = self._rows.read_plain(
                {name: np.concatenate([r.columns[name] for r in plain]) for name in self._plain}
            )
            if read is not None:
                rows, unseen = self._by_rows(*read)
                if not (unseen and self._unknown == "reject"):
                    self._count(unseen)
                    return rows, {}
        blocks, faults = [], {}
        for place, request in enumerate(requests):
            assert isinstance(request, PlainRows | ReadRows), "requests are encoded by the verb that runs them"
            try:
                blocks.append(self.read(request.columns) if isinstance(request, PlainRows) else request)
            except RequestError as error:
                faults[place] = error
        if not blocks:
            return ReadRows(np.empty((0, 0), np.float32), np.empty((0, 0), np.int32)), faults
        return ReadRows(*(np.concatenate(parts) for parts in zip(*blocks, strict=True))), faults

    def _check_shapes(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Raises RequestError."""
        first = next(iter(arrays.values()))
        rows = len(first) if first.ndim else -1
        for name, values in arrays.items():
            hots = self._hots.get(name, 1)
            if values.shape != ((rows,) if hots == 1 else (rows, hots)):
                shape = "[rows]" if hots == 1 else f"[rows, {hots}]"
                raise RequestError(
                    name, f"has shape {list(values.shape)}, wanted {shape} with the same rows in all columns"
                )

    def _read_any(self, arrays: Mapping[str, np.ndarray]) -> tuple[TabularRows, dict[str, int]]:
        """Columns of any kind. Raises RequestError."""
        table = pa.table({name: _as_arrow(name, values) for name, values in arrays.items()})
        try:
            return self._rows.read(table, "the request")
        except ColumnError as error:
            raise RequestError(error.column, str(error)) from None


def _as_arrow(name: str, values: np.ndarray) -> pa.Array:
    try:
        array = pa.array(values.reshape(-1))
        if pa.types.is_binary(array.type):
            array = array.cast(pa.string())  # text of a protocol comes as bytes of UTF-8
    except (pa.ArrowException, UnicodeError) as error:
        raise RequestError(name, f"cannot be read ({'; '.join(map(str, error.args))})") from None
    return array if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(array, values.shape[1])


def score_record(schema: TabularSchema, vocabularies: Mapping[str, Vocabulary]) -> VerbRecord:
    """The inputs and outputs of `score`."""
    dense = [TensorSpec(name, "FP32", (-1,)) for name in schema.dense]
    sparse = [
        TensorSpec(
            column.name,
            "BYTES" if pa.types.is_string(vocabularies[column.name].type) else "INT64",
            (-1,) if column.hots == 1 else (-1, column.hots),
        )
        for column in schema.sparse
    ]
    return VerbRecord(inputs=(*dense, *sparse), outputs=(TensorSpec("score", "FP32", (-1,)),))


def open_verbs(folder: Path, manifest: Manifest, passes: Mapping[str, Run], unseen: Unseen) -> dict[str, Servable]:
    """The verbs of a click model. folder: of the version, which has schema.json and the vocabularies."""
    schema = TabularSchema.load(folder)
    vocabularies = {name: Vocabulary.open(folder, schema, name) for name in _names(schema)}
    warm_up(vocabularies.values())
    score = ClickServable(
        ClickRows(schema, vocabularies),
        IdRows.open(folder, manifest),
        manifest.verbs["score"],
        passes["score"],
        unknown=manifest.export.unknown,
        unseen=unseen,
    )
    return {"score": score}


def _names(schema: TabularSchema) -> Iterable[str]:
    return (column.name for column in schema.sparse)
