"""full + deltas == full, bit for bit, whatever world they were saved in; and what is refused."""

import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharding_spec import ShardMetadata

from gr.checkpoint import CheckpointStore, ModelState, saved_rows, streaming
from gr.checkpoint.apply import apply_deltas
from gr.checkpoint.delta import deltas_in, publish_delta, read_manifest
from gr.checkpoint.saved_rows import SavedRows
from gr.checkpoint.streaming import octets
from gr.cli import main
from gr.dist import World
from gr.errors import CheckpointError
from gr.ops.id_table import EMPTY
from tests.support.ranks import run_ranks

ROWS, DIM, WAYS = 96, 4, 8


class Entry:
    is_rowwise, column_widths = False, (DIM,)

    def __init__(self, name: str, value: ShardedTensor) -> None:
        self.name, self.value = name, value


class Tables:
    """A table of half rows with its row-wise state and its map of dynamic ids, cut by rows over the ranks."""

    def __init__(self, world: World) -> None:
        random = torch.Generator().manual_seed(0)
        self.whole = {
            "items.weight": torch.randn(ROWS, DIM, generator=random).half(),
            "items.sum": torch.zeros(ROWS, 1),
            "items/ids.raw_id": torch.arange(ROWS).view(-1, WAYS),
            "items/ids.seen": torch.zeros(ROWS // WAYS, 3 * WAYS, dtype=torch.uint8),
        }
        self.whole["items/ids.raw_id"][:, 0] = EMPTY
        self.values = {name: self._sharded(tensor, world) for name, tensor in self.whole.items()}

    def _sharded(self, tensor: torch.Tensor, world: World) -> ShardedTensor:
        bounds = [len(tensor) * rank // world.size for rank in range(world.size + 1)]
        shards = [
            ShardMetadata([first, 0], [last - first, tensor.shape[1]], f"rank:{rank}/cpu")
            for rank, (first, last) in enumerate(pairwise(bounds))
        ]
        own = Shard(tensor[bounds[world.rank] : bounds[world.rank + 1]], shards[world.rank])
        metadata = ShardedTensorMetadata(shards, tensor.size(), TensorProperties(dtype=tensor.dtype))
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            [own], metadata, process_group=dist.group.WORLD
        )

    def entries(self) -> list[Entry]:
        return [Entry(name, value) for name, value in self.values.items()]

    def set_steps(self, steps: int) -> None: ...


def write_steps(world: World, folder: Path, seed: int, steps: int = 3) -> None:
    """Checkpoints 10, 20, ... of a run that gives a few rows to other ids and changes its dense part each time."""
    dense = torch.nn.Parameter(torch.zeros(5))
    tables = Tables(world)
    store = CheckpointStore(folder, ModelState({"w": dense}, None, tables), "config: 1\n", world, asynchronous=False)
    random = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        store.save({"step": 10 * step, "data": {"position": step}}, keep_last=9)
        rows = torch.randperm(ROWS, generator=random)[:7]
        for name in ("items.weight", "items.sum"):
            tensor = tables.whole[name]
            tensor[rows] = torch.randn(len(rows), tensor.shape[1], generator=random).mul(99).to(tensor.dtype)
        owned = rows[rows % WAYS > 0]
        tables.whole["items/ids.raw_id"].view(-1)[owned] = 1000 * step + owned
        tables.whole["items/ids.seen"][step, step] += 1
        dense.data[step] = step


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (saved_rows, streaming):
        monkeypatch.setattr(module, "BLOCK_BYTES", 100)


@pytest.fixture
def run(tmp_path: Path, alone: World) -> Path:
    write_steps(alone, tmp_path / "run", seed=1)
    return tmp_path / "run"


@pytest.fixture
def deltas(run: Path, tmp_path: Path) -> list[Path]:
    for since in (10, 20):
        publish_delta(run / f"step-{since + 10:08d}", since, tmp_path / "deltas")
    return deltas_in(tmp_path / "deltas")


def bits(path: Path) -> dict[str, bytes]:
    saved = SavedRows(path)
    return {name: bytes(octets(saved.read(name)).numpy()) for name in saved.tensors}


def others(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in ("progress.json", "config.yaml")}


@pytest.mark.parametrize("size", [1, 3])
def test_full_and_deltas_is_full(tmp_path: Path, size: int) -> None:
    """The base may be of another world than the checkpoints that the deltas were made from."""
    run_ranks(write_steps, 2, tmp_path / "run", 1)
    run_ranks(write_steps, size, tmp_path / "elsewhere", 1)
    for since in (10, 20):
        publish_delta(tmp_path / f"run/step-{since + 10:08d}", since, tmp_path / "deltas")
    deltas = deltas_in(tmp_path / "deltas")
    apply_deltas(tmp_path / "elsewhere/step-00000010", deltas, tmp_path / "full")
    last = tmp_path / "run/step-00000030"
    assert bits(tmp_path / "full") == bits(last) and others(tmp_path / "full") == others(last)
    apply_deltas(tmp_path / "run/step-00000010", deltas[:1], tmp_path / "half")
    apply_deltas(tmp_path / "half", deltas[1:], tmp_path / "again")
    assert bits(tmp_path / "again") == bits(last)


def test_a_delta_has_the_changed_rows_and_no_others(run: Path, tmp_path: Path) -> None:
    _, manifest = publish_delta(run / "step-00000020", 10, tmp_path / "deltas")
    assert manifest.rows == {"items": 7, "items/ids.seen": 1} and manifest.number == 1
    again, manifest = publish_delta(run / "step-00000030", 20, tmp_path / "deltas")
    assert (again.name, manifest.number, manifest.since, manifest.step) == ("000002", 2, 20, 30)


def test_rows_can_be_followed_by_raw_id(run: Path, deltas: list[Path]) -> None:
    """Somebody who keeps vectors by raw id drops the deleted ids and takes the changed ones."""

    def vectors(raw_id: torch.Tensor, weight: torch.Tensor) -> dict[int, list[float]]:
        return {raw: row for raw, row in zip(raw_id.flatten().tolist(), weight.tolist(), strict=True) if raw != EMPTY}

    def saved(step: int) -> dict[int, list[float]]:
        rows = SavedRows(run / f"step-{step:08d}")
        return vectors(rows.read("tables.items/ids.raw_id"), rows.read("tables.items.weight"))

    kept = saved(10)
    for delta in deltas:
        deleted, changed = [], {}
        for part in read_manifest(delta).parts:
            tensors = load_file(delta / part)
            if "deleted.items" in tensors:
                deleted += tensors["deleted.items"].tolist()
            if "rows.items" in tensors:
                changed |= vectors(tensors["tables.items/ids.raw_id"], tensors["tables.items.weight"])
        assert 0 < len(deleted) == read_manifest(delta).deleted["items"]
        kept = {raw: row for raw, row in kept.items() if raw not in deleted} | changed
    assert kept == saved(30)


def refusal(base: Path, deltas: list[Path], out: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        apply_deltas(base, deltas, out)
    assert not out.exists() and not list(out.parent.glob(".full*")), "nothing is left of it"
    return str(error.value)


def test_gaps_repeats_and_other_orders_are_refused_by_name(run: Path, deltas: list[Path], tmp_path: Path) -> None:
    first, second = deltas
    base, out = run / "step-00000010", tmp_path / "full"
    assert refusal(base, [second], out).startswith(f"{second} does not follow {base}: it changes step 20, and that is")
    assert f"{first} is given again or too late: number 1 after 1" in refusal(base, [first, first], out)
    assert f"{second} does not follow {base}" in refusal(base, [second, first], out)
    assert f"{second} is given again or too late" in refusal(base, [first, second, second], out)


def test_a_delta_of_another_run_is_refused(run: Path, deltas: list[Path], tmp_path: Path, alone: World) -> None:
    write_steps(alone, tmp_path / "other", seed=2, steps=4)
    with pytest.raises(
        CheckpointError, match=r"step-00000030 is not the step 30 that .*000002 ends at: name a new --out"
    ):
        publish_delta(tmp_path / "other/step-00000040", 30, tmp_path / "deltas")
    publish_delta(tmp_path / "other/step-00000030", 20, tmp_path / "others")
    shutil.copytree(tmp_path / "others/000001", tmp_path / "others/000002")
    assert "is not the step 20" in refusal(
        tmp_path / "run/step-00000020", [tmp_path / "others/000001"], tmp_path / "full"
    )


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_damage_is_refused_by_name(
    run: Path, deltas: list[Path], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    files = [path for path in deltas[0].rglob("*") if path.is_file() and path.name != "SHA256SUMS"]
    assert len(files) > 2
    for file in files:
        content = file.read_bytes()
        damage(file)
        assert str(file) in refusal(run / "step-00000010", deltas, tmp_path / "full")
        file.write_bytes(content)
    flip(run / "step-00000010/__0_0.distcp")
    assert "__0_0.distcp: is not what was written" in refusal(run / "step-00000010", deltas, tmp_path / "full")


@pytest.mark.parametrize(
    ("since", "why"),
    [
        (5, "there is no checkpoint of step 5 under"),
        (30, "is step 30, name a step before it"),
        (10, "000002 ends at step 30: --since 30 continues it"),
    ],
)
def test_what_cannot_be_published(run: Path, deltas: list[Path], tmp_path: Path, since: int, why: str) -> None:
    with pytest.raises(CheckpointError, match=why):
        publish_delta(run / "step-00000030", since, tmp_path / "deltas")
    assert deltas_in(tmp_path / "deltas") == deltas


def test_the_commands(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    deltas, checkpoint = tmp_path / "deltas", run / "step-00000030"
    assert main(["publish", str(checkpoint), "--since", "10", "--out", str(deltas)]) == 0
    assert capsys.readouterr().out.startswith(f"{deltas}/000001: steps 10 to 30, ")
    base, delta = str(run / "step-00000010"), str(deltas / "000001")
    assert main(["apply", base, delta, "--out", str(tmp_path / "full")]) == 0
    assert "full: step 30, every bit as published" in capsys.readouterr().out
    assert main(["apply", base, delta, delta, "--out", str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["publish", str(checkpoint), "--since", "10"]) == 2
    assert "give --to PACKAGE for a version of it, or --since STEP with --out" in capsys.readouterr().err
