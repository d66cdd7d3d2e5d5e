"""Writes packages: code, weights, and which of them are served. Whenever it is killed, what is served is whole."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from gr.checkpoint.only_writer import LOCK, only_writer
from gr.errors import ServingError
from gr.files import digests, make_folder, sync, write_json, write_text
from gr.serving.package.layout import (
    CODE,
    CURRENT,
    DRAFT,
    SOURCES,
    WEIGHTS,
    Current,
    Stored,
    dumped,
    read_current,
    require_private,
)

_OWN = {CODE, WEIGHTS, CURRENT, f".{CURRENT}", SOURCES, f".{SOURCES}", LOCK}


@dataclass(frozen=True)
class PackageWriter:
    """A package that this process alone writes. Get it from `writing`."""

    path: Path

    @property
    def current(self) -> Current | None:
        return read_current(self.path) if (self.path / CURRENT).is_file() else None

    def draft(self, part: str) -> Path:
        """An empty folder to write code or weights into. part: CODE or WEIGHTS."""
        folder = self.path / part / DRAFT
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(mode=0o755)
        return folder

    def commit(self, part: str, name: str) -> Path:
        """Gives the draft its final name, with all that is in it on disk; it takes the place of what had the name."""
        draft, final = self.path / part / DRAFT, self.path / part / name
        if final.exists() and digests(final) == digests(draft):
            return final
        for path in sorted(draft.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
            sync(path)
        sync(draft)
        if final.exists():
            shutil.rmtree(final)
        draft.rename(final)
        sync(final.parent)
        return final

    def sources(self) -> dict[str, str]:
        """The checkpoint that each version is made of. Raises ServingError where the file is not gr's."""
        path = self.path / SOURCES
        if not path.exists():
            return {}
        try:
            return TypeAdapter(dict[str, str]).validate_json(path.read_bytes())
        except ValidationError:
            raise ServingError(f"{path}: is not what gr wrote; remove it, and publish whole") from None

    def serve(self, stored: Stored, keep: int, source: str) -> None:
        """Makes a version the one that is served, and removes all but the `keep` that were served before it.

        source: the SHA-256 of the list of checksums of its checkpoint.
        """
        before = self.current
        earlier = (
            () if before is None else (Stored(**before.model_dump(include=set(Stored.model_fields))), *before.previous)
        )
        kept = tuple(each for each in dict.fromkeys(earlier) if each.weights != stored.weights)[:keep]
        sources = self.sources() | {stored.weights: source}
        write_json(self.path / SOURCES, {each.weights: sources.get(each.weights, "") for each in (stored, *kept)})
        write_text(self.path / CURRENT, dumped(Current(**stored.model_dump(), previous=kept)))
        sync(self.path)
        versions = (stored, *kept)
        for part, names in ((WEIGHTS, {each.weights for each in versions}), (CODE, {each.code for each in versions})):
            for folder in (self.path / part).iterdir():
                if folder.name not in names:
                    shutil.rmtree(folder)


@contextmanager
def writing(path: Path) -> Iterator[PackageWriter]:
    """The package at `path`, made where there is none, with what an earlier writer left half done removed.

    Raises ServingError where there is something else or others can write it, TransientError where another process
    writes it.
    """
    if path.is_dir():
        if strange := sorted(each.name for each in path.iterdir() if each.name not in _OWN):
            raise ServingError(f"{path}: is no package, it has {strange[0]}; name a folder that is empty or a package")
    elif path.exists() or path.is_symlink():
        raise ServingError(f"{path}: is no folder; name another --out")
    for folder in (path, path / CODE, path / WEIGHTS):
        if not folder.exists():
            make_folder(folder, ServingError)
            folder.chmod(0o755)  # whatever the umask
        require_private(folder)
    with only_writer(path, f"*/{DRAFT}"):
        yield PackageWriter(path)
