"""Everything worth knowing from one GPU, in one command of at most ten minutes; the summary is printed last.

    python -m benchmarks.gpu [--seconds 480] [--data DIR] [--out gpu.json]

Ceilings of the device; correctness of dtypes, biases and masks against float64 with poisoned outputs; every attention
kernel alone with several tiles, beside what benchmarks/kernel_model.py expects, and which tiles to ship; forward and
backward on shapes from recommenders' lengths to 8,192, beside softmax attention of equal shape; the tower of a
published run, the layer, the loss and, with --data, the training step, which alone needs torchrec and fbgemm-gpu.

It needs torch >= 2.11, triton >= 3.6, numpy, pyyaml and pydantic. Each row is written to --out when it is measured: a
run that is started again measures what is left. It starts nothing new after --seconds.
Not yet run on a GPU: with TRITON_INTERPRET=1 and no GPU it goes through the same steps on tiny shapes and the CPU, to
check the plumbing; its times say nothing.
"""

import argparse
import functools
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from benchmarks import gpu_tiles, layer, loss
from benchmarks.case import Case, Options
from benchmarks.compare import compare
from benchmarks.machine import describe, peaks
from gr.config.inventory import InventoryConfig, TableConfig, TowerDense
from gr.config.towers import STUConfig
from gr.ops.backend import force_backend
from gr.ops.hstu_attention import AttentionMask, hstu_attention, time_bucket_ids
from gr.ops.hstu_attention.triton import capability_of
from gr.ops.softmax_attention import softmax_attention
from gr.planner.estimate_dense import dense_work
from gr.sequence import JaggedSequence
from gr.towers.stu import STU

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}  # tf32x3 products in float32
ROOT = Path(__file__).parents[1]


def identity(device: str) -> str:
    """What rows must share to stand in one file: the device, the versions, and the code of the kernels."""
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted((ROOT / "gr/ops").rglob("*.py"))))
    where = "cpu" if device == "cpu" else torch.cuda.get_device_name()
    return f"{where}, torch {torch.__version__}, triton {triton.__version__}, gr/ops {digest.hexdigest()[:12]}"


class Run:
    """One run: the device, its clock, and the rows measured so far, by section and name."""

    def __init__(self, device: str, seconds: float, out: Path) -> None:
        self.device, self.small, self.out, self.left = device, device == "cpu", out, 0
        self.stop = time.monotonic() + seconds
        self.rows: dict[str, dict[str, Any]] = {}
        self.of = identity(device)
        if out.exists():
            earlier = json.loads(out.read_text())
            if earlier["of"] != self.of:
                raise SystemExit(f"{out} is of {earlier['of']}; this is {self.of}. Remove it, or name another --out")
            self.rows = earlier["rows"]
        self.machine, self.capability = describe(device), capability_of(torch.device(device))

    @property
    def late(self) -> bool:
        return time.monotonic() > self.stop

    def row(self, section: str, name: str, measure: Callable[[], Any]) -> Any:
        """What `measure` returns, now or in an earlier run; None, and one more left, if it is too late to start."""
        rows = self.rows.setdefault(section, {})
        if name not in rows:
            if self.late:
                self.left += 1
                return None
            rows[name] = measure()
            draft = self.out.with_suffix(".draft")
            text = json.dumps({"of": self.of, "machine": self.machine, "rows": self.rows}, indent=1)
            draft.write_text(text + "\n")
            os.replace(draft, self.out)
        print(f"{section:12s} {name:60s} {rows[name]}", flush=True)
        return rows[name]

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
    lengths = [1, 20] if run.small else [1, 63, 64, 65, 300, 1000]
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
    """Half precision with every mask, biased and plain; the others once, biased with candidates."""
    targets = torch.tensor([1, 6] if run.small else [0, 5, 64, 1, 100, 300], device=run.device)
    masks = {"causal": None, "candidates": AttentionMask(num_targets_B=targets), "window": AttentionMask(None, 40)}
    cases = [(dtype, True, "candidates") for dtype in (torch.float16, torch.float32)]
    if not run.small:
        cases += [(torch.bfloat16, biased, mask) for biased, mask in itertools.product((False, True), masks)]
    if not (run.small or run.late):
        # Backward stays in this thread, where launches are seen.
        with torch.autograd.set_multithreading_enabled(False), gpu_tiles.compiling_ahead():
            for dtype, biased, mask in cases:
                check(run, dtype, biased, masks[mask])

    def verdict(dtype: torch.dtype, biased: bool, mask: str) -> str:
        error = check(run, dtype, biased, masks[mask])
        return f"{error:.1e} {'ok' if error < TOLERANCE[dtype] else 'WRONG'}"

    for dtype, biased, mask in cases:
        name = f"triton {dtype}, {'biased' if biased else 'plain'}, {mask}"
        run.row("correctness", name, functools.partial(verdict, dtype, biased, mask))


def attention(run: Run) -> None:
    """Forward and backward with the shipped tiles, and softmax attention."""
    dtype = torch.float16 if run.small else torch.bfloat16
    for shape in gpu_tiles.shapes(run.small):
        if shape.biased and not run.small:
            continue
        lengths, heads, width = list(shape.lengths), shape.heads, shape.width

        def measure(lengths: list[int] = lengths, shape: gpu_tiles.Shape = shape) -> str:
            q, k, v, grad, offsets = inputs(lengths, shape.heads, shape.width, dtype, run.device)
            longest = max(lengths)
            call = functools.partial(hstu_attention, q, k, v, offsets, max_length=longest, divisor=float(longest))
            with force_backend("triton"):
                return both_ways(run, call, [q, k, v], grad, shape.work)

        run.row("attention", f"{shape.name}, {heads} x {width}", measure)
        packed_softmax(run, shape, dtype)
        if not run.small and len(set(lengths)) == 1:
            softmax(run, shape.name, len(lengths), lengths[0], heads, width)


def both_ways(run: Run, call: Callable[[], Tensor], inputs: list[Tensor], grad: Tensor, work: float) -> str:
    back = functools.partial(torch.autograd.grad, call(), inputs, grad, retain_graph=True)
    ms = run.time({"forward": call, "backward": back})
    rates = f"{4 * work / ms['forward'] / 1e9:.0f} and {10 * work / ms['backward'] / 1e9:.0f} TFLOP/s"
    return f"forward {ms['forward']:.3f} ms, backward {ms['backward']:.3f} ms; {rates}"


def packed_softmax(run: Run, shape: gpu_tiles.Shape, dtype: torch.dtype) -> None:
    """The softmax attention of the Llama tower on the same packed sequences."""

    def measure() -> str:
        q, k, v, grad, offsets = inputs(list(shape.lengths), shape.heads, shape.width, dtype, run.device)
        call = functools.partial(softmax_attention, q, k, v, offsets, max_length=max(shape.lengths))
        return both_ways(run, call, [q, k, v], grad, shape.work)

    run.row("softmax", f"{shape.name}, {shape.heads} x {shape.width}, packed", measure)


def softmax(run: Run, name: str, count: int, length: int, heads: int, width: int) -> None:
    """Dense, of equal shape, which is the best case of softmax attention."""

    def measure(backend: SDPBackend) -> str:
        shape = (count, heads, length, width)
        q, k, v = (torch.randn(shape, device=run.device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        with sdpa_kernel(backend):
            try:
                out = scaled_dot_product_attention(q, k, v, is_causal=True)
            except RuntimeError as error:
                return f"not here: {error}".splitlines()[0]
            forward = functools.partial(scaled_dot_product_attention, q, k, v, is_causal=True)
            backward = functools.partial(torch.autograd.grad, out, [q, k, v], torch.ones_like(out), retain_graph=True)
            ms = run.time({"forward": forward, "backward": backward})
        return f"forward {ms['forward']:.3f} ms, backward {ms['backward']:.3f} ms"

    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        run.row("softmax", f"{name}, {heads} x {width}, {backend.name}", functools.partial(measure, backend))


def fixed_shape(run: Run) -> None:
    """One layer, and the whole tower with its update, of NVIDIA's published end-to-end run (recsys-examples,
    E2E_BENCHMARK.md): 32 histories of 4,099 tokens, 8 layers, D 1,024, 4 heads of 256. FLOPs as gr plan counts them.
    """
    count, length, dim, heads, width = (1, 20, 32, 1, 16) if run.small else (32, 4099, 1024, 4, 256)

    def measure(layers: int) -> str:
        offsets = torch.arange(count + 1, device=run.device) * length
        x_TD = torch.randn(count * length, dim, device=run.device, requires_grad=True)
        config = STUConfig(layers=layers, heads=heads, qk_dim=width, v_dim=width, dropout=0.0)
        tower = STU(config, dim=dim, max_length=length).to(run.device)
        optimizer = torch.optim.AdamW(tower.parameters(), fused=True)

        def step() -> None:
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
        peak = peaks(run.device).bfloat16
        return f"{ms:.1f} ms, {rate / 1e12:.0f} TFLOP/s, {rate / peak:.1%} of the measured peak"

    for layers in (1,) if run.small else (1, 8):
        name = f"{layers} layers of {heads} x {width}, {'with' if layers > 1 else 'without'} update"
        run.row("fixed shape", name, functools.partial(measure, layers))


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

            def measure(case: Case = case) -> dict[str, str]:
                return {name: f"{ms:.2f} ms" for name, ms in run.time(dict(case.variants)).items()}

            run.row("end to end", case.name, measure)


def summary(run: Run) -> Iterator[str]:
    """What to read first; the rows are above, and in --out."""
    wrong = [name for name, verdict in run.rows.get("correctness", {}).items() if not verdict.endswith("ok")]
    yield f"{run.machine}; {run.of}"
    yield f"correctness: {len(run.rows.get('correctness', {})) - len(wrong)} ok, wrong: {', '.join(wrong) or 'none'}"
    for section in ("ceilings", "attention", "softmax", "fixed shape", "end to end"):
        yield from (f"{section}: {name}: {value}" for name, value in run.rows.get(section, {}).items())
    tiles = run.rows.get("tiles", {})
    yield from (f"tiles: {line}" for line in gpu_tiles.verdicts(tiles, run.capability))
    for row in tiles.values():
        if "expected" in row:
            kernel, width, _ = row["key"]
            name = f"{kernel}, width {width}, {tuple(row['tiles'])}, {row['shape']}"
            yield f"model: {name}: {row['tflops']:.0f} TFLOP/s executed, {row['expected']:.0f} expected"
    if run.left:
        yield f"{run.left} rows or more were not started in time: run the command again with the same --out {run.out}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    run = Run(device, arguments.seconds, arguments.out)
    run.row("ceilings", "FLOP/s and bytes/s", lambda: asdict(peaks(run.device)))
    correctness(run)
    gpu_tiles.sweep(run)
    attention(run)
    fixed_shape(run)
    end_to_end(run, arguments.data)
    print()
    for line in summary(run):
        print(line)


if __name__ == "__main__":
    main()
