"""Folders, archives and compressed files of raw data: what is damaged or ambiguous is one line, with its file."""

import bz2
import gzip
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest

from gr.cli import main
from gr.data.dataset import Dataset

RATINGS = "".join(f"{1 + n % 3}\t{1 + n % 7}\t{1 + n % 5}\t{100 + n}\n" for n in range(200)).encode()
MOVIES = b"".join(b"%d|x\n" % n for n in range(1, 8))


def zipped(path: Path, *members: str) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in members:
            archive.writestr(member, MOVIES if member.endswith("item") else RATINGS)
    return path


def prepare(source: Path, out: Path) -> int:
    return main(["prepare", "movielens-100k", "--source", str(source), "--out", str(out)])


def test_every_flipped_bit_of_an_archive_is_an_error_or_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = zipped(tmp_path / "good.zip", "u.data", "u.item").read_bytes()
    assert prepare(tmp_path / "good.zip", tmp_path / "whole") == 0
    part = (tmp_path / "whole" / "part-00000.parquet").read_bytes()
    for place in range(0, len(good), 23):
        content = bytearray(good)
        content[place] ^= 1 << place % 8
        (tmp_path / "bad.zip").write_bytes(content)
        code = prepare(tmp_path / "bad.zip", tmp_path / f"{place}")
        error = capsys.readouterr().err
        if code == 0:
            assert (tmp_path / f"{place}" / "part-00000.parquet").read_bytes() == part
        else:
            assert code == 2 and error.startswith(f"error: {tmp_path}/bad.zip") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("field", "value", "problem"), [(8, 1, "is encrypted"), (10, 99, "compression method is not supported")]
)
def test_members_that_cannot_be_read(
    tmp_path: Path, field: int, value: int, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """field: place in an entry of the directory; it is 2 bytes earlier in a member's own header."""
    content = bytearray(zipped(tmp_path / "x.zip", "u.data", "u.item").read_bytes())
    for mark, place in ((b"PK\x03\x04", field - 2), (b"PK\x01\x02", field)):
        for start in range(len(content)):
            if content.startswith(mark, start):
                content[start + place] = value
    (tmp_path / "x.zip").write_bytes(content)
    assert prepare(tmp_path / "x.zip", tmp_path / "out") == 2
    assert problem in capsys.readouterr().err


def test_two_files_of_one_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(zipped(tmp_path / "x.zip", "a/u.data", "bb/u.data", "u.item"), tmp_path / "out") == 2
    assert "has u.data 2 times" in capsys.readouterr().err
    folder = tmp_path / "raw"
    folder.mkdir()
    for name, content in (("u.data", RATINGS), ("u.data.gz", gzip.compress(RATINGS)), ("u.item", MOVIES)):
        (folder / name).write_bytes(content)
    assert prepare(folder, tmp_path / "out") == 2
    assert "u.data.gz; keep one" in capsys.readouterr().err


def test_compressed_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "u.item").write_bytes(MOVIES)
    (tmp_path / "u.data").write_bytes(RATINGS)
    assert prepare(tmp_path, tmp_path / "plain") == 0
    (tmp_path / "u.data").unlink()
    packed = {
        ".gz": gzip.compress(RATINGS[:900]) + gzip.compress(RATINGS[900:]),
        ".bz2": bz2.compress(RATINGS),
        ".zst": pa.Codec("zstd").compress(RATINGS, asbytes=True),
    }
    for ending, content in packed.items():
        file = tmp_path / f"u.data{ending}"
        file.write_bytes(content)
        assert prepare(tmp_path, tmp_path / ending) == 0
        assert len({(tmp_path / f / "part-00000.parquet").read_bytes() for f in ("plain", ending)}) == 1
        for damaged in (content[:-9], b"x" + content[1:]):
            file.write_bytes(damaged)
            assert prepare(tmp_path, tmp_path / "out") == 2
            assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {file}: ")
        file.unlink()


@pytest.mark.parametrize(
    "content",
    [b"\xef\xbb\xbf" + RATINGS, RATINGS + b"\n\r\n\n", RATINGS.replace(b"\n", b"\r\n"), RATINGS[:-1]],
    ids=["byte order mark", "blank last lines", "CR LF", "no last LF"],
)
def test_text_as_programs_write_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "u.item").write_bytes(content[:3] * content.startswith(b"\xef") + MOVIES)
    (tmp_path / "u.data").write_bytes(content)
    assert prepare(tmp_path, tmp_path / "out") == 0
    assert Dataset.open(tmp_path / "out").schema.events == 200


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (RATINGS.replace(b"\n", b"\r"), "its lines end in CR alone"),
        (RATINGS.decode().encode("utf-16"), "line 1, column user: "),
        (b"1" * 3_000_000, "has a line, or blank lines, of more than 1048576 bytes"),
        (b"\n" * 3_000_000, "has a line, or blank lines, of more than 1048576 bytes"),
        (b"PAR1" + RATINGS, "is a Parquet, ORC or zip file; wanted lines of text"),
        (RATINGS[:-5] + b"\r5\n", "line 200: has 3 fields"),
        (b"x" * 500_000 + b"\n", "' and 499920 bytes more"),
    ],
)
def test_text_that_is_none(tmp_path: Path, content: bytes, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "u.item").write_bytes(MOVIES)
    (tmp_path / "u.data").write_bytes(content)
    assert prepare(tmp_path, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}/u.data" in error and problem in error and len(error) < 500


def test_repeated_events_are_counted(tmp_path: Path) -> None:
    (tmp_path / "u.item").write_bytes(MOVIES)
    (tmp_path / "u.data").write_bytes(RATINGS + RATINGS[: RATINGS.index(b"\n") + 1] * 2)
    assert prepare(tmp_path, tmp_path / "out") == 0
    schema = Dataset.open(tmp_path / "out").schema
    assert schema.events == 202 and "; 2 events repeat the user, item and time of another" in schema.source
