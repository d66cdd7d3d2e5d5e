"""World: sums and gathers over ranks, and the device of a process."""

import os
import platform
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import gr.dist
from gr.dist import World, check_room, cpu_threads, gpus_out_of_reach, resolve_device, use_cpu_well, world
from gr.errors import ConfigError, GRError, TransientError
from tests.support.ranks import run_ranks

# What rank 0 and rank 1 hold, each time.
PAIRS = [([3, 1, 2], [7]), ([], [5, 6]), ([4], []), ([], []), ([1, 2], [3, 4])]


def exchange(here: World) -> dict[str, list]:
    own = [torch.tensor(pair[here.rank], dtype=torch.int64) for pair in PAIRS]
    return {
        "gathered": [[part.tolist() for part in here.all_gather_variable(values)] for values in own],
        "dtypes": [part.dtype for part in here.all_gather_variable(torch.ones(here.rank, dtype=torch.float16))],
        # 2^24 + 1 has no float32: the sums must be float64.
        "sums": here.all_reduce_sum([float(here.rank + 1), 2.0**24 + here.rank, 0.1]),
        "ints": here.all_gather_ints([here.rank, 2**60 + here.rank]),
        # Rank 0 keeps one row and sends two, rank 1 sends one and keeps none.
        "rows": here.exchange_rows(
            torch.tensor([[[1, 2], [3, 4], [5, 6]], [[7, 8]]][here.rank]),
            [[1, 2], [1, 0]][here.rank],
            [[1, 1], [2, 0]][here.rank],
        ).tolist(),
        "no columns": here.exchange_rows(torch.empty(2, 0), [1, 1], [1, 1]).shape,
    }


def test_two_ranks() -> None:
    first, second = run_ranks(exchange, 2)
    assert first["rows"] == [[1, 2], [7, 8]] and second["rows"] == [[3, 4], [5, 6]]
    for got in (first, second):
        assert got["no columns"] == (2, 0)
        assert got["gathered"] == [list(pair) for pair in PAIRS]
        assert got["dtypes"] == [torch.float16, torch.float16]
        assert got["sums"] == [3.0, 2.0**25 + 1, 0.2]
        assert got["ints"] == [[0, 2**60], [1, 2**60 + 1]]


def test_one_rank_needs_no_process_group() -> None:
    here = World(0, 1, 0, 1, torch.device("cpu"))
    values = torch.tensor([2, 3])
    assert here.all_gather_variable(values)[0] is values
    assert here.all_reduce_sum([1.5]) == [1.5] and here.all_gather_ints([4]) == [[4]]
    assert here.is_main and not World(1, 2, 1, 2, torch.device("cpu")).is_main


def test_world_of_one_process_makes_and_ends_its_group(alone: World) -> None:
    assert (alone.rank, alone.size, alone.local_rank, alone.local_size) == (0, 1, 0, 1)
    assert alone.device == torch.device("cpu") and dist.get_backend() == "gloo"


def test_the_group_ends_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(RuntimeError, match="of the body"), world("cpu"):
        raise RuntimeError("of the body")
    assert not dist.is_initialized()


class TestJoining:
    """What a launcher can get wrong, said before anything hangs."""

    def joined(self, monkeypatch: pytest.MonkeyPatch, raised: type[GRError] = ConfigError, **environment: str) -> str:
        monkeypatch.setattr(gr.dist, "CONNECT_SECONDS", 0.2)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(raised) as refusal, world("cpu"):
            pass
        return str(refusal.value)

    def test_more_ranks_than_cpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
        said = self.joined(monkeypatch, RANK="0", WORLD_SIZE="3", LOCAL_WORLD_SIZE="3")
        assert said.startswith("3 ranks on ") and "2 CPUs: start at most 2 a host (torchrun --nproc-per-node 2)" in said

    def test_more_ranks_than_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        with pytest.raises(ConfigError, match="has 1 GPUs: start at most 1 a host"):
            check_room("cuda", 2)

    def test_half_an_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        said = self.joined(monkeypatch, RANK="1", WORLD_SIZE="2", LOCAL_WORLD_SIZE="1")
        assert said.startswith(
            "WORLD_SIZE is set, but MASTER_ADDR or MASTER_PORT is not: start the ranks with torchrun"
        )

    @pytest.mark.parametrize("address", ["127.0.0.1", "no-such-host.invalid"])
    def test_no_way_to_rank_0(self, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
        where = {"MASTER_ADDR": address, "MASTER_PORT": "1"}
        said = self.joined(monkeypatch, TransientError, RANK="1", WORLD_SIZE="2", LOCAL_WORLD_SIZE="1", **where)
        assert f"cannot reach rank 0 at {address}:1: " in said and "--rdzv-endpoint" in said

    def test_a_port_that_is_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            said = self.joined(monkeypatch, TransientError, RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="1", **where)
        assert said.startswith("rank 0 on ") and "cannot join: " in said and port in said


class TestDevice:
    def test_cuda_without_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ConfigError, match="device=cuda, but torch sees no GPU here: set device=cpu"):
            resolve_device("cuda")
        assert resolve_device("auto", 3) == resolve_device("cpu", 3) == torch.device("cpu")

    @pytest.mark.parametrize(
        ("visible", "devices", "lost"),
        [("0,1", 0, 2), ("", 8, 0), ("-1", 8, 0), (None, 8, 8), (None, 0, 0)],
    )
    def test_gpus_that_torch_cannot_use(
        self, monkeypatch: pytest.MonkeyPatch, visible: str | None, devices: int, lost: int
    ) -> None:
        """A job on GPU machines with the CPU build must not train there without a word."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(gr.dist.glob, "glob", lambda _: [f"/dev/nvidia{i}" for i in range(devices)])
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert gpus_out_of_reach() == lost
        said: list[str] = []
        monkeypatch.setattr(gr.dist.log, "warning", lambda message, *values: said.append(message % values))
        with world("cpu"):
            assert not said, "as was asked for"
        with world("auto"):
            assert len(said) == bool(lost)
        if lost:
            assert f"offers {lost} GPU(s), and torch {torch.__version__} can use none" in said[0]

    def test_with_gpus_a_rank_takes_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert resolve_device("auto", 3) == resolve_device("cuda", 3) == torch.device("cuda", 3)
        assert resolve_device("cpu", 3) == torch.device("cpu")


@pytest.mark.parametrize(
    ("ranks", "cores", "environment", "threads"),
    [
        (1, 2, {}, 2),
        (2, 2, {}, 1),
        (4, 2, {}, 1),
        (1, 100, {}, 100),
        (8, 100, {}, 12),
        (8, 100, {"OMP_NUM_THREADS": "3"}, 3),
        (8, 100, {"OMP_NUM_THREADS": "1"}, 1),
        (8, 100, {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, 12),
        (8, 100, {"OMP_NUM_THREADS": "4", "TORCHELASTIC_RUN_ID": "none"}, 4),
        (8, 100, {"OMP_NUM_THREADS": "many"}, 12),
    ],
)
def test_threads_of_a_rank(ranks, cores, environment, threads):
    assert cpu_threads(ranks, cores, environment) == threads


def threads_after(here: World) -> int:
    use_cpu_well(here)
    return torch.get_num_threads()


def test_the_share_of_a_rank_is_set(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)))
    assert run_ranks(threads_after, 2) == [3, 3]


FAULTS = """
import resource, torch
from gr.dist import World, use_cpu_well

for prepare in (lambda: None, lambda: use_cpu_well(World(0, 1, 0, 1, torch.device("cpu")))):
    prepare()
    for _ in range(16):
        torch.ones(1 << 23)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(16):
        torch.ones(1 << 23)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_freed_memory_is_kept() -> None:
    """Pages that the kernel had to clear for a tensor of 32 MiB, made and freed 16 times, in a new process."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after < before / 4, (before, after)
