"""Row blocks: views of the tensors, read back as they were, also where training went on meanwhile."""

import hashlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharding_spec import ShardMetadata
from torch.distributed.checkpoint.metadata import MetadataIndex

from gr.checkpoint import CheckpointStore, ModelState, load_state, streaming, verify
from gr.checkpoint.metadata import read_metadata
from gr.checkpoint.streaming import BlockPlanner
from gr.dist import World
from gr.errors import CheckpointError

ROWS, DIM = 50, 8


class Entry:
    is_rowwise, column_widths = False, (DIM,)

    def __init__(self, name: str, value: ShardedTensor) -> None:
        self.name, self.value = name, value


class OneTable:
    """A table in the middle of a larger storage, as a TorchRec kernel has it, in two row shards of this rank."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.storage = torch.arange(100 * DIM).view(100, DIM).to(dtype)
        bounds = [(0, 30), (30, ROWS)]
        shards = [ShardMetadata([first, 0], [last - first, DIM], "rank:0/cpu") for first, last in bounds]
        rows = [self.storage[10 + first : 10 + last] for first, last in bounds]
        self.rows = self.storage[10 : 10 + ROWS]
        self.value = ShardedTensor._init_from_local_shards_and_global_metadata(
            [Shard(part, shard) for part, shard in zip(rows, shards, strict=True)],
            ShardedTensorMetadata(shards, torch.Size([ROWS, DIM]), TensorProperties(dtype=dtype)),
            process_group=dist.group.WORLD,
        )

    def entries(self) -> list[Entry]:
        return [Entry("items.weight", self.value)]

    def set_steps(self, steps: int) -> None: ...


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 256)


def state_of(dtype: torch.dtype = torch.float32) -> ModelState:
    dense = {"w": torch.nn.Parameter(torch.arange(200.0)), "turned": torch.nn.Parameter(torch.randn(40, 30).t())}
    return ModelState(dense, None, OneTable(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_blocks_come_back_as_the_tensors_were(
    tmp_path: Path, alone: World, small_blocks: None, dtype: torch.dtype, asynchronous: bool
) -> None:
    state, fresh = state_of(dtype), state_of(dtype)
    store = CheckpointStore(tmp_path, state, "config: 1\n", alone, asynchronous=asynchronous)
    rows, dense = state.tables.rows.clone(), {name: p.detach().clone() for name, p in state.dense.items()}
    for step in (1, 2):  # the second asynchronous save copies into the buffers of the first
        store.save({"step": step, "data": {}}, keep_last=2)
        state.tables.storage.add_(asynchronous)  # training goes on
    store.finish()
    path = store.folder.final(2)
    verify(path, alone)
    chunks = read_metadata(path).state_dict_metadata["tables.items.weight"].chunks
    assert len(chunks) >= 4 and max(chunk.sizes.numel() for chunk in chunks) * dtype.itemsize <= 256
    fresh.tables.storage.zero_()
    load_state(path, fresh, alone)
    assert torch.equal(fresh.tables.rows, rows + asynchronous)
    assert all(torch.equal(p.detach(), dense[name]) for name, p in fresh.dense.items())


def test_what_is_written_is_the_memory_of_the_tensors(alone: World, small_blocks: None) -> None:
    state = state_of()
    planner = BlockPlanner({"tables": {"items.weight": state.tables.value}}, is_main=True)
    block = planner.lookup_object(MetadataIndex("tables.items.weight", (8, 0)))
    assert block.data_ptr() == state.tables.rows[8].data_ptr()
    assert block.untyped_storage().size() == block.nbytes, "torch.save writes the whole storage"


def test_the_sums_are_those_of_the_files(tmp_path: Path, alone: World, small_blocks: None) -> None:
    store = CheckpointStore(tmp_path, state_of(), "config: 1\n", alone, asynchronous=False)
    store.save({"step": 1, "data": {}}, keep_last=2)
    file = store.folder.final(1) / "__0_0.distcp"
    line = f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"
    assert line in (store.folder.final(1) / "SHA256SUMS").read_text()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_an_asynchronous_save_of_what_is_not_finite_fails_in_finish(tmp_path: Path, alone: World, bad: float) -> None:
    state = state_of()
    state.tables.rows[17, 3] = bad
    store = CheckpointStore(tmp_path, state, "config: 1\n", alone, asynchronous=True)
    store.save({"step": 1, "data": {}}, keep_last=2)
    with pytest.raises(CheckpointError, match=r"not finite after step 1 \(tables\.items\.weight\): not saved"):
        store.finish()
    assert not list(tmp_path.iterdir())


def test_a_sum_that_overflows_is_no_fault(tmp_path: Path, alone: World) -> None:
    state = state_of()
    state.tables.rows.fill_(torch.finfo(torch.float32).max)
    store = CheckpointStore(tmp_path, state, "config: 1\n", alone, asynchronous=False)
    store.save({"step": 1, "data": {}}, keep_last=2)
    assert store.folder.steps() == [1]


@pytest.mark.parametrize("stride", [0, 1, 7])
def test_one_element_is_saved_whatever_its_stride(stride: int) -> None:
    """A rank's part of a split parameter may be one element, of a stride that says nothing."""
    one = torch.as_strided(torch.tensor([2.5, 3.0]), (1,), (stride,))
    owned = streaming.with_own_storage(one)
    assert owned.tolist() == [2.5] and owned.untyped_storage().nbytes() == 4


def test_a_part_without_elements_is_saved() -> None:
    """Of a parameter that has fewer rows than the ranks that share it."""
    empty = torch.zeros(4)[4:]
    assert streaming.with_own_storage(empty).shape == (0,) and streaming.octets(empty).numel() == 0
