"""HSTU attention, forward and backward, against the ways to write it without a kernel of its own.

Lengths are those of MovieLens-1M (log-normal, cut to [20, 200]), of a mid-sized log, and one long sequence; then one
sequence of 256 to 16,384 tokens, and more and more sequences of 1,024. q, k and v are views of one UVQK buffer.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.case import Case, Options, on_backend, own_backend
from benchmarks.machine import Peaks
from benchmarks.picture import label, lines, panels
from benchmarks.results import Row
from gr.ops.hstu_attention import TimeBuckets, hstu_attention, time_bucket_ids
from gr.ops.jagged import jagged_to_padded, padded_to_jagged
from gr.ops.softmax_attention import softmax_attention

TESTS = ("tests/ops/test_hstu_attention.py", "tests/ops/test_hstu_masks.py")
PEER = "generative_recommenders/ops/pytorch/pt_hstu_attention.py"
_BUCKETS = 128
_LONGEST_PADDED = 8192  # tokens; beyond it the padded form takes more than 10 GiB


@dataclass(frozen=True)
class Shape:
    name: str
    lengths: tuple[int, ...]
    heads: int
    width: int
    biased: bool = False

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def work(self) -> float:
        """Causal products: 4 d a pair forward, 10 d backward (five products)."""
        return sum(14 * self.width * self.heads * n * (n + 1) / 2 for n in self.lengths)


def lognormal_lengths(count: int) -> tuple[int, ...]:
    draws = torch.empty(count).log_normal_(4.55, 0.75, generator=torch.Generator().manual_seed(0))
    return (*(int(n) for n in draws.round().clamp(20, 200)[1:]), 200)


def _uniform(count: int, low: int, high: int) -> tuple[int, ...]:
    return tuple(torch.linspace(low, high, count).long().tolist())


class _Inputs:
    """One set of tensors for all variants of a shape, made when the first of them runs."""

    def __init__(self, shape: Shape, device: str) -> None:
        torch.manual_seed(0)
        self.shape, self.device = shape, device
        tokens = sum(shape.lengths)
        self.offsets = F.pad(torch.tensor(shape.lengths).cumsum(0), (1, 0)).to(device)
        self.uvqk = torch.randn(tokens, 4, shape.heads, shape.width, device=device)
        self.grad = torch.randn(tokens, shape.heads, shape.width, device=device)
        self.tables: list[Tensor] = []
        self.buckets: TimeBuckets | None = None
        if shape.biased:
            times = torch.randint(0, 10**7, (tokens,)).sort().values.to(device)
            self.buckets = time_bucket_ids(times, times + 1000, self.offsets, num_buckets=_BUCKETS)
            sizes = (2 * shape.longest - 1, _BUCKETS + 1)
            self.tables = [torch.randn(size, device=device, requires_grad=True) for size in sizes]

    @functools.lru_cache  # noqa: B019 (the inputs live as long as the benchmark)
    def qkv(self, dtype: torch.dtype) -> list[Tensor]:
        return [x.detach().requires_grad_() for x in self.uvqk.to(dtype).unbind(1)[1:]]

    @functools.cached_property
    def padded_ids(self) -> Tensor:
        """int64 [B, N, N], as a padded implementation keeps them."""
        assert self.buckets is not None
        N = self.shape.longest
        ids = torch.zeros(len(self.shape.lengths), N, N, dtype=torch.long)
        for b, n in enumerate(self.shape.lengths):
            i, j = torch.tril_indices(n, n)
            ids[b, i, j] = self.buckets.ids_P[int(self.buckets.pair_offsets_B1[b]) :][: i.numel()].long().cpu()
        return ids.to(self.device)

    def gradients(self, function: Callable[..., Tensor], dtype: torch.dtype) -> object:
        q, k, v = self.qkv(dtype)
        return torch.autograd.grad(function(q, k, v), [q, k, v, *self.tables], self.grad.to(dtype))


def _ours(inputs: _Inputs, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    position, time = inputs.tables or (None, None)
    return hstu_attention(
        q,
        k,
        v,
        inputs.offsets,
        max_length=inputs.shape.longest,
        divisor=211.0,
        position_bias=position,
        time_bias=time,
        time_buckets=inputs.buckets,
    )


def _padded(inputs: _Inputs, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The public research code's way: everything padded to [B, H, N, N], biases gathered element by element."""
    offsets, N = inputs.offsets, inputs.shape.longest
    q, k, v = (jagged_to_padded(x, offsets, N).transpose(1, 2) for x in (q, k, v))
    out = _padded_core(q, k, v, *(inputs.tables and [*inputs.tables, inputs.padded_ids]))
    return padded_to_jagged(out.transpose(1, 2), offsets, sum(inputs.shape.lengths))


def _padded_core(q: Tensor, k: Tensor, v: Tensor, *biases: Tensor) -> Tensor:
    N = q.shape[2]
    scores = q @ k.transpose(2, 3)
    if biases:
        position, time, ids = biases
        i = torch.arange(N, device=q.device)
        scores = scores + (position[N - 1 + i[None, :] - i[:, None]] + time[ids])[:, None].to(q.dtype)
    weights = F.silu(scores) / 211 * torch.ones(N, N, dtype=q.dtype, device=q.device).tril()
    return weights @ v


def _compiled(inputs: _Inputs, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    offsets, N = inputs.offsets, inputs.shape.longest
    q, k, v = (jagged_to_padded(x, offsets, N).transpose(1, 2) for x in (q, k, v))
    out = _compiled_core()(q, k, v)
    return padded_to_jagged(out.transpose(1, 2), offsets, sum(inputs.shape.lengths))


@functools.cache
def _compiled_core() -> Callable[..., Tensor]:
    return torch.compile(_padded_core, dynamic=False)


def _softmax(inputs: _Inputs, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmax_attention(q, k, v, inputs.offsets, max_length=inputs.shape.longest)


@functools.cache
def _peer(checkout: Path) -> Callable[..., Tensor]:
    """pytorch_hstu_mha of a checkout of meta-recsys/generative-recommenders."""
    import fbgemm_gpu  # noqa: F401 (registers the operators that the peer calls)

    spec = importlib.util.spec_from_file_location("peer", checkout / PEER)
    if spec is None or spec.loader is None or not (checkout / PEER).is_file():
        raise SystemExit(f"--peer {checkout}: no {PEER} there")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pytorch_hstu_mha


def _case(shape: Shape, options: Options, *, compiled: bool = False, **fields: Any) -> Case:
    inputs = functools.cache(lambda: _Inputs(shape, options.device))

    def variant(function: Callable[..., Tensor], dtype: torch.dtype) -> Callable[[], object]:
        return lambda: inputs().gradients(functools.partial(function, inputs()), dtype)

    own, short = own_backend(options.device), shape.longest <= 256
    variants: dict[str, Callable[[], object]] = {}
    if shape.longest <= _LONGEST_PADDED:
        variants["padded PyTorch float32"] = variant(_padded, torch.float32)
        if short and "series" not in fields:
            variants["padded PyTorch bfloat16"] = variant(_padded, torch.bfloat16)
    if options.peer and "series" not in fields and not shape.biased:
        peer = _peer(options.peer)

        def theirs(inputs: _Inputs, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return peer(inputs.shape.longest, 1.0, q, k, v, inputs.offsets)

        variants["generative-recommenders float32"] = variant(theirs, torch.float32)
    if compiled and not shape.biased:
        variants["padded, torch.compile float32"] = variant(_compiled, torch.float32)
    if not shape.biased:
        variants["softmax (SDPA) float32"] = variant(_softmax, torch.float32)
        if short and "series" not in fields:
            variants["softmax (SDPA) bfloat16"] = variant(_softmax, torch.bfloat16)
    variants["gr without a kernel float32"] = on_backend("torch", variant(_ours, torch.float32))
    for dtype in (torch.float32, torch.bfloat16):
        variants[f"gr {own} {str(dtype)[6:]}"] = on_backend(own, variant(_ours, dtype))
    baseline = next(iter(variants))
    return Case(f"{shape.name}, h{shape.heads} d{shape.width}", variants, baseline, shape.work, **fields)


def cases(options: Options) -> list[Case]:
    middling = _uniform(8, 512, 2048)
    found = [
        _case(Shape("MovieLens-1M lengths, no bias", lognormal_lengths(128), 1, 64), options, compiled=True),
        _case(Shape("MovieLens-1M lengths, no bias", lognormal_lengths(128), 2, 32), options),
        _case(Shape("MovieLens-1M lengths, both biases", lognormal_lengths(128), 1, 64, True), options),
        _case(Shape("B 8, n 512 to 2048, no bias", middling, 4, 64), options, rounds=3, warmups=1),
        _case(Shape("B 8, n 512 to 2048, both biases", middling, 4, 64, True), options, rounds=3, warmups=1),
        _case(Shape("n 8192, no bias", (8192,), 2, 64), options, rounds=3, warmups=1, memory=True),
    ]
    for n in (256, 512, 1024, 2048, 4096, 8192, 16384):
        shape = Shape(f"one sequence of {n}", (n,), 1, 64)
        found.append(_case(shape, options, rounds=3, warmups=1, series="length", at=n, memory=True))
    for count in (1, 4, 16, 64):
        shape = Shape(f"{count} sequences of 1024", (1024,) * count, 1, 64)
        found.append(_case(shape, options, rounds=3, warmups=1, series="batch", at=count))
    return found


def draw(cases: Sequence[Case], rows: Sequence[Row], found: Peaks, path: Path) -> None:
    """Rate against length beside the roofline, memory, and time against batch."""
    figure, (rate, batch, memory) = panels(3, (18, 5.5))
    places = {case.name: case.at for case in cases if case.series == "length"}
    lines(rate, places, rows, lambda row: row.rate / 1e9)
    lengths = sorted(places.values())
    for name, peak, size in (("float32", found.float32, 4), ("bfloat16", found.bfloat16, 2)):
        # Forward and backward: 14 d n^2 / 2 operations on 4 + 7 rows of d elements a token.
        roof = [min(peak, found.copy * 7 * n / (11 * size)) / 1e9 for n in lengths]
        rate.plot(lengths, roof, "k--" if size == 4 else "k:", label=f"roofline {name}")
    label(rate, "tokens of one sequence", "useful GFLOP/s, forward and backward")
    lines(memory, places, rows, lambda row: row.mebibytes)
    first = min(lengths)
    memory.plot(lengths, [16 * n / first for n in lengths], "k--", label="growing as n")
    label(memory, "tokens of one sequence", "MiB that a call adds")
    lines(batch, {c.name: c.at for c in cases if c.series == "batch"}, rows, lambda row: row.seconds.median * 1e3)
    label(batch, "sequences of 1,024 tokens", "ms, forward and backward")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
