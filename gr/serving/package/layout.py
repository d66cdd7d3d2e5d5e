"""A package: the folder from which a model is served.

    current.json                   what is served: code, weights, the SHA-256 of their manifest; replaced by one rename
    sources.json                   of each version, the SHA-256 of the checksums of the checkpoint that it is made of
    code/HASH/PASS.pt2             compiled passes, the same for all weights of one form; HASH is that of the form
    code/HASH/operators.so         gr's C++ operators, where the passes call them
    code/HASH/SHA256SUMS           of these, in the form of sha256sum
    weights/STEP-DIGEST/           one version: manifest.json, tensors.safetensors (mapped), golden.safetensors,
                                   tables-CARD.safetensors where the tables are on cards, ids.safetensors (mapped)
                                   where raw ids have rows of their own, schema.json,
                                   vocabulary/ and what else of the checkpoint the kind needs
    weights/.draft/, code/.draft/  being written: never looked at, gone at the next export

A folder gets its final name by one rename when all in it is on disk, and is not written again. So whenever a writer is
killed, current.json names a version that is whole.
"""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gr.config.export import DenseDtype, ExportConfig, Kind, RowKind
from gr.errors import ServingError
from gr.files import sha256_of
from gr.serving.servable import TensorSpec

CURRENT, SOURCES, MANIFEST = "current.json", "sources.json", "manifest.json"
CODE, WEIGHTS, DRAFT = "code", "weights", ".draft"
TENSORS, GOLDEN = "tensors.safetensors", "golden.safetensors"
OPERATORS = "operators.so"
RAW_ID_FILE = "ids.safetensors"
_LARGEST_CURRENT, _LARGEST_MANIFEST = 1 << 16, 1 << 24  # bytes
_WRITABLE_BY_OTHERS = 0o022
_PART = r"[^./\\\x00-\x1f][^/\\\x00-\x1f]*"
# Of one folder or file, and of a path below the package, which so cannot lead out of it.
Name = Annotated[str, Field(pattern=rf"^{_PART}$", max_length=200)]
RelativePath = Annotated[str, Field(pattern=rf"^{_PART}(/{_PART})*$", max_length=1000)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FormHash = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Stored(_Record):
    """One version of a package: its two folders, and the SHA-256 of its manifest."""

    code: FormHash
    weights: Name
    manifest: Digest


class Current(Stored):
    """current.json. previous: versions that were served before, newest first, and are still there."""

    format: Literal[1] = 1
    previous: tuple[Stored, ...] = ()


class PassRecord(_Record):
    """A compiled pass. tensors: of the pass, by its own names -> their names in tensors.safetensors."""

    inputs: int
    outputs: int
    tensors: dict[str, str]


class VerbRecord(_Record):
    """The inputs and outputs of one verb."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class TableRecord(_Record):
    """A table of a version: its rows and columns, their type, and the bytes that they take."""

    rows: int
    dim: int
    dtype: RowKind
    bytes: int


class IdsRecord(_Record):
    """How the raw ids of a column become rows of a table. ways: of a dynamic table; None for hashed ids."""

    kind: Literal["hashed", "dynamic"]
    table: str
    rows: int
    ways: Annotated[int, Field(ge=2)] | None = None


class TablesLayout(_Record):
    """How packed tables lie in one buffer, as fbgemm's n-bit operator is told.

    features, widths: in the order of the ids, and of the columns that come back. sizes: the sum of the widths, and the
    widest table of 2, 4 and 8 bits, fp16 and fp32. pooling, output_dtype, row_alignment: the operator's own numbers.
    """

    features: tuple[str, ...]
    widths: tuple[int, ...]
    sizes: tuple[int, int, int, int, int, int]
    pooling: int
    output_dtype: int
    row_alignment: int


class CardRecord(_Record):
    """The tables of one card. file: its rows. bytes: of its tables. cost: the measured sum of their lookups."""

    file: Name
    tables: tuple[str, ...]
    bytes: int
    cost: float
    layout: TablesLayout


class CardsRecord(_Record):
    """Tables over cards.

    columns: the sparse columns of a row with their ids, side by side. features: the order in which the pass takes
    vectors, of dim columns each. row_weights: after these a row has its own weight in the sum. costs: microseconds of a
    batch of lookups by table, as they were measured. *_bound: what the fullest and the dearest card of no partition is
    below.
    """

    cards: tuple[CardRecord, ...]
    columns: tuple[tuple[str, int], ...]
    features: tuple[str, ...]
    dim: int
    row_weights: bool
    costs: dict[str, float]
    bytes_bound: float
    cost_bound: float

    @property
    def bytes_over_bound(self) -> float:
        """Bytes of the fullest card over their bound; 1.0 is the best that any partition can do."""
        return max(card.bytes for card in self.cards) / self.bytes_bound

    @property
    def cost_over_bound(self) -> float:
        """Cost of the dearest card over its bound; 1.0 is the best that any partition can do."""
        return max(card.cost for card in self.cards) / self.cost_bound


class CPU(_Record):
    """machine: x86_64 or another. features: those of its instruction set, which compiled code may use."""

    machine: str
    features: tuple[str, ...]


class Manifest(_Record):
    """manifest.json of one version.

    form: what the compiled code depends on; another checkpoint of the same form takes the same code. tolerance: how far
    the passes may be from the golden rows, relative to 1 + the golden value. gate: the report on the accuracy; None
    where none was made. dense: of the products of each dense layer. ids: of the columns with raw ids. cards: None where
    the tables are among the tensors of a pass.
    code_files, files: SHA-256 of every file of the code's folder and of the version's own, by its path there; of all
    but this one.
    """

    format: Literal[1] = 1
    kind: Name
    step: Annotated[int, Field(ge=0)]
    export: ExportConfig
    form: dict[str, Any]
    passes: dict[Name, PassRecord]
    verbs: dict[Name, VerbRecord]
    tables: dict[str, TableRecord]
    ids: dict[str, IdsRecord] = {}
    cards: CardsRecord | None = None
    dense: dict[str, DenseDtype]
    tolerance: Annotated[float, Field(gt=0)]
    gate: dict[str, Any] | None
    versions: dict[str, str]
    cpu: CPU
    code_files: dict[RelativePath, Digest]
    files: dict[RelativePath, Digest]

    @property
    def kinds(self) -> dict[str, Kind]:
        """Of each table's rows, and of each dense layer."""
        return {**{name: table.dtype for name, table in self.tables.items()}, **self.dense}

    def paths(self, stored: Stored) -> Iterator[tuple[str, str]]:
        """The path below the package, and the SHA-256, of every file of the version but the manifest."""
        for folder, files in ((f"{CODE}/{stored.code}", self.code_files), (f"{WEIGHTS}/{stored.weights}", self.files)):
            yield from ((f"{folder}/{name}", digest) for name, digest in files.items())


Record = TypeVar("Record", bound=_Record)


def dumped(record: _Record) -> str:
    """The text of a record's file."""
    return json.dumps(record.model_dump(mode="json"), indent=2) + "\n"


def read_current(folder: Path) -> Current:
    """The version that a package serves. Raises ServingError for a folder without a package or a foreign record."""
    path = folder / CURRENT
    if not path.is_file():
        raise ServingError(f"{folder}: is no package, since it has no {CURRENT}; `gr export --out {folder}` writes one")
    text = _read(path, _LARGEST_CURRENT)
    current = _parsed(path, text, Current)
    if dumped(current).encode() != text:
        raise ServingError(f"{path}: is not what gr wrote; export again, or take the file from a backup")
    return current


def read_manifest(folder: Path, stored: Stored) -> Manifest:
    """The manifest of a version. Raises ServingError where it is not the one that current.json names."""
    path = folder / WEIGHTS / stored.weights / MANIFEST
    if not path.is_file():
        raise ServingError(f"{path}: is missing, and {folder / CURRENT} names it; export again")
    text = _read(path, _LARGEST_MANIFEST)
    if sha256_of(path) != stored.manifest:
        raise ServingError(f"{path}: is not what gr wrote (SHA-256); export again, or publish the checkpoint again")
    return _parsed(path, text, Manifest)


def verify(folder: Path, stored: Stored, manifest: Manifest) -> None:
    """Raises ServingError, naming the file, where a version is not what was written, or others can write it.

    What a version is made of must be in the manifest; other files in the folders are never read.
    """
    for place in ("", CODE, WEIGHTS, f"{CODE}/{stored.code}", f"{WEIGHTS}/{stored.weights}"):
        require_private(folder / place)
    listed = {*manifest.code_files, *manifest.files}
    cards = manifest.cards.cards if manifest.cards else ()
    code = [*(f"{name}.pt2" for name in manifest.passes), *[OPERATORS] * ("operators" in manifest.form)]
    maps = [RAW_ID_FILE] if any(each.kind == "dynamic" for each in manifest.ids.values()) else []
    for needed in (*code, TENSORS, GOLDEN, *maps, *(card.file for card in cards)):
        if needed not in listed:
            raise ServingError(f"{folder / WEIGHTS / stored.weights}: no SHA-256 of {needed} is known; export again")
    for name, digest in manifest.paths(stored):
        path = folder / name
        if not path.is_file():
            raise ServingError(f"{path}: is missing, and the manifest names it; export again")
        require_private(path)
        if sha256_of(path) != digest:
            raise ServingError(f"{path}: is not what gr wrote (SHA-256); export again, or publish the checkpoint again")


def require_private(path: Path) -> None:
    """Raises ServingError where others than this user and root can write a file or folder: it has code that runs."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise ServingError(f"{path}: is a link, which a package has none of; copy what it leads to")
    if status.st_uid not in (0, os.getuid()):
        raise ServingError(
            f"{path}: belongs to another user (uid {status.st_uid}), so code in it is not run; copy the package, or "
            "serve it as that user"
        )
    if status.st_mode & _WRITABLE_BY_OTHERS:
        raise ServingError(f"{path}: others can write it, so code in it is not run; chmod -R go-w the package")


def _read(path: Path, largest: int) -> bytes:
    with path.open("rb") as file:
        text = file.read(largest + 1)
    if len(text) > largest:
        raise ServingError(f"{path}: has more than {largest:,} bytes, so gr did not write it; export again")
    return text


def _parsed(path: Path, text: bytes, model: type[Record]) -> Record:
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(map(str, fault["loc"]))
        raise ServingError(
            f"{path}: is not what gr wrote ({place + ': ' if place else ''}{fault['msg']}); export again"
        ) from None
