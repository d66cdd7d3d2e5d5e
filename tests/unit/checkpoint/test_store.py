"""What may not be saved, and what may not be loaded. Saving and loading as such: tests/distributed/test_resume.py."""

from pathlib import Path

import pytest
import torch

from gr.checkpoint import CheckpointStore, ModelState, load_state
from gr.dist import World
from gr.errors import CheckpointError


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
