"""What may not be saved, and what may not be loaded. Saving and loading as such: tests/distributed/test_resume.py."""

import errno
import hashlib
import json
import logging
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystem

from gr.checkpoint import CheckpointStore, ModelState, checksums, load_state, resume_from, verify
from gr.checkpoint import store as store_module
from gr.checkpoint.layout import FORMAT
from gr.dist import World
from gr.errors import CheckpointError, DamagedCheckpointError
from tests.support.ranks import run_ranks


class NoTables:
    def entries(self) -> list:
        return []

    def set_steps(self, steps: int) -> None: ...


def state_of(value: float) -> ModelState:
    return ModelState({"w": torch.nn.Parameter(torch.full((3,), value))}, None, NoTables())


def saved(folder: Path, world: World, state: ModelState) -> CheckpointStore:
    store = CheckpointStore(folder, state, "config: 1\n", world, asynchronous=False)
    store.save({"step": 7, "data": {}}, keep_last=2)
    return store


DATA = "__0_0.distcp"


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("name", [DATA, ".metadata", "progress.json", "config.yaml"])
@pytest.mark.parametrize("damage", [flip_a_bit, cut_off, Path.unlink])
def test_every_damage_is_found_and_named(
    tmp_path: Path, alone: World, name: str, damage: Callable[[Path], None]
) -> None:
    path = saved(tmp_path, alone, state_of(2.0)).folder.final(7)
    verify(path, alone)
    damage(path / name)
    with pytest.raises(DamagedCheckpointError) as refusal:
        verify(path, alone)
    assert str(path / name) in str(refusal.value)


def test_files_without_a_checksum_are_refused(tmp_path: Path, alone: World) -> None:
    path = saved(tmp_path, alone, state_of(2.0)).folder.final(7)
    (path / "SHA256SUMS").unlink()
    with pytest.raises(DamagedCheckpointError, match="has no checksum"):
        verify(path, alone)


def test_a_checkpoint_of_an_earlier_release_is_refused_by_its_format(tmp_path: Path, alone: World) -> None:
    """Before its configuration, whose keys were others, is read."""
    path = saved(tmp_path, alone, state_of(2.0)).folder.final(7)
    progress = json.loads((path / "progress.json").read_text())
    del progress["format"]
    before = hashlib.sha256((path / "progress.json").read_bytes()).hexdigest()
    (path / "progress.json").write_text(json.dumps(progress))
    after = hashlib.sha256((path / "progress.json").read_bytes()).hexdigest()
    (path / "SHA256SUMS").write_text((path / "SHA256SUMS").read_text().replace(before, after))
    with pytest.raises(CheckpointError, match=r"step-00000007 has format 1, this release reads format 2: train again"):
        resume_from(tmp_path, None, alone)


def test_artifacts_are_those_of_the_start(tmp_path: Path, alone: World) -> None:
    store = CheckpointStore(
        tmp_path, state_of(2.0), "config: 1\n", alone, asynchronous=False, artifacts={"schema.json": b"{}"}
    )
    store.save({"step": 7, "data": {}}, keep_last=2)
    assert (store.folder.final(7) / "schema.json").read_bytes() == b"{}"
    verify(store.folder.final(7), alone)


def test_sha256sum_reads_the_sums(tmp_path: Path, alone: World) -> None:
    path = saved(tmp_path, alone, state_of(2.0)).folder.final(7)
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{name}: OK" for name in (DATA, ".metadata", "config.yaml", "progress.json")]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, alone: World, asynchronous: bool) -> None:
    """A limit on the size of files stands in for it: the write fails part of the way through."""
    state = ModelState({"w": torch.nn.Parameter(torch.ones(1 << 16))}, None, NoTables())
    store = CheckpointStore(tmp_path, state, "config: 1\n", alone, asynchronous=asynchronous)
    store.save({"step": 7, "data": {}}, keep_last=2)
    store.finish()
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, before[1]))
    try:
        with pytest.raises(CheckpointError) as refusal:
            store.save({"step": 8, "data": {}}, keep_last=2)
            store.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    said = str(refusal.value)
    assert (
        said.startswith(f"step 8 cannot be saved under {tmp_path}: ")
        and "step-00000007. Make room there" in said
        and "File too large" in said
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000007"], "half of one would fill the disk"
    verify(store.folder.final(7), alone)


class AskedToStop(BaseException): ...


def test_a_load_that_a_signal_ends_is_no_damage(tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, alone, state_of(1.0)).folder.final(7)

    def asked(*_: object) -> None:
        raise AskedToStop

    monkeypatch.setattr(store_module.dcp.FileSystemReader, "read_data", asked)
    with pytest.raises(AskedToStop):
        load_state(path, state_of(0.0), alone)


def refuse_data(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Every write to and read of a data file by torch ends so."""

    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise OSError(number, "broken")

    real = FileSystem.create_stream

    @contextmanager
    def broken(self: FileSystem, path: Path, mode: str):
        with real(self, path, mode) as stream:
            yield Broken() if str(path).endswith(".distcp") else stream

    monkeypatch.setattr(FileSystem, "create_stream", broken)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_write_that_may_work_next_time_is_no_failure(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch, asynchronous: bool, number: int
) -> None:
    store = CheckpointStore(tmp_path, state_of(1.0), "config: 1\n", alone, asynchronous=asynchronous)
    refuse_data(monkeypatch, number)
    with pytest.raises(CheckpointError if number == errno.EACCES else OSError) as refusal:
        store.save({"step": 8, "data": {}}, keep_last=2)
        store.finish()
    assert "broken" in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_an_older_checkpoint_that_cannot_be_removed_is_a_warning(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """NFS keeps a file that someone reads, as .nfsXXXX."""
    store = saved(tmp_path, alone, state_of(1.0))

    def busy(path: Path, **_: object) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(shutil, "rmtree", busy)
    monkeypatch.setattr(logging.getLogger("gr"), "propagate", True)
    store.save({"step": 8, "data": {}}, keep_last=1)
    assert store.folder.steps() == [8] and store.complete == 8
    assert "an older checkpoint cannot be removed: [Errno 39] Directory not empty" in caplog.text
    monkeypatch.undo()
    CheckpointStore(tmp_path, state_of(1.0), "config: 1\n", alone, asynchronous=False)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000008"]


def test_a_file_that_cannot_be_read_just_now_is_no_damage(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path, alone, state_of(1.0)).folder.final(7)
    number = errno.ESTALE

    def stale(_: Path) -> str:
        raise OSError(number, "broken")

    monkeypatch.setattr(checksums, "sha256_of", stale)
    with pytest.raises(OSError, match="broken"):
        verify(path, alone)
    number = errno.EACCES
    with pytest.raises(CheckpointError, match=r"cannot be read: .*broken; mend") as refusal:
        verify(path, alone)
    assert not isinstance(refusal.value, DamagedCheckpointError), "it is not set aside"
    refuse_data(monkeypatch, errno.ESTALE)
    with pytest.raises(OSError, match="broken"):
        load_state(path, state_of(0.0), alone)


def failing_on_rank_1(world: World, folder: Path, asynchronous: bool, number: int) -> str:
    def fail(*_: object) -> str:
        raise OSError(number, "broken")

    if world.rank == 1:
        store_module.sum_lines = fail
    store = CheckpointStore(folder, state_of(1.0), "config: 1\n", world, asynchronous=asynchronous)
    try:
        store.save({"step": 8, "data": {}}, keep_last=1)
        store.finish()
    except (CheckpointError, OSError) as error:
        return type(error).__name__
    return "saved"


@pytest.mark.parametrize(
    ("number", "asynchronous", "raised"),
    [(errno.EIO, False, "OSError"), (errno.EIO, True, "OSError"), (errno.ENOSPC, False, "CheckpointError")],
)
def test_all_ranks_know_why_one_could_not_save(tmp_path: Path, number: int, asynchronous: bool, raised: str) -> None:
    assert run_ranks(failing_on_rank_1, 2, tmp_path, asynchronous, number) == [raised] * 2
    assert list(tmp_path.iterdir()) == []


def full_on_rank_1(world: World, folder: Path) -> str:
    state = ModelState({name: torch.nn.Parameter(torch.ones(1 << 16)) for name in "ab"}, None, NoTables())
    store = CheckpointStore(folder, state, "config: 1\n", world, asynchronous=False)
    if world.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        store.save({"step": 8, "data": {}}, keep_last=1)
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_all_ranks_know_that_the_disk_of_one_is_full(tmp_path: Path) -> None:
    """torch's own error for it does not say so, and nothing but its text comes to the other ranks."""
    for said in run_ranks(full_on_rank_1, 2, tmp_path):
        assert ": File too large; there is no checkpoint yet. Make room there" in said


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_save_is_timed(tmp_path: Path, alone: World, asynchronous: bool) -> None:
    store = CheckpointStore(tmp_path, state_of(1.0), "config: 1\n", alone, asynchronous=asynchronous)
    assert store.seconds is None
    store.save({"step": 8, "data": {}}, keep_last=1)
    store.finish()
    assert store.seconds is not None and 0 < store.seconds < 60


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, alone: World) -> None:
    state = state_of(1.0)
    store = saved(tmp_path, alone, state)
    with torch.no_grad():
        state.dense["w"][1] = torch.inf
    with pytest.raises(
        CheckpointError, match=r"not finite after step 8 \(dense\.w\): not saved; the last good .*step-00000007"
    ):
        store.save({"step": 8, "data": {}}, keep_last=2)
    assert store.folder.steps() == [7]


def test_a_checkpoint_loads_into_the_live_tensors(tmp_path: Path, alone: World) -> None:
    store = saved(tmp_path, alone, state_of(2.0))
    fresh = state_of(0.0)
    assert load_state(store.folder.final(7), fresh, alone) == {"format": FORMAT, "ranks": 1, "step": 7, "data": {}}
    assert torch.equal(fresh.dense["w"].detach(), torch.full((3,), 2.0))


@pytest.mark.parametrize("broken", ["progress.json", ".metadata", "__0_0.distcp"])
def test_a_damaged_checkpoint_is_one_clear_error(tmp_path: Path, alone: World, broken: str) -> None:
    path = saved(tmp_path, alone, state_of(2.0)).folder.final(7)
    (path / broken).write_bytes((path / broken).read_bytes()[:5])
    with pytest.raises(CheckpointError, match=r"cannot be (read|loaded).*remove it"):
        load_state(path, state_of(0.0), alone)
