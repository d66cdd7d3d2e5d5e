"""What may not be saved, and what may not be loaded. Saving and loading as such: tests/distributed/test_resume.py."""

import resource
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gr.checkpoint import CheckpointStore, ModelState, load_state, verify
from gr.dist import World
from gr.errors import CheckpointError, DamagedCheckpointError


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
    (path / "rank-0.sha256").unlink()
    with pytest.raises(DamagedCheckpointError, match="has no checksum"):
        verify(path, alone)


def test_sha256sum_reads_the_sums(tmp_path: Path, alone: World) -> None:
    path = saved(tmp_path, alone, state_of(2.0)).folder.final(7)
    done = subprocess.run(["sha256sum", "-c", "rank-0.sha256"], cwd=path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{name}: OK" for name in (DATA, "config.yaml", "progress.json", ".metadata")]


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
    assert said.startswith(f"step 8 cannot be saved under {tmp_path}: ") and "step-00000007. Make room there" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000007"], "half of one would fill the disk"
    verify(store.folder.final(7), alone)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, alone: World) -> None:
    state = state_of(1.0)
    store = saved(tmp_path, alone, state)
    with torch.no_grad():
        state.dense["w"][1] = torch.inf
    with pytest.raises(CheckpointError, match=r"not finite after step 8: not saved; the last good .*step-00000007"):
        store.save({"step": 8, "data": {}}, keep_last=2)
    assert store.folder.steps() == [7]


def test_a_checkpoint_loads_into_the_live_tensors(tmp_path: Path, alone: World) -> None:
    store = saved(tmp_path, alone, state_of(2.0))
    fresh = state_of(0.0)
    assert load_state(store.folder.final(7), fresh, alone) == {"step": 7, "data": {}}
    assert torch.equal(fresh.dense["w"].detach(), torch.full((3,), 2.0))


@pytest.mark.parametrize("broken", ["progress.json", ".metadata", "__0_0.distcp"])
def test_a_damaged_checkpoint_is_one_clear_error(tmp_path: Path, alone: World, broken: str) -> None:
    path = saved(tmp_path, alone, state_of(2.0)).folder.final(7)
    (path / broken).write_bytes((path / broken).read_bytes()[:5])
    with pytest.raises(CheckpointError, match=r"cannot be (read|loaded).*remove it"):
        load_state(path, state_of(0.0), alone)
