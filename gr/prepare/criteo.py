"""Criteo's click logs -> a tabular folder, in two passes over the source: count the values, then write the parts.

Work goes to a folder beside the result, `.NAME.unfinished`, where each source file that is done has a note; the same
command again continues after the last file that was finished, and gives the same bytes as one that was never stopped.

Memory does not grow with the rows. It holds a block of the source, a row group, at most _ENTRIES counts
(criteo_vocabulary.py) and, while writing, the values of the vocabularies, 4 bytes each (8 from ORC). Peak measured with
benchmarks/prepare.py: 0.2 GB for 0.5 and 2 million rows with 0.5 million values; 0.35 GB once counts go to disk.
"""

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gr.errors import ConfigError, DataError
from gr.files import read_json, write_json
from gr.logging import get_logger
from gr.prepare.criteo_rows import DENSE, LABEL, SPARSE, Block, is_orc, read_blocks
from gr.prepare.criteo_vocabulary import ValueCounts, Vocabulary, write_vocabulary
from gr.prepare.lines import BadRows, OnBadRow
from gr.prepare.tabular import ROWS_PER_GROUP, Transform, dense_feature, tabular_table, with_progress
from gr.prepare.write import PartWriter, atomic_folder, part_name, require_replaceable, writing
from gr.schema import (
    FORMAT_VERSION,
    PART_PATTERN,
    SCHEMA_FILE,
    VOCABULARY_FOLDER,
    DenseTransform,
    SourceRows,
    SparseColumn,
    TabularSchema,
)

log = get_logger(__name__)

_TASK, _COUNTS, _WRITTEN = "task.json", "counts", "written"
_AGAIN = "--restart begins again"


@dataclass(frozen=True)
class CriteoOptions:
    """Options of `gr prepare criteo`; None is the vocabulary's value, or the default where no vocabulary is given.

    threshold: occurrences from which a value gets an id of its own, 1 by default. transform: formula of the dense
    features, log1p_clip by default. max_rows: limit of a table's rows, beyond which values share ids; none by default.
    vocabulary: a tabular folder whose vocabulary to use. rows_per_part: limit of a Parquet file; every source file
    begins a new one.
    """

    threshold: int | None = None
    transform: Transform | None = None
    max_rows: int | None = None
    vocabulary: Path | None = None
    on_bad_row: OnBadRow = "fail"
    rows_per_part: int = 1 << 20


def prepare_criteo(
    sources: Sequence[Path], out: Path, options: CriteoOptions, *, force: bool = False, restart: bool = False
) -> TabularSchema:
    """Write the tabular folder `out`, or continue the work of an interrupted call.

    force: replace a data folder at `out`. restart: throw away the work of an interrupted call. Raises DataError for bad
    rows and unreadable files, ConfigError for options that contradict each other, the vocabulary or the interrupted
    call's.
    """
    require_replaceable(out, force)
    work = out.with_name(f".{out.name}.unfinished")
    if restart and work.exists():
        shutil.rmtree(work)
    with writing(out):
        run = _Run(work, sources, _settled(options))
        try:
            schema = run.finish()
        except (DataError, ConfigError):
            if not any(run.done()):
                shutil.rmtree(work, ignore_errors=True)
            raise
    with atomic_folder(out, force) as folder:
        for path in [work / VOCABULARY_FOLDER, *sorted(work.glob(PART_PATTERN)), work / SCHEMA_FILE]:
            path.rename(folder / path.name)
    shutil.rmtree(work)
    return schema


def _settled(options: CriteoOptions) -> CriteoOptions:
    """Options with nothing unset but max_rows: the vocabulary's, or the defaults. ConfigError where they contradict."""
    if options.vocabulary is None:
        return replace(options, threshold=options.threshold or 1, transform=options.transform or "log1p_clip")
    given = TabularSchema.load(options.vocabulary)
    for name, own, value in (
        ("threshold", options.threshold, given.threshold),
        ("max-rows", options.max_rows, given.max_rows),
    ):
        if own is not None:
            raise ConfigError(
                f"--{name} and --vocabulary contradict each other: the vocabulary of {options.vocabulary} has "
                f"{name} {value}; pass one of them"
            )
    if given.transform.name == "none":
        raise ConfigError(
            f"--vocabulary {options.vocabulary}: is not of Criteo's data, its dense columns are no counts"
        )
    if options.transform not in (None, given.transform.name):
        raise ConfigError(
            f"--transform {options.transform}: the data of --vocabulary {options.vocabulary} has "
            f"{given.transform.name}, and one model needs one transform; leave --transform away"
        )
    return replace(options, threshold=given.threshold, transform=given.transform.name, max_rows=given.max_rows)


class _Run:
    """One preparation, perhaps begun by an earlier process."""

    def __init__(self, work: Path, sources: Sequence[Path], options: CriteoOptions) -> None:
        self._work, self._sources, self._options = work, list(sources), options
        assert options.threshold is not None and options.transform is not None, "settled"
        self._threshold, self._transform = options.threshold, options.transform
        self._bad = BadRows(options.on_bad_row)
        self._kind = pa.int64() if is_orc(self._sources[0]) else pa.uint32()
        self._begin()

    def _begin(self) -> None:
        """Make the folder, or check that an interrupted run began it with the same sources and options."""
        task = {name: value for name, value in vars(self._options).items() if name != "on_bad_row"}
        task["sources"] = [str(file.resolve()) for file in self._sources]
        task["vocabulary"] = task["vocabulary"] and str(task["vocabulary"].resolve())
        file = self._work / _TASK
        if not file.exists():
            for name in (_COUNTS, _WRITTEN):
                (self._work / name).mkdir(parents=True, exist_ok=True)
            write_json(file, task)
            return
        begun = read_json(file, DataError, _AGAIN)
        for name, value in task.items():
            if begun.get(name) != value:
                raise ConfigError(
                    f"{self._work}: an interrupted run had {name}={begun.get(name)!r}, this one has {value!r}; repeat "
                    "that command to continue it, or pass --restart to begin again"
                )
        log.info("%s: continuing after %d files counted, %d written", self._work, *self.done())

    def done(self) -> tuple[int, int]:
        """Source files counted and written."""
        return len([*self._work.glob(f"{_COUNTS}/*/done.json")]), len([*self._work.glob(f"{_WRITTEN}/*.json")])

    def finish(self) -> TabularSchema:
        """Both passes, as far as they are not done, and the schema."""
        if self._options.vocabulary is None or self._transform == "torchrec_minshift":
            for index, file in enumerate(self._sources):
                self._count(index, file)
        vocabulary = self._vocabulary()
        notes: list[dict[str, Any]] = []
        for index, file in enumerate(self._sources):
            parts = sum(note["parts"] for note in notes)
            notes.append(self._write(index, file, vocabulary, parts))
        schema = self._schema(vocabulary, notes)
        schema.save(self._work)
        return schema

    def _count(self, index: int, file: Path) -> None:
        folder = self._work / _COUNTS / f"{index:05d}"
        if self._noted(folder / "done.json", file):
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        values = ValueCounts(folder, SPARSE if self._options.vocabulary is None else ())
        minimum = 0.0
        stamp = _stamp(file)
        for block in with_progress(read_blocks(file, self._bad), f"count {file.name}"):
            minimum = min(minimum, *(column.min() for column in block.counts))
            values.add(block.categories if self._options.vocabulary is None else ())
        values.close()
        write_json(folder / "done.json", {**stamp, "minimum": int(minimum), "bad_rows": self._bad.take()})

    def _vocabulary(self) -> Vocabulary:
        """The vocabulary in the work folder, made first if it is missing."""
        folder = self._work / VOCABULARY_FOLDER
        if not folder.exists():
            partial = self._work / f"{VOCABULARY_FOLDER}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            if self._options.vocabulary is not None:
                shutil.copytree(self._options.vocabulary / VOCABULARY_FOLDER, partial)
            else:
                partial.mkdir()
                runs = sorted((self._work / _COUNTS).glob("*/run-*"))
                for name in SPARSE:
                    write_vocabulary(
                        partial / f"{name}.parquet", name, runs, kind=self._kind, threshold=self._threshold
                    )
            partial.rename(folder)
        vocabulary = Vocabulary(folder, SPARSE, self._options.max_rows)
        if vocabulary.kind != self._kind:
            raise DataError(
                f"{self._options.vocabulary}: its vocabulary has values of type {vocabulary.kind}, the source's are "
                f"{self._kind}: ORC rows and text rows do not share one"
            )
        return vocabulary

    def _write(self, index: int, file: Path, vocabulary: Vocabulary, first_part: int) -> dict[str, Any]:
        place = self._work / _WRITTEN / f"{index:05d}.json"
        noted = self._noted(place, file)
        if noted and all((self._work / part_name(first_part + n)).exists() for n in range(noted["parts"])):
            return noted
        for path in self._work.glob(PART_PATTERN):
            if path.name >= part_name(first_part):
                path.unlink()
        counted = self._work / _COUNTS / f"{index:05d}" / "done.json"
        counts = self._noted(counted, file) if counted.exists() else None
        shift = counts["minimum"] if counts else 0
        negative, minimum, stamp = np.zeros(len(DENSE), dtype=np.int64), 0.0, _stamp(file)
        writer = PartWriter(
            self._work, ROWS_PER_GROUP, rows_per_part=self._options.rows_per_part, first_part=first_part
        )
        for block in with_progress(read_blocks(file, self._bad), f"write {file.name}"):
            minimum = min(minimum, *(column.min() for column in block.counts))
            negative += [int((column < 0).sum()) for column in block.counts]
            writer.write(_table(block, vocabulary, self._transform, shift))
        writer.end_part()
        note = {
            **stamp,
            "name": file.name,
            "rows": writer.rows,
            "parts": writer.parts,
            "minimum": int(minimum),
            "negative": negative.tolist(),
            "bad_rows": self._bad.take(),
        }
        write_json(place, note)
        return note

    def _noted(self, place: Path, file: Path) -> dict[str, Any] | None:
        """The note written when the file was done; None if it is not. DataError for a file that changed since."""
        if not place.exists():
            return None
        note = read_json(place, DataError, _AGAIN)
        if any(note.get(name) != value for name, value in _stamp(file).items()):
            raise DataError(f"{file}: changed after it was read; pass --restart to begin again")
        if note["bad_rows"] and self._options.on_bad_row == "fail":
            raise DataError(
                f"{file}: bad rows were left out of it before the interruption: {note['bad_rows']}; pass --on-bad-row "
                "skip as before, or --restart to begin again"
            )
        return note

    def _schema(self, vocabulary: Vocabulary, notes: list[dict[str, Any]]) -> TabularSchema:
        rows = sum(note["rows"] for note in notes)
        if not rows:
            shutil.rmtree(self._work)
            raise DataError(f"{self._sources[0]}: no row is left to write, in {len(self._sources)} files")
        bad_rows: Counter[str] = Counter()
        for note in notes:
            bad_rows.update(note["bad_rows"])
        negative = zip(DENSE, np.sum([note["negative"] for note in notes], axis=0).tolist(), strict=True)
        return TabularSchema(
            format_version=FORMAT_VERSION,
            kind="tabular",
            name="criteo",
            labels=[LABEL],
            dense=list(DENSE),
            transform=DenseTransform(name=self._transform, version=1),
            sparse=[
                SparseColumn(name=name, cardinality=size)
                for name, size in zip(SPARSE, vocabulary.cardinalities, strict=True)
            ],
            rows=rows,
            threshold=self._threshold,
            max_rows=self._options.max_rows,
            files=[SourceRows(name=n["name"], rows=n["rows"], minimum=n["minimum"]) for n in notes],
            bad_rows=dict(sorted(bad_rows.items())),
            negative_counts={name: count for name, count in negative if count},
            source=", ".join(dict.fromkeys(str(file.parent) for file in self._sources)),
        )


def _table(block: Block, vocabulary: Vocabulary, transform: Transform, minimum: int) -> pa.Table:
    dense = [dense_feature(counts, transform, minimum) for counts in block.counts]
    return tabular_table((LABEL, *DENSE, *SPARSE), block.labels_B, dense, vocabulary.ids(block.categories))


def _stamp(file: Path) -> dict[str, int]:
    status = file.stat()
    return {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}
