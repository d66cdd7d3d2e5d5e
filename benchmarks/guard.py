"""Whether this tree is slower than an older commit: both in one interleaved run, each in a process of its own.

    python -m benchmarks.guard [COMMIT] [--rounds 7] [--case NAME] [--tolerance 0.05] [--data FOLDER] [--isa avx2]

COMMIT (HEAD): checked out into a temporary folder. Both trees do the same small work in turns, on one thread and in CPU
seconds; a round gives one ratio, old over new. The exit code is 1 where a case is slower by more than the tolerance in
three quarters of the rounds. A case that the older commit cannot do is named and not compared. train_step says how far
the losses of the trees are apart. --data: histories that `gr prepare` wrote, instead of generated ones.
--isa avx2 builds the C++ operators without AVX-512, and forbids it to torch, MKL and oneDNN.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

Work = Callable[[], object]  # a float is a loss
ROUND_SECONDS = 0.3
BATCHES = 8
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
ROWS, USERS = 1 << 16, 4096
TREE = Path(__file__).parent.parent
_open = ExitStack()  # the process group lives as long as the process


# --- the work: each function imports what it needs, since the older commit may lack it --------------------------------


def attention(folder: Path) -> Work:
    import torch

    from gr.ops.hstu_attention import hstu_attention

    draw = torch.Generator().manual_seed(0)
    offsets = torch.arange(17) * 150
    q, k, v = (torch.randn(2400, 2, 32, generator=draw, requires_grad=True) for _ in range(3))
    return lambda: hstu_attention(q, k, v, offsets, max_length=150, divisor=150.0).sum().backward()


def sampled_logits(folder: Path) -> Work:
    import torch

    from gr.ops.sampled_logits import sampled_logits

    draw = torch.Generator().manual_seed(0)
    queries = torch.randn(1500, 50, generator=draw, requires_grad=True)
    items = torch.randn(4000, 50, generator=draw, requires_grad=True)
    index = torch.randint(0, 4000, (1500, 129), generator=draw)
    return lambda: sampled_logits(queries, items, index).sum().backward()


def sampled_softmax(folder: Path) -> Work:
    import torch

    from gr.ops.sampled_logits.softmax import sampled_softmax

    draw = torch.Generator().manual_seed(0)
    queries = torch.randn(1500, 50, generator=draw, requires_grad=True)
    items = torch.randn(4000, 50, generator=draw, requires_grad=True)
    positive, negative = (torch.randint(0, 4000, shape, generator=draw) for shape in ((1500,), (1500, 128)))
    return lambda: sampled_softmax(queries, items, positive, negative, scale=20.0).mean().backward()


def hstu_layers(folder: Path) -> Work:
    import torch

    from gr.config.towers import HSTUConfig
    from gr.sequence import JaggedSequence
    from gr.towers.hstu import HSTU

    torch.manual_seed(0)
    tower, offsets = HSTU(HSTUConfig(), dim=50, max_length=200), torch.arange(17) * 150
    values = torch.randn(2400, 50, requires_grad=True)
    return lambda: tower(JaggedSequence(values, offsets, 200)).values_TD.sum().backward()


def train_step(folder: Path) -> Work:
    from itertools import count

    from benchmarks.retrieval import first_batches, training
    from gr.config import load_config
    from gr.dist import world

    overrides = [f"data.path={folder / 'users'}", "device=cpu"]
    config: Any = load_config("configs/retrieval/ml-1m-hstu.yaml", overrides)
    here = _open.enter_context(world("cpu"))
    (_, module), batches, steps = training(config, here), first_batches(config, here, BATCHES), count()

    def step() -> float:
        number = next(steps)
        objective = module.forward(module.prepare(batches[number % BATCHES], number))
        module.backward(objective, number)
        return float(objective.loss.detach())

    return step


def corpus_ranks(folder: Path) -> Work:
    import torch
    from torchrec import KeyedJaggedTensor

    from gr.batch import EvaluationBatch
    from gr.dist import World
    from gr.tasks import DotProduct
    from gr.tasks.corpus_rank import CorpusRanker

    draw = torch.Generator().manual_seed(0)
    table = torch.randn(100_001, 50, generator=draw)
    alone = World(0, 1, 0, 1, torch.device("cpu"))
    ranker = CorpusRanker(torch.arange(1, 100_001), lambda ids: table[ids], DotProduct(1.0), alone)
    nothing = torch.empty(0, dtype=torch.int64)
    features = KeyedJaggedTensor(keys=["item_id"], values=nothing, lengths=torch.zeros(32, dtype=torch.int64))
    offsets, targets = torch.zeros(33, dtype=torch.int64), torch.randint(1, 100_001, (32,), generator=draw)
    batch = EvaluationBatch(features, None, None, targets, targets > 0, seen_ids=nothing, seen_offsets=offsets)
    queries = torch.randn(32, 50, generator=draw)
    return lambda: ranker.ranks(queries, batch)


def rows_loader(folder: Path) -> Work:
    from gr.data.loader import ResumableLoader
    from gr.data.tabular import TabularDataset
    from gr.data.tabular_pass import TabularPass

    data = TabularDataset.open(folder / "rows")
    rows = TabularPass(data, global_batch_size=2048, rank=0, world_size=1, shuffle_seed=1)

    def read() -> None:
        with ResumableLoader(rows) as loader:
            for _ in loader:
                pass

    return read


def users_loader(folder: Path) -> Work:
    from gr.config.histories import HistoryDataConfig
    from gr.data.dataset import Dataset
    from gr.data.history_batches import HistoryEpochs
    from gr.data.loader import ResumableLoader

    config = HistoryDataConfig(path=str(folder / "users"))
    data = Dataset.open(folder / "users")
    epochs = HistoryEpochs(data, config, seed=0, global_batch_size=128, rank=0, world_size=1)

    def read() -> None:
        with ResumableLoader(epochs) as loader:
            for _ in range(USERS // 128):
                next(loader)

    return read


def planner(folder: Path) -> Work:
    from benchmarks.planner_cases import CASES, inventory
    from gr.planner.estimate import estimate
    from gr.planner.plan import search
    from gr.planner.topology import parse_topology

    tables, topology = inventory("100x64"), parse_topology(f"h100x{CASES['100x64'].ranks}")
    return lambda: estimate(search(tables, topology))


WORK: dict[str, Callable[[Path], Work]] = {
    function.__name__: function
    for function in (
        *(attention, hstu_layers, sampled_logits, sampled_softmax, train_step, corpus_ranks),
        *(rows_loader, users_loader, planner),
    )
}


# --- one process a tree ----------------------------------------------------------------------------------------------


def serve(folder: Path, isa: str) -> None:
    """Answers each name on stdin by the CPU seconds of a call and all losses so far, or by why there are none."""
    import torch

    import gr
    from gr.ops import cpp_extension

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the work prints is no answer
    torch.set_num_threads(1)
    # Older trees do not build for the instruction set that torch keeps to.
    if isa == "avx2" and not hasattr(cpp_extension, "_compile_flags"):
        flags = [flag for flag in cpp_extension._COMPILE_FLAGS if not flag.startswith(("-march", "-mprefer"))]
        cpp_extension._COMPILE_FLAGS = (*flags, "-march=x86-64-v3", "-mprefer-vector-width=256")
    print(f"tree: {Path(gr.__file__).parent.parent}", file=sys.stderr)
    built: dict[str, tuple[Work, int, list[float]]] = {}
    for line in sys.stdin:
        name = line.strip()
        try:
            if name not in built:
                work, losses = WORK[name](folder), list[float]()
                _seconds(work, 1, losses)
                built[name] = work, max(1, int(ROUND_SECONDS / max(_seconds(work, 1, losses), 1e-6))), losses
            answer: dict[str, Any] = {"seconds": _seconds(*built[name]), "losses": built[name][2]}
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            answer = {"failure": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _seconds(work: Work, calls: int, losses: list[float]) -> float:
    began = time.process_time()
    for _ in range(calls):
        if isinstance(loss := work(), float):
            losses.append(loss)
    return (time.process_time() - began) / calls


class Answering(Protocol):
    def do(self, name: str) -> dict[str, Any]:
        """The CPU seconds of a call of this case and its losses, or the failure."""


class Tree:
    """A process that works with the code of one tree."""

    def __init__(self, path: Path, folder: Path, isa: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-W", "ignore", str(Path(__file__).resolve()), "--isa", isa]
        command += ["--serve", str(folder)]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  read when the process has failed
        self._process = subprocess.Popen(
            command,
            cwd=path,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )

    def do(self, name: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        if answer := self._process.stdout.readline():
            return json.loads(answer)
        self._log.seek(0)
        raise SystemExit(f"{name}: the process has ended: {self._log.read()[-2000:]}")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", commit], cwd=TREE, capture_output=True, check=False)
        if archive.returncode:
            raise SystemExit(f"{commit}: {archive.stderr.decode().strip()}")
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)


def write_data(folder: Path, histories: Path | None, cases: set[str]) -> None:
    """The data of these cases: the loaders' imports take longer than a case that needs none."""
    if "rows_loader" in cases:
        from benchmarks.loader import write_rows

        write_rows(folder / "rows", ROWS)
    if histories is not None:
        (folder / "users").symlink_to(histories.resolve())
    elif cases & {"train_step", "users_loader"}:
        from benchmarks.loader import write_users

        write_users(folder / "users", USERS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", default="HEAD")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--case", action="append", choices=WORK, help="again for more; all without it")
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--data", type=Path, help="folder of histories")
    parser.add_argument("--isa", choices=["native", "avx2"], default="native")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.isa)
        return 0
    os.environ.update(AVX2 if options.isa == "avx2" else {})  # before torch looks; the trees' processes inherit it
    from benchmarks.machine import describe

    print(describe("cpu"))
    slower = []
    with checked_out(options.commit) as path, tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder, options.data, set(options.case or WORK))
        old, new = (Tree(each, folder, options.isa) for each in (path, TREE))
        print(f"\n| | {options.commit}, ms | this tree, ms | times faster |\n|---|---|---|---|", flush=True)
        for name in options.case or WORK:
            if compared(name, old, new, options.rounds) < 1 - options.tolerance:
                slower.append(name)
        old.close()
        new.close()
    if slower:
        print(f"\nslower than {options.commit} by more than {options.tolerance:.0%}: {', '.join(slower)}")
    return int(bool(slower))


def compared(name: str, old: Answering, new: Answering, rounds: int) -> float:
    """Prints the row of a case. Returns the upper quartile of old over new, infinite where there is no comparison."""
    pairs = []
    for number in range(rounds):  # each tree goes first in every other round
        answers = {tree: tree.do(name) for tree in ((old, new) if number % 2 else (new, old))}
        pairs.append((answers[old], answers[new]))
    (of_old, of_new), *_ = pairs
    if "failure" in of_new:
        raise SystemExit(f"{name}: this tree cannot do it: {of_new['failure']}")
    if "failure" in of_old:
        print(f"| {name} | | | not compared: {of_old['failure']} |", flush=True)
        return float("inf")
    times = [(before["seconds"], after["seconds"]) for before, after in pairs]
    before, after = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
    ratios = [old_seconds / new_seconds for old_seconds, new_seconds in times]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if rounds > 1 else 3 * ratios
    losses = list(zip(pairs[-1][0]["losses"], pairs[-1][1]["losses"], strict=False))
    apart = f", losses within {max(abs(x - y) / abs(x) for x, y in losses):.1e}" if losses else ""
    print(f"| {name} | {before:,.1f} | {after:,.1f} | {median:.2f} [{low:.2f}, {high:.2f}]{apart} |", flush=True)
    return high


if __name__ == "__main__":
    sys.exit(main())
