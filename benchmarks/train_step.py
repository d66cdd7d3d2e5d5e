"""One training step of configs/retrieval/ml-1m-hstu.yaml against the naive padded model (naive.py).

Forward, loss, backward and update, on the same batches: `gr prepare movielens-1m` wrote them, --data names the folder.
"""

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.case import Case, Options, lazy, on_backend, own_backend
from benchmarks.naive import NaiveRetriever
from benchmarks.retrieval import alone, first_batches, steps
from gr.batch import RetrievalBatch
from gr.config import load_config
from gr.config.retrieval import PerPositionNegatives, RetrievalConfig
from gr.ops.jagged import jagged_to_padded

TESTS = (
    "tests/ops/test_hstu_attention.py",
    "tests/ops/test_sampled_logits.py",
    "tests/unit/models/test_retrieval.py",
    "tests/unit/towers/test_hstu.py",
)
CONFIG = "configs/retrieval/ml-1m-hstu.yaml"
BATCHES = 8


def cases(options: Options) -> list[Case]:
    """Building a model takes seconds and memory: each variant's is built when it first runs."""
    config = _config(options)
    own = own_backend(options.device)
    variants: dict[str, Callable[[], object]] = {
        "naive padded PyTorch": lazy(lambda: _naive(config, _batches(options))),
        "gr without a kernel float32": on_backend("torch", lazy(lambda: _ours(config, options))),
        f"gr {own} float32": on_backend(own, lazy(lambda: _ours(config, options))),
        f"gr {own} bfloat16": on_backend(own, lazy(lambda: _ours(_config(options, "bf16"), options))),
    }
    name = f"training step, batch {config.trainer.global_batch_size}, N {config.data.max_length}"
    return [Case(name, variants, "naive padded PyTorch", rounds=9, memory=True)]


def notes(options: Options) -> Iterator[str]:
    """How much of the padded work is real, and where gr's step spends its time."""
    config = _config(options)
    lengths = torch.cat([batch.features.lengths() for batch in _batches(options)]).double()
    N = config.data.max_length
    tokens = lengths.sum() / (len(lengths) * N)
    pairs = (lengths * (lengths + 1) / 2).sum() / (len(lengths) * N * N)
    yield f"Of the padded batch {tokens:.0%} of the tokens are real, and {pairs:.0%} of the attention scores."
    step = lazy(lambda: _ours(config, options))
    step()
    with profile(activities=[ProfilerActivity.CPU]) as recording:
        for _ in range(BATCHES):
            step()
    rows = sorted(recording.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    shares = (f"{row.key} {row.self_cpu_time_total / total:.1%}" for row in rows[:16])
    yield f"Where the float32 step spends its CPU time: {', '.join(shares)}."


def _config(options: Options, precision: str = "fp32") -> RetrievalConfig:
    if options.data is None:
        raise SystemExit("train_step needs --data FOLDER, as `gr prepare movielens-1m --out FOLDER` writes it")
    overrides = [f"data.path={options.data}", f"trainer.precision={precision}", f"device={options.device}"]
    config = load_config(CONFIG, overrides)
    assert isinstance(config, RetrievalConfig)
    return config


@functools.cache
def _batches(options: Options) -> list[RetrievalBatch]:
    return first_batches(_config(options), alone(options.device), BATCHES)


def _ours(config: RetrievalConfig, options: Options) -> Callable[[], object]:
    return steps(config, alone(options.device), _batches(options))


def _naive(config: RetrievalConfig, batches: list[RetrievalBatch]) -> Callable[[], object]:
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


def _padded(batch: RetrievalBatch, length: int) -> tuple[Tensor, Tensor]:
    offsets = batch.features.offsets().long()
    ids, targets = batch.features.values()[:, None], batch.target_ids_T[:, None]
    return tuple(jagged_to_padded(x, offsets, length).squeeze(-1) for x in (ids, targets))  # type: ignore[return-value]
