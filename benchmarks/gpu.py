"""Everything worth knowing from one GPU, in one command of at most ten minutes; the summary is printed last.

    python -m benchmarks.gpu [--seconds 480] [--data DIR] [--out gpu.json]

Ceilings of the device; correctness of every dtype, bias and mask against float64 with poisoned outputs; a sweep of
tiles on shapes from recommenders' lengths to 8,192; softmax attention of equal shape; the tower of a published run, the
layer, the loss and, with --data, the training step, which alone needs torchrec and fbgemm-gpu. Stops starting new work
after --seconds. Not yet run on a GPU: with TRITON_INTERPRET=1 and no GPU it goes through the same steps on tiny shapes
and the CPU, which checks the plumbing and times nothing of interest.
"""

import argparse
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention
from triton.runtime.errors import OutOfResources

from benchmarks import layer, loss
from benchmarks.case import Options
from benchmarks.compare import compare
from benchmarks.machine import describe, peaks
from gr.config.inventory import InventoryConfig, TableConfig, TowerDense
from gr.config.towers import STUConfig
from gr.ops.backend import force_backend
from gr.ops.hstu_attention import AttentionMask, hstu_attention, time_bucket_ids
from gr.ops.hstu_attention import triton as kernels
from gr.ops.hstu_attention.triton import Tiles
from gr.planner.estimate_dense import dense_work
from gr.sequence import JaggedSequence
from gr.towers.stu import STU

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}  # tf32x3 products in float32
SWEEP = [
    Tiles(m, n, w, s) for m, n, w in ((32, 64, 8), (64, 32, 4), (64, 64, 4), (64, 64, 8), (128, 64, 8)) for s in (2, 3)
]


class Run:
    """One run: the device, its clock, and what has been found."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.small = device, device == "cpu"
        self.stop = time.monotonic() + seconds
        self.found: dict[str, Any] = {"machine": describe(device)}

    @property
    def late(self) -> bool:
        return time.monotonic() > self.stop

    def note(self, part: str, name: str, value: Any) -> None:
        self.found.setdefault(part, {})[name] = value
        print(f"{part:12s} {name:60s} {value}", flush=True)

    def time(self, variants: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Milliseconds, medians of turns."""
        rounds, seconds = (1, 0.0) if self.small else (5, 0.02)
        timings = compare(variants, rounds=rounds, round_seconds=seconds, warmups=1, device=self.device)
        return {name: timing.median * 1e3 for name, timing in timings.items()}


def inputs(lengths: list[int], heads: int, width: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """q, k, v as views of one UVQK buffer, a gradient, and offsets."""
    torch.manual_seed(0)
    uvqk = torch.randn(sum(lengths), 4, heads, width, device=device).to(dtype)
    grad = torch.randn(sum(lengths), heads, width, device=device).to(dtype)
    q, k, v = (x.detach().requires_grad_() for x in uvqk.unbind(1)[1:])
    return q, k, v, grad, pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device)


@contextmanager
def poisoned() -> Iterator[None]:
    """Every output that is not written stays NaN."""
    empty = torch.empty_like
    torch.empty_like = lambda x, **options: empty(x, **options).fill_(float("nan"))  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty_like = empty


def check(run: Run, dtype: torch.dtype, biased: bool, mask: AttentionMask | None) -> float:
    """The largest relative error of the output and every gradient; NaN if something was not written, or if the
    second run gives other bits."""
    lengths = [1, 33] if run.small else [1, 63, 64, 65, 300, 1000]
    q, k, v, grad, offsets = inputs(lengths, 2, 64, dtype, run.device)
    longest, options = max(lengths), {}
    if biased:
        times = torch.randint(0, 10**6, (len(q),)).sort().values.to(run.device)
        tables = [torch.randn(size, device=run.device, requires_grad=True) for size in (2 * longest - 1, 129)]
        buckets = time_bucket_ids(times, times + 100, offsets, num_buckets=128)
        options = {"position_bias": tables[0], "time_bias": tables[1], "time_buckets": buckets}

    def outputs(to: torch.dtype) -> list[Tensor]:
        own = [x.detach().to(to).requires_grad_() for x in (q, k, v)]
        given = {n: x.detach().to(to).requires_grad_() if isinstance(x, Tensor) else x for n, x in options.items()}
        out = hstu_attention(*own, offsets, max_length=longest, divisor=float(longest), alpha=0.125, mask=mask, **given)
        wanted = own + [x for x in given.values() if isinstance(x, Tensor)]
        return [out.detach(), *torch.autograd.grad(out, wanted, grad.to(to))]

    with force_backend("triton"), poisoned():
        actual, again = outputs(dtype), outputs(dtype)
    if not all(torch.equal(x, y) for x, y in zip(actual, again, strict=True)):
        return float("nan")
    errors = [(x.double() - y).norm() / y.norm() for x, y in zip(actual, outputs(torch.float64), strict=True)]
    return float(torch.stack(errors).max()) if not any(e.isnan() for e in errors) else float("nan")


def correctness(run: Run) -> None:
    lengths = 2 if run.small else 6
    targets = torch.tensor([1, 20] if run.small else [0, 5, 64, 1, 100, 300], device=run.device)
    masks = {"causal": None, "candidates": AttentionMask(num_targets_B=targets), "window": AttentionMask(None, 40)}
    assert len(targets) == lengths
    dtypes = (torch.float16, torch.float32) if run.small else tuple(TOLERANCE)
    for dtype, biased, (name, mask) in itertools.product(dtypes, (False, True), masks.items()):
        error = check(run, dtype, biased, mask)
        verdict = "ok" if error < TOLERANCE[dtype] else "WRONG"
        label = f"triton {dtype}, {'biased' if biased else 'plain'}, {name}"
        run.note("correctness", label, f"{error:.1e} {verdict}")


def shapes(run: Run) -> list[tuple[str, list[int], int, int]]:
    if run.small:
        return [("B 2 n 40", [40, 9], 1, 16)]
    return [
        ("B 128 n 20 to 200", [20 + 37 * i % 181 for i in range(128)], 2, 64),
        ("B 512 n 256", [256] * 512, 4, 64),
        ("B 32 n 2048", [2048] * 32, 4, 64),
        ("B 16 n 8192", [8192] * 16, 4, 64),
        ("B 16 n 8192 d 128", [8192] * 16, 4, 128),
        ("B 32 n 4099 d 256", [4099] * 32, 4, 256),
        ("B 64 n 1024 to 8192", [1024 + 997 * i % 7169 for i in range(64)], 4, 64),
    ]


def sweep(run: Run) -> None:
    """Every kernel takes the same tiles in turn: a table of forward and backward is enough to choose each."""
    shipped, dtype = dict(kernels.TILES), torch.float16 if run.small else torch.bfloat16
    for name, lengths, heads, width in shapes(run):
        q, k, v, grad, offsets = inputs(lengths, heads, width, dtype, run.device)
        call = functools.partial(hstu_attention, q, k, v, offsets, max_length=max(lengths), divisor=float(max(lengths)))
        work = sum(n * (n + 1) / 2 for n in lengths) * heads * width
        for tiles in [None, *(SWEEP[:1] if run.small else SWEEP)]:
            if run.late:
                break
            kernels.TILES.update(shipped if tiles is None else dict.fromkeys(shipped, tiles))
            label = f"{name}, {'shipped tiles' if tiles is None else tuple(tiles)}"
            try:
                with force_backend("triton"):
                    run.note("sweep", label, both_ways(run, call, [q, k, v], grad, work))
            except OutOfResources as error:
                run.note("sweep", label, f"does not fit: {error}")
        kernels.TILES.update(shipped)
        if len(set(lengths)) == 1 and not run.late:
            softmax(run, name, len(lengths), lengths[0], heads, width)


def both_ways(run: Run, call: Callable[[], Tensor], inputs: list[Tensor], grad: Tensor, work: float) -> str:
    back = functools.partial(torch.autograd.grad, call(), inputs, grad, retain_graph=True)
    ms = run.time({"forward": call, "backward": back})
    rates = f"{4 * work / ms['forward'] / 1e9:.0f} and {10 * work / ms['backward'] / 1e9:.0f} TFLOP/s"
    return f"forward {ms['forward']:.3f} ms, backward {ms['backward']:.3f} ms; {rates}"


def softmax(run: Run, name: str, count: int, length: int, heads: int, width: int) -> None:
    """Dense, of equal shape, which is the best case of softmax attention."""
    shape = (count, heads, length, width)
    q, k, v = (torch.randn(shape, device=run.device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(backend):
            try:
                out = scaled_dot_product_attention(q, k, v, is_causal=True)
            except RuntimeError as error:
                run.note("softmax", f"{name}, {backend.name}", f"not here: {error}".splitlines()[0])
                continue
            forward = functools.partial(scaled_dot_product_attention, q, k, v, is_causal=True)
            backward = functools.partial(torch.autograd.grad, out, [q, k, v], torch.ones_like(out), retain_graph=True)
            ms = run.time({"forward": forward, "backward": backward})
        run.note("softmax", f"{name}, {backend.name}", {part: f"{value:.3f} ms" for part, value in ms.items()})


def fixed_shape(run: Run) -> None:
    """One layer, and the whole tower with its update, of NVIDIA's published end-to-end run (recsys-examples,
    E2E_BENCHMARK.md): 32 histories of 4,099 tokens, 8 layers, D 1,024, 4 heads of 256. FLOPs as gr plan counts them.
    """
    count, length, dim, heads, width = (2, 40, 32, 2, 16) if run.small else (32, 4099, 1024, 4, 256)
    offsets = torch.arange(count + 1, device=run.device) * length
    x_TD = torch.randn(count * length, dim, device=run.device, requires_grad=True)
    peak = peaks(run.device).bfloat16
    for layers in (1,) if run.small else (1, 8):
        config = STUConfig(layers=layers, heads=heads, qk_dim=width, v_dim=width, dropout=0.0)
        tower = STU(config, dim=dim, max_length=length).to(run.device)
        optimizer = torch.optim.AdamW(tower.parameters(), fused=True)

        def step(tower: STU = tower, optimizer: torch.optim.Optimizer = optimizer, layers: int = layers) -> None:
            with force_backend("triton"), torch.autocast(run.device, torch.bfloat16, enabled=not run.small):
                tower(JaggedSequence(x_TD, offsets, length)).values_TD.float().sum().backward()
            if layers > 1:
                optimizer.step()
            optimizer.zero_grad()

        dense = TowerDense(tower=config, dim=dim, mean_length=length, max_length=length)
        table = TableConfig(name="items", rows=1, dim=dim)
        work = dense_work(InventoryConfig(rank_batch_size=count, tables=(table,), dense=dense), count)
        ms = run.time({"step": step})["step"]
        rate = (work.forward_flops + work.backward_flops) / ms * 1e3
        name = f"{layers} layers of {heads} x {width}, {'with' if layers > 1 else 'without'} update"
        run.note("fixed shape", name, f"{ms:.1f} ms, {rate / 1e12:.0f} TFLOP/s, {rate / peak:.1%} of the measured peak")


def end_to_end(run: Run, data: Path | None) -> None:
    if run.small:
        return  # its variants take seconds an operation under the interpreter
    options = Options(run.device, data)
    modules: list[Any] = [loss, layer]
    if data:
        from benchmarks import train_step  # needs torchrec and fbgemm-gpu; nothing else here does

        modules.append(train_step)
    for module in modules:
        for case in module.cases(options):
            if not run.late:
                run.note(
                    "end to end", case.name, {n: f"{ms:.2f} ms" for n, ms in run.time(dict(case.variants)).items()}
                )


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    arguments = parser.parse_args()
    run = Run("cuda" if torch.cuda.is_available() else "cpu", arguments.seconds)
    if run.small:
        torch.set_num_threads(1)
    run.note("ceilings", "FLOP/s and bytes/s", asdict(peaks(run.device)))
    correctness(run)
    fixed_shape(run)
    sweep(run)
    end_to_end(run, arguments.data)
    arguments.out.write_text(json.dumps(run.found, indent=1) + "\n")
    print(f"\n{json.dumps(run.found, indent=1)}")


if __name__ == "__main__":
    main()
