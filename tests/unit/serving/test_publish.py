"""New weights in a package that is served: without compiling, in one step, and refused where the form is another."""

import fcntl
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gr
import gr.serving.export as exporting
from gr.cli import main
from gr.config.export import load_export_config
from gr.errors import ServingError, TransientError
from gr.serving.package.layout import CODE, WEIGHTS, read_current
from gr.serving.package.version import Version
from tests.support.served_click import as_rows, click_columns, train_click

pytestmark = pytest.mark.slow
# The values with which click_package was exported.
SAME = ("tables.dtype=int8", "tables.own.c2=fp16", "gate.rows=0")


@pytest.fixture(scope="module")
def other_run(served_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another run of the same form."""
    return train_click(served_run.parent / "data", tmp_path_factory.mktemp("other") / "run", seed=5)


@pytest.fixture
def package(click_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may change, in a process that does not compile."""

    def refused(*_: object) -> None:
        raise AssertionError("compiles")

    monkeypatch.setattr(exporting, "_compile", refused)
    return Path(shutil.copytree(click_package, tmp_path / "package"))


def scores(version: Version) -> np.ndarray:
    score = version.verbs["score"]
    return score.run([score.encode(click_columns(64))])[0]["score"]


def test_new_weights_are_served_without_compiling(package: Path, served_run: Path, other_run: Path) -> None:
    first = Version.open(package)
    before = scores(first)
    exported = exporting.publish(other_run, package)
    second = Version.open(package)
    assert second.name == exported.stored.weights != first.name
    assert np.abs(scores(second) - gr.load(other_run).score(as_rows(click_columns(64)))).max() < 2e-3
    assert np.abs(scores(second) - before).max() > 1e-2
    assert np.array_equal(scores(first), before), "a version that is open does not change"
    assert [each.weights for each in read_current(package).previous] == [first.name]
    assert exporting.publish(served_run, package).stored.weights == first.name, "the same weights have the same name"
    assert np.array_equal(scores(Version.open(package)), before)


def test_export_takes_the_code_of_the_same_form(package: Path, other_run: Path) -> None:
    """And the types of the rows decide on the form."""
    config = load_export_config([*SAME, "unknown=reject"])
    exported = exporting.export(other_run, package, config)
    assert not exported.compiled and Version.open(package).manifest.export.unknown == "reject"
    with pytest.raises(AssertionError, match="compiles"):
        exporting.export(other_run, package, load_export_config(["tables.dtype=int4", "gate.rows=0"]))


def test_earlier_versions_are_kept_up_to_a_number(package: Path, served_run: Path, other_run: Path) -> None:
    for run, keep in ((other_run, 1), (served_run, 1), (other_run, 0)):
        exporting.export(run, package, load_export_config([*SAME, f"keep={keep}"]))
        folders = [path.name for path in (package / WEIGHTS).iterdir()]
        assert len(folders) == 1 + keep and read_current(package).weights in folders
    assert len(list((package / CODE).iterdir())) == 1


def test_another_form_is_refused_by_name(package: Path, served_run: Path, tmp_path: Path) -> None:
    before = read_current(package)
    other = train_click(served_run.parent / "data", tmp_path / "run", model={"top": [12, 1]}, trainer={"steps": 2})
    with pytest.raises(ServingError) as error:
        exporting.publish(other, package)
    message = str(error.value)
    assert "model top is [12, 1], the package has [10, 1]" in message and "gr export --checkpoint" in message
    assert "\n" not in message and read_current(package) == before


def test_one_writer_at_a_time(package: Path, other_run: Path) -> None:
    with (package / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(TransientError, match="another gr export or gr publish writes it"):
            exporting.publish(other_run, package)


def test_the_commands(package: Path, other_run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["publish", str(other_run), "--to", str(package)]) == 0
    assert re.search(r"package: serves step-00000012-[0-9a-f]{8}\n$", capsys.readouterr().out)
    assert main(["export", "--checkpoint", str(other_run), "--out", str(package), *SAME]) == 0
    assert "the form is the same" in capsys.readouterr().out
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    for wrong, fault in (
        (["export", str(other_run), "--out", str(tmp_path / "full")], "is no package, it has thesis.txt"),
        (["export", str(other_run), "--out", str(package), "tables.dtype=int3"], "tables.dtype"),
        (["publish", str(other_run), "--to", str(tmp_path)], "is no package, since it has no current.json"),
        (["publish", str(other_run), "--to", str(package), "tables.dtype=int8"], "values are those of `gr export`"),
        (["publish", str(tmp_path), "--to", str(package)], "no checkpoint there"),
    ):
        assert main(wrong) == 2
        message = capsys.readouterr().err
        assert fault in message and message.count("\n") == 1, message


def test_killed_writers_leave_a_whole_version(click_package: Path, served_run: Path, other_run: Path) -> None:
    """A dozen of the hundred kills of benchmarks/killed_writers.py: at file operations from the first to the last."""
    runs = [str(served_run), str(other_run)]
    options = ["--package", str(click_package), "--kills", "12"]
    command = [sys.executable, "-m", "benchmarks.killed_writers", *runs, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = re.search(r"12 kills, whole each time: {'before': (\d+), 'new': (\d+)}", done.stdout)
    assert counts and int(counts[1]) + int(counts[2]) == 12 and int(counts[2]) > 0, done.stdout
