"""One training step of configs/retrieval/ml-1m-hstu.yaml against the naive padded model (naive.py).

    python -m benchmarks.train_step DATA_DIR        # DATA_DIR: what `gr prepare movielens-1m` wrote

Forward, loss, backward and update, on the same batches, both fp32 on one thread, in turns; then where gr's step spends
its time, and how much work on padding and above the diagonal a jagged, causal step leaves out.
"""

import itertools
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.compare import compare, print_machine, report
from benchmarks.naive import NaiveRetriever
from gr.batch import SequenceBatch
from gr.config import load_config
from gr.config.tree import ExperimentConfig, PerPositionNegatives
from gr.data.loader import TrainLoader
from gr.dist import World, world
from gr.experiment.retrieval import build
from gr.ops.backend import cpu_backend, force_backend
from gr.ops.jagged import jagged_to_padded
from gr.tasks import CandidateSampler
from gr.train.module import TrainModule
from gr.train.objectives import RetrievalObjective

CONFIG = "configs/retrieval/ml-1m-hstu.yaml"
BATCHES = 8
PEAK_OF = "--peak-of"


def main() -> None:
    torch.set_num_threads(1)
    arguments = sys.argv[1:]
    peak_of = arguments[arguments.index(PEAK_OF) + 1] if PEAK_OF in arguments else None
    overrides = [f"data.path={arguments[0]}"] if arguments and arguments[0] != PEAK_OF else []
    config = load_config(CONFIG, overrides)
    with world("cpu") as here:
        ours, batches = _ours(config, here)
        naive = _naive(config, batches)
        if peak_of:
            _print_peak(peak_of, {"gr": ours, "naive": naive}[peak_of])
            return
        _print_times(config, ours, naive)
        _print_work(batches, config)
        _print_profile(ours)
    _print_peaks()


def _print_times(config: ExperimentConfig, ours: Callable[[], object], naive: Callable[[], object]) -> None:
    print_machine()
    variants: dict[str, Callable[[], object]] = {"naive padded PyTorch": naive, f"gr ({cpu_backend()})": ours}
    if cpu_backend() == "native":
        variants["gr (torch, no compiler)"] = partial(_without_compiler, ours)
    examples = config.trainer.global_batch_size
    timings = compare(variants, rounds=9, round_seconds=0.1)
    report(f"training step, batch {examples}, N {config.data.max_length}", timings, baseline="naive padded PyTorch")
    for name, timing in timings.items():
        print(f"  {name:34s} {examples / timing.median:9.0f} examples per CPU second")


def _ours(config: ExperimentConfig, here: World) -> tuple[Callable[[], object], list[SequenceBatch]]:
    built = build(config, here)
    sampler = CandidateSampler(config.task, *built.train_data.corpus(), config.seed)
    module = TrainModule(built.model, RetrievalObjective(sampler, here), config, here)
    size = config.trainer.global_batch_size
    loader = TrainLoader(built.train_data, config.data, seed=config.seed, global_batch_size=size, rank=0, world_size=1)
    batches = [next(loader) for _ in range(BATCHES)]
    loader.close()
    steps = itertools.count()

    def step() -> None:
        number = next(steps)
        module.backward(module.forward(batches[number % BATCHES], number), number)

    return step, batches


def _naive(config: ExperimentConfig, batches: list[SequenceBatch]) -> Callable[[], object]:
    negatives = config.task.negatives
    assert isinstance(negatives, PerPositionNegatives)
    items = int(max(batch.target_ids_T.max() for batch in batches)) + 200
    model = NaiveRetriever(items, config.model.dim, config.data.max_length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    padded = [_padded(batch, config.data.max_length) for batch in batches]
    steps = itertools.count()

    def step() -> None:
        ids, targets = padded[next(steps) % BATCHES]
        drawn = torch.randint(1, items, (*ids.shape, negatives.count))
        loss = model(ids, targets, drawn, config.task.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _padded(batch: SequenceBatch, length: int) -> tuple[Tensor, Tensor]:
    offsets = batch.features.offsets().long()
    ids, targets = batch.features.values()[:, None], batch.target_ids_T[:, None]
    return tuple(jagged_to_padded(x, offsets, length).squeeze(-1) for x in (ids, targets))  # type: ignore[return-value]


def _without_compiler(step: Callable[[], object]) -> None:
    with force_backend("torch"):
        step()


def _print_work(batches: list[SequenceBatch], config: ExperimentConfig) -> None:
    lengths = torch.cat([batch.features.lengths() for batch in batches]).double()
    N = config.data.max_length
    tokens = lengths.sum() / (len(lengths) * N)
    pairs = (lengths * (lengths + 1) / 2).sum() / (len(lengths) * N * N)
    print(f"\nwork of the padded model that is real: {tokens:.0%} of the tokens, {pairs:.0%} of the attention scores")


def _print_profile(step: Callable[[], object]) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as recording:
        for _ in range(BATCHES):
            step()
    print("\nwhere gr's step spends its time (8 steps)")
    print(recording.key_averages().table(sort_by="self_cpu_time_total", row_limit=22, max_name_column_width=60))


def _print_peaks() -> None:
    """Each variant in a process of its own."""
    print("\npeak memory that four steps add to a process, over building the model and the batches")
    for name in ("naive", "gr"):
        subprocess.run([sys.executable, "-m", "benchmarks.train_step", *sys.argv[1:], PEAK_OF, name], check=True)


def _print_peak(name: str, step: Callable[[], object]) -> None:
    # Starts the high-water mark anew: a process inherits its parent's (proc(5), clear_refs).
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_kib()
    for _ in range(4):
        step()
    print(f"  {name:34s} {(_peak_kib() - before) / 1024:9.0f} MiB")


def _peak_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))


if __name__ == "__main__":
    main()
