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

# The values of rank 0 and of rank 1 in each case.
PAIRS = [([3, 1, 2], [7]), ([], [5, 6]), ([4], []), ([], []), ([1, 2], [3, 4])]


def exchange(process: World) -> dict[str, list]:
    own = [torch.tensor(pair[process.rank], dtype=torch.int64) for pair in PAIRS]
    return {
        "gathered": [[part.tolist() for part in process.all_gather_variable(values)] for values in own],
        "dtypes": [part.dtype for part in process.all_gather_variable(torch.ones(process.rank, dtype=torch.float16))],
        # 2^24 + 1 has no float32: the sums must be float64.
        "sums": process.all_reduce_sum([float(process.rank + 1), 2.0**24 + process.rank, 0.1]),
        "ints": process.all_gather_ints([process.rank, 2**60 + process.rank]),
        # Rank 0 keeps one row and sends two, rank 1 sends one and keeps none.
        "rows": process.exchange_rows(
            torch.tensor([[[1, 2], [3, 4], [5, 6]], [[7, 8]]][process.rank]),
            [[1, 2], [1, 0]][process.rank],
            [[1, 1], [2, 0]][process.rank],
        ).tolist(),
        "no columns": process.exchange_rows(torch.empty(2, 0), [1, 1], [1, 1]).shape,
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
    process = World(0, 1, 0, 1, torch.device("cpu"))
    values = torch.tensor([2, 3])
    assert process.all_gather_variable(values)[0] is values
    assert process.all_reduce_sum([1.5]) == [1.5] and process.all_gather_ints([4]) == [[4]]
    assert process.is_main and not World(1, 2, 1, 2, torch.device("cpu")).is_main


def test_world_of_one_process_makes_and_ends_its_group(alone: World) -> None:
    assert (alone.rank, alone.size, alone.local_rank, alone.local_size) == (0, 1, 0, 1)
    assert alone.device == torch.device("cpu") and dist.get_backend() == "gloo"


def test_the_group_ends_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(RuntimeError, match="of the body"), world("cpu"):
        raise RuntimeError("of the body")
    assert not dist.is_initialized()


class TestJoining:
    """Mistakes of a launcher are reported before anything hangs."""

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
        message = self.joined(monkeypatch, RANK="0", WORLD_SIZE="3", LOCAL_WORLD_SIZE="3")
        assert (
            message.startswith("3 ranks on ")
            and "2 CPUs: start at most 2 a host (torchrun --nproc-per-node 2)" in message
        )

    def test_a_switch_lets_ranks_share_cpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
        monkeypatch.setenv("GR_MORE_RANKS_THAN_CPUS", "1")
        check_room("cpu", 3)

    def test_more_ranks_than_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        with pytest.raises(ConfigError, match="has 1 GPUs: start at most 1 a host"):
            check_room("cuda", 2)

    def test_half_an_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        message = self.joined(monkeypatch, RANK="1", WORLD_SIZE="2", LOCAL_WORLD_SIZE="1")
        assert message.startswith(
            "WORLD_SIZE is set, but MASTER_ADDR or MASTER_PORT is not: start the ranks with torchrun"
        )

    @pytest.mark.parametrize("address", ["127.0.0.1", "no-such-host.invalid"])
    def test_no_way_to_rank_0(self, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
        where = {"MASTER_ADDR": address, "MASTER_PORT": "1"}
        message = self.joined(monkeypatch, TransientError, RANK="1", WORLD_SIZE="2", LOCAL_WORLD_SIZE="1", **where)
        assert f"cannot reach rank 0 at {address}:1: " in message and "--rdzv-endpoint" in message

    def test_a_port_that_is_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            message = self.joined(monkeypatch, TransientError, RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="1", **where)
        assert message.startswith("rank 0 on ") and "cannot join: " in message and port in message


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
        """A job on GPU machines with the CPU build must not train on CPU silently."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(gr.dist.glob, "glob", lambda _: [f"/dev/nvidia{i}" for i in range(devices)])
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert gpus_out_of_reach() == lost
        warnings: list[str] = []
        monkeypatch.setattr(gr.dist.log, "warning", lambda message, *values: warnings.append(message % values))
        with world("cpu"):
            assert not warnings, "the device was requested"
        with world("auto"):
            assert len(warnings) == bool(lost)
        if lost:
            assert f"offers {lost} GPU(s), and torch {torch.__version__} can use none" in warnings[0]

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


@pytest.mark.parametrize("threads", ["1025", "99999", "9" * 5000])
def test_more_threads_than_openmp_can_start_are_refused(threads: str) -> None:
    with pytest.raises(ConfigError, match=r"^OMP_NUM_THREADS=[0-9]{4,40}: at most 1024; unset it"):
        cpu_threads(1, 2, {"OMP_NUM_THREADS": threads})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *((name, text) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE") for text in ("x", "-1")),
        ("WORLD_SIZE", "0"),
        ("RANK", "1"),  # of a world of one
        ("LOCAL_RANK", "1"),
    ],
)
def test_a_place_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    for other in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match=f"^{name}={text} in the environment: expected a whole number"), world("cpu"):
        pass


def test_a_port_that_is_none_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    for name, text in (place | {"MASTER_PORT": "x"}).items():
        monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match=r"^MASTER_PORT=x in the environment"), world("cpu"):
        pass


def threads_after(process: World) -> int:
    use_cpu_well(process)
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
    """The pages that the kernel cleared in a new process that makes and frees a tensor of 32 MiB 16 times."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after < before / 4, (before, after)
