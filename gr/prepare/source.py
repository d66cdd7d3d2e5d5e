"""Places of raw data: a folder, a zip archive, or a URL to a zip archive."""

import hashlib
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from gr.errors import DataError
from gr.logging import get_logger

log = get_logger(__name__)
_BLOCK_BYTES = 1 << 20


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
        """Bytes, uncompressed."""
        if self.member is None:
            return self.path.stat().st_size
        with zipfile.ZipFile(self.path) as archive:
            return archive.getinfo(self.member).file_size

    def open(self) -> BinaryIO:
        """A stream of bytes. Raises DataError when it cannot be opened."""
        try:
            if self.member is None:
                return self.path.open("rb")
            return zipfile.ZipFile(self.path).open(self.member)  # type: ignore[return-value]
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(f"{self}: cannot be opened: {error}") from error


@dataclass(frozen=True)
class Source:
    """A local folder, archive or single file."""

    path: Path

    def find(self, name: str) -> SourceFile | None:
        """The file of that name: at the top of the folder or one folder down, or anywhere in the archive."""
        if self.path.is_dir():
            for place in [self.path / name, *sorted(self.path.glob(f"*/{name}"))]:
                if place.is_file():
                    return SourceFile(place)
            return None
        if self.path.name == name:
            return SourceFile(self.path)
        if not zipfile.is_zipfile(self.path):
            return None
        with zipfile.ZipFile(self.path) as archive:
            members = [member for member in archive.namelist() if member.rsplit("/", 1)[-1] == name]
        return SourceFile(self.path, min(members, key=len)) if members else None

    def require(self, name: str) -> SourceFile:
        """The file `find` finds. DataError if there is none."""
        file = self.find(name)
        if file is None:
            raise DataError(
                f"{self.path}: has no {name}; give the unpacked folder, or the zip archive, of the data set"
            )
        return file


def open_source(location: str, *, sha256: str | None, download_to: Path) -> Source:
    """A local path as it is; a URL after download into the folder download_to.

    sha256: expected digest of the downloaded or given file; a mismatch is a DataError. Without it the digest of a
    download is logged and not checked: MovieLens publishes MD5 sums only, and Amazon none.
    """
    if not location.startswith(("http://", "https://")):
        path = Path(location)
        if not path.exists():
            raise DataError(
                f"{path}: no such file or folder; give --source the folder, zip archive or URL of the raw data"
            )
        if sha256 is not None and path.is_dir():
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
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if expected is None:
        log.warning("%s: sha256 %s, not checked; pass it as --sha256 to check it the next time", path, digest)
    elif digest != expected.lower():
        raise DataError(f"{path}: sha256 is {digest}, --sha256 says {expected}; the file is damaged or another version")
