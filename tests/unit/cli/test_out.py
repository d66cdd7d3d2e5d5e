"""Files and folders of options that cannot be written are one line with the reason, and no traceback."""

from pathlib import Path

import pytest
from safetensors import SafetensorError

from gr.cli import main
from gr.cli.out import writes
from gr.errors import ConfigError, ServingError
from gr.serving.package.writer import writing


def test_a_failure_that_may_pass_stays_what_it_is() -> None:
    said = r"^--out=x: cannot be written: File too large; make room, or name another$"
    with pytest.raises(ConfigError, match=said), writes("out", Path("x")):
        raise OSError(27, "File too large")
    said = r"^--out=x: cannot be written: Error while serializing: Read-only file system; make room, or name another$"
    with pytest.raises(ConfigError, match=said), writes("out", Path("x"), SafetensorError):
        raise SafetensorError("Error while serializing: Read-only file system")
    with pytest.raises(OSError, match="Stale"), writes("out", Path("x")):
        raise OSError(116, "Stale file handle")


@pytest.mark.parametrize("under", ["file", "file/in"])
def test_a_file_where_the_package_would_be(tmp_path: Path, under: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ServingError) as error, writing(tmp_path / under):
        pass
    assert "\n" not in str(error.value) and "; name another" in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [["apply", "base", "delta"], ["import-hf", "llama"], ["publish", "c", "--since", "1"]]
)
def test_a_folder_that_cannot_be_made(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "in" / "out"
    monkeypatch.setattr("gr.checkpoint.resolve", Path)
    assert main([*command, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --out={out}: cannot be written: ") and said.count("\n") == 1
