"""Deltas: what training changed between two checkpoints of a run, by raw id, numbered and chained.

    deltas/000001/   manifest.json, changed-00000.safetensors, ..., files/progress.json, ..., SHA256SUMS
    deltas/000002/
    deltas/.000003/  being written: never looked at, gone at the next `gr publish`

A delta is computed by comparing two checkpoints by row blocks, so training keeps no account of what it touches, and a
row is in it exactly if a bit of its weights, its optimizer states or its raw id differs. A row has its place in the
table; where ids get rows as a run trains, it has its raw id too, and the delta names the ids that have lost theirs. The
manifest has the SHA-256 of all tensors before and after, which make the chain: `apply` computes both, so full + deltas
is full bit for bit, or it is refused.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from gr.checkpoint.checksums import find_damage, read_sums, sum_lines, write_sums
from gr.checkpoint.layout import METADATA, SHARED, CheckpointFolder, read_progress
from gr.checkpoint.only_writer import only_writer
from gr.checkpoint.saved_rows import SavedRows, StateDigest, blocks, tables_of
from gr.checkpoint.streaming import BLOCK_BYTES
from gr.errors import CheckpointError, DamagedCheckpointError
from gr.files import digests, make_folder, read_json, sync, write_text

MANIFEST = "manifest.json"
FILES = "files"
DELTA_FORMAT = 2
# Before the name of a table: its changed rows, in order; the raw ids that had a row before and have none now.
ROWS, DELETED = "rows.", "deleted."
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Manifest(BaseModel):
    """number: place in the chain, from 1. since, step: of the checkpoints. before, after: SHA-256 of their tensors.

    rows: changed ones by table. deleted: raw ids that lost their row, by table with dynamic ids. parts: files of
    changed rows, in the order of the rows of each table. names: of all files of the checkpoint that are no tensors;
    those that changed are under files/.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: int = DELTA_FORMAT
    number: int
    since: int
    step: int
    before: str
    after: str
    rows: dict[str, int]
    deleted: dict[str, int]
    parts: tuple[str, ...]
    names: tuple[str, ...]


def publish_delta(checkpoint: Path, since: int, out: Path) -> tuple[Path, Manifest]:
    """Writes what changed from step `since` to `checkpoint`, both of one run, as the next delta of the folder `out`.

    Whenever it is killed, the delta is whole or not there. Raises CheckpointError where one of the two is not there or
    damaged, where they are of different models, or where `since` is not the step at which the last delta ends.
    """
    step = read_progress(checkpoint)["step"]
    base = checkpoint_before(checkpoint, since, step)
    make_folder(out, CheckpointError)
    with only_writer(out, ".0*"):
        earlier = deltas_in(out)
        previous = read_manifest(earlier[-1]) if earlier else None
        if previous is not None and previous.step != since:
            raise CheckpointError(
                f"{earlier[-1]} ends at step {previous.step}: --since {previous.step} continues it, or name a new --out"
            )
        for each in (base, checkpoint):
            require_whole(each)
        number = previous.number + 1 if previous else 1
        draft, final = out / f".{number:06d}", out / f"{number:06d}"
        draft.mkdir()
        old, new = SavedRows(base), SavedRows(checkpoint)
        require_same_model(old, new)
        changes = _Changes(draft)
        before, after = StateDigest(old), StateDigest(new)
        _compare(old, new, changes, before, after)
        if previous is not None and before.hexdigest() != previous.after:
            raise CheckpointError(f"{base} is not the step {since} that {earlier[-1]} ends at: name a new --out")
        manifest = Manifest(
            number=number,
            since=since,
            step=step,
            before=before.hexdigest(),
            after=after.hexdigest(),
            rows=changes.rows,
            deleted=changes.deleted,
            parts=tuple(changes.parts),
            names=_copy_changed_files(base, checkpoint, draft / FILES),
        )
        write_text(draft / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
        finish(draft, final)
    return final, manifest


def deltas_in(folder: Path) -> list[Path]:
    """The deltas of a folder, in order."""
    return sorted(each for each in folder.iterdir() if each.name.isdecimal()) if folder.is_dir() else []


def read_manifest(delta: Path) -> Manifest:
    """The manifest of a whole delta. Raises DamagedCheckpointError for any other folder, OSError where it may pass."""
    if damage := find_damage(delta, (MANIFEST,), 0, 1):
        raise DamagedCheckpointError(f"{damage}; restore that file, or publish again into a new folder")
    raw = read_json(delta / MANIFEST, DamagedCheckpointError, "publish again into a new folder")
    if raw.get("format") != DELTA_FORMAT:
        raise CheckpointError(f"{delta} has format {raw.get('format')}, this release reads {DELTA_FORMAT}")
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        raise DamagedCheckpointError(f"{delta / MANIFEST}: is not what gr wrote ({error})") from error


def check_chain(base: Path, deltas: Sequence[Path]) -> list[Manifest]:
    """The manifests of deltas that follow one another, the first of them `base`. Raises CheckpointError otherwise."""
    manifests = [read_manifest(delta) for delta in deltas]
    step, name, number, state = read_progress(base)["step"], base, None, None
    for delta, manifest in zip(deltas, manifests, strict=True):
        if number is not None and manifest.number <= number:
            raise CheckpointError(f"{delta} is given again or too late: number {manifest.number} after {number}")
        if manifest.since != step or (number is not None and manifest.number != number + 1):
            missing = "" if number is None else f" (number {manifest.number} after {number})"
            raise CheckpointError(
                f"{delta} does not follow {name}: it changes step {manifest.since}, and that is step {step}{missing}; "
                "give every delta once, in order"
            )
        if state is not None and manifest.before != state:
            raise CheckpointError(f"{delta} does not follow {name}: it is of another run")
        step, name, number, state = manifest.step, delta, manifest.number, manifest.after
    return manifests


def checkpoint_before(checkpoint: Path, since: int, step: int) -> Path:
    """The checkpoint of step `since` of the run that `checkpoint`, of a later `step`, is of. Raises CheckpointError."""
    folder = CheckpointFolder(checkpoint.parent)
    if since >= step:
        raise CheckpointError(f"--since {since}: {checkpoint} is step {step}, name a step before it")
    if since not in folder.steps():
        kept = ", ".join(map(str, folder.steps())) or "none"
        raise CheckpointError(
            f"--since {since}: there is no checkpoint of step {since} under {folder.path} (steps: {kept}); "
            "checkpoint.keep_last says how many stay"
        )
    return folder.final(since)


def require_same_model(old: SavedRows, new: SavedRows) -> None:
    """Raises CheckpointError where two checkpoints have other tensors."""
    for name in sorted(old.tensors.keys() | new.tensors.keys()):
        shapes = [
            f"{tuple(each.tensors[name].size)} {each.dtype(name)}" if name in each.tensors else "none"
            for each in (old, new)
        ]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{new.path} is of another form than {old.path}: {name} is {shapes[1]}, it was {shapes[0]}; "
                "publish it whole"
            )


def _compare(old: SavedRows, new: SavedRows, changes: "_Changes", before: StateDigest, after: StateDigest) -> None:
    tables = tables_of(new)
    for table in tables.values():
        for first, last in table.blocks(new):
            changed = torch.zeros(last - first, dtype=torch.bool)
            was, values = dict[str, Tensor](), dict[str, Tensor]()
            for name in table.in_one:
                was[name], values[name] = (table.read(each, name, first, last) for each in (old, new))
                before.add(name, was[name])
                after.add(name, values[name])
                if not torch.equal(_bits(was[name]), _bits(values[name])):
                    changed |= (_bits(was[name]) != _bits(values[name])).any(1)
            rows = changed.nonzero().squeeze(1)
            if len(rows):
                changes.add_rows(table.name, rows + first, {name: value[rows] for name, value in values.items()})
            if table.raw_id in was:
                changes.add_deleted(table.name, was[table.raw_id][rows], values[table.raw_id][rows])
    for name in new.tensors.keys() - {name for table in tables.values() for name in table.in_one}:
        earlier, value = old.read(name), new.read(name)
        before.add(name, earlier)
        after.add(name, value)
        if not torch.equal(_bits(earlier), _bits(value)):
            changes.add({name: value})
    changes.flush()


def changed_weights(old: SavedRows, new: SavedRows, table: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of a table of which a bit of the weights changed: ids, int64 [N], and weights [N, D], block by block."""
    name = f"tables.{table}.weight"
    for first, last in blocks(new.tensors[name].size[0], new.row_bytes(name)):
        was, now = old.read(name, first, last), new.read(name, first, last)
        ids = (_bits(was) != _bits(now)).any(1).nonzero().squeeze(1)
        if len(ids):
            yield ids + first, now[ids]


def _bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor as integers: NaN equals itself, and 0 is not -0."""
    return tensor.view(_BITS[tensor.dtype.itemsize])


class _Changes:
    """Writes changed rows and tensors as safetensors files of some 64 MB."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[str, int] = {}
        self.deleted: dict[str, int] = {}
        self.parts: list[str] = []
        self._held: dict[str, list[Tensor]] = {}
        self._bytes = 0

    def add_rows(self, table: str, rows: Tensor, values: dict[str, Tensor]) -> None:
        self.rows[table] = self.rows.get(table, 0) + len(rows)
        self.add({ROWS + table: rows, **values})

    def add_deleted(self, table: str, was: Tensor, now: Tensor) -> None:
        """was, now: raw ids of rows of whole sets, which ids never leave; below 0 where a row has none."""
        gone = was[(was >= 0) & ~torch.isin(was, now)]
        self.deleted[table] = self.deleted.get(table, 0) + len(gone)
        if len(gone):
            self.add({DELETED + table: gone})

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._held.setdefault(name, []).append(value)
            self._bytes += value.nbytes
        if self._bytes >= BLOCK_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._held:
            self.parts.append(f"changed-{len(self.parts):05d}.safetensors")
            whole = {name: values[0] if len(values) == 1 else torch.cat(values) for name, values in self._held.items()}
            save_file(whole, self.folder / self.parts[-1])
            self._held, self._bytes = {}, 0


def _copy_changed_files(base: Path, checkpoint: Path, to: Path) -> tuple[str, ...]:
    """Copies what is no tensor and is not the same in `base`; returns the names of all of it."""
    before, now = read_sums(base), read_sums(checkpoint)
    names = sorted(name for name in now if not name.endswith(".distcp") and name != METADATA)
    for name in names:
        if before.get(name) != now[name]:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint / name, to / name)
    return tuple(names)


def require_whole(checkpoint: Path) -> None:
    """Raises DamagedCheckpointError where a file of a checkpoint is not what was written."""
    if damage := find_damage(checkpoint, SHARED, 0, 1):
        raise DamagedCheckpointError(f"{damage}; restore that file, or take another checkpoint")


def finish(draft: Path, final: Path) -> None:
    """Gives a folder its sums and its name, with all that is in it on disk."""
    sums = digests(draft)
    write_sums(draft, [sum_lines(sums)])
    for name in (*sums, "."):
        sync(draft / name)
    draft.rename(final)
    sync(final.parent)
