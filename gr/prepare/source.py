"""Places of raw data: a folder, a zip archive, or a URL to a zip archive; files may be gzip, bzip2 or zstd."""

import lzma
import re
import struct
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
from tqdm import tqdm

from gr.errors import DataError, TransientError
from gr.files import is_transient, sha256_of
from gr.logging import get_logger

log = get_logger(__name__)
_BLOCK_BYTES = 1 << 20
# What zipfile, the decompressors and Arrow raise for damaged, encrypted or unknown content.
_FAULTS = (
    *(OSError, EOFError, RuntimeError, ValueError, MemoryError),
    *(struct.error, zipfile.BadZipFile, zlib.error, lzma.LZMAError, pa.ArrowException),
)
_CODECS = {".gz": ("gzip", b"\x1f\x8b"), ".bz2": ("bz2", b"BZh"), ".zst": ("zstd", b"\x28\xb5\x2f\xfd")}
_RATIO = 5  # bytes of text that a byte of such a file holds, about


@contextmanager
def reading(place: object) -> Iterator[None]:
    """Turns failures to read `place` into a DataError that names it, or a TransientError where the disk failed."""
    try:
        yield
    except _FAULTS as error:
        if is_transient(error):
            raise TransientError(f"{place}: cannot be read: {error}") from error
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{place}: cannot be read, it is damaged or cut off: {reason}") from error


@dataclass(frozen=True)
class SourceFile:
    """One file in a folder, or one member of an archive."""

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}:{self.member}"

    @property
    def name(self) -> str:
        return (self.member or self.path.name).rsplit("/", 1)[-1]

    @property
    def size(self) -> int:
        """Bytes of its content, estimated where it is compressed by itself."""
        with reading(self):
            if self.member is None:
                size = self.path.stat().st_size
            else:
                with zipfile.ZipFile(self.path) as archive:
                    size = archive.getinfo(self.member).file_size
        return size * _RATIO if self.name.endswith(tuple(_CODECS)) else size

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """A stream of its content. DataError where it cannot be opened, and for every fault of reading in the block."""
        with reading(self), ExitStack() as opened:
            stream: Any
            if self.member is None:
                stream = opened.enter_context(self.path.open("rb"))
            else:
                archive = opened.enter_context(zipfile.ZipFile(self.path))
                stream = opened.enter_context(archive.open(self.member))
            start = stream.read(4)
            stream.seek(0)
            for ending, (codec, magic) in _CODECS.items():
                if start.startswith(magic):
                    stream = opened.enter_context(pa.CompressedInputStream(pa.PythonFile(stream, "r"), codec))
                elif self.name.endswith(ending) and start:
                    raise DataError(f"{self}: is no {codec} file, though its name says so")
            yield cast(BinaryIO, stream)


def natural_order(file: Path) -> list[int | str]:
    """A key that sorts part-2 before part-10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(file))]


@dataclass(frozen=True)
class Source:
    """A local folder, archive or single file."""

    path: Path

    def find(self, name: str) -> SourceFile | None:
        """The file of that name, or of that name and .gz, .bz2 or .zst: at the top of the folder, or else one folder
        down, or anywhere in the archive. DataError where there are several.
        """
        names = {name, *(name + ending for ending in _CODECS)}
        with reading(self.path):
            if self.path.is_dir():
                at_top = [self.path / each for each in names]
                below = [place for each in names for place in self.path.glob(f"*/{each}")]
                places = [p for p in at_top if p.is_file()] or [p for p in below if p.is_file()]
                files = [SourceFile(place) for place in sorted(places)]
            elif self.path.name in names:
                files = [SourceFile(self.path)]
            elif zipfile.is_zipfile(self.path):
                with zipfile.ZipFile(self.path) as archive:
                    members = [member for member in archive.namelist() if member.rsplit("/", 1)[-1] in names]
                files = [SourceFile(self.path, member) for member in members]
            else:
                files = []
        if len(files) > 1:
            raise DataError(f"{self.path}: has {name} {len(files)} times: {', '.join(map(str, files))}; keep one")
        return files[0] if files else None

    def require(self, *names: str) -> SourceFile:
        """The first of these files that `find` finds. DataError if there is none."""
        for name in names:
            if (file := self.find(name)) is not None:
                return file
        damaged = "" if self.path.is_dir() or zipfile.is_zipfile(self.path) else ", and is no zip archive, or damaged"
        raise DataError(
            f"{self.path}: has no {' or '.join(names)}{damaged}; give the unpacked folder, or the zip archive, of the "
            "data set"
        )


def open_source(location: str, *, sha256: str | None, download_to: Path) -> Source:
    """A local path as it is; a URL after download into the folder download_to.

    sha256: expected digest of the downloaded or given file; a mismatch is a DataError. Without it the digest of a
    download is logged and not checked: MovieLens publishes MD5 sums only, and Amazon none.
    """
    if not location.startswith(("http://", "https://")):
        path = Path(location)
        with reading(path):
            exists, is_folder = path.exists(), path.is_dir()
        if not exists:
            raise DataError(
                f"{path}: no such file or folder; give --source the folder, zip archive or URL of the raw data"
            )
        if sha256 is not None and is_folder:
            raise DataError(
                f"{path}: --sha256 is the digest of one file, and this is a folder; give the archive or drop it"
            )
        if sha256 is not None:
            _check(path, sha256)
        return Source(path)
    path = download_to / (Path(urllib.parse.urlparse(location).path).name or "download")
    _download(location, path)
    _check(path, sha256)
    return Source(path)


def _download(url: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with closing(urllib.request.urlopen(url, timeout=60)) as answer, part.open("wb") as out:
            total = int(answer.headers.get("Content-Length") or 0) or None
            with tqdm(total=total, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
                while block := answer.read(_BLOCK_BYTES):
                    out.write(block)
                    bar.update(len(block))
            if total is not None and out.tell() != total:
                raise DataError(f"{url}: gave {out.tell()} of {total} bytes; try again")
        part.replace(path)
    except (urllib.error.URLError, OSError) as error:
        raise DataError(f"{url}: download failed: {error}; download it yourself and give --source the file") from error
    finally:
        part.unlink(missing_ok=True)


def _check(path: Path, expected: str | None) -> None:
    with reading(path):
        digest = sha256_of(path)
    if expected is None:
        log.warning("%s: sha256 %s, not checked; pass it as --sha256 to check it the next time", path, digest)
    elif digest != expected.lower():
        raise DataError(f"{path}: sha256 is {digest}, --sha256 says {expected}; the file is damaged or another version")
