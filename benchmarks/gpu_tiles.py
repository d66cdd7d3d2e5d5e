"""Every kernel of HSTU attention alone, with several tiles: which are to be shipped?"""

import functools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from benchmarks.kernel_model import KERNELS, bounds
from gr.ops.hstu_attention import AttentionMask, time_bucket_ids
from gr.ops.hstu_attention import triton as kernels
from gr.ops.hstu_attention.call import AttentionCall
from gr.ops.hstu_attention.triton import HOPPER_TILES, TILES, TileKey, Tiles, tiles_on

# By kernel, width, and whether there is a bias: what may be better than the shipped tiles. In half precision all
# compile for sm_90 without spills, with triton 3.7.1.
CANDIDATES: dict[tuple[str, int, bool], tuple[tuple[int, int, int, int], ...]] = {
    ("forward", 64, False): ((128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 3)),
    ("forward", 64, True): ((128, 64, 8, 3), (64, 64, 4, 2), (64, 32, 4, 2)),
    ("forward", 128, False): ((128, 64, 8, 3), (64, 64, 4, 2), (128, 128, 8, 2)),
    ("forward", 128, True): ((64, 16, 4, 2), (32, 32, 4, 2)),
    ("forward", 256, True): ((32, 64, 8, 2),),
    ("query_gradient", 64, False): ((128, 64, 8, 2),),
    ("query_gradient", 64, True): ((64, 64, 4, 2), (128, 32, 8, 2), (64, 16, 4, 2)),
    ("query_gradient", 128, False): ((64, 32, 4, 2), (128, 32, 8, 2), (64, 64, 4, 2)),
    ("query_gradient", 128, True): ((64, 64, 8, 2), (128, 16, 8, 2), (64, 16, 4, 2)),
    ("key_gradient", 64, False): ((128, 32, 8, 2), (64, 64, 4, 2)),
    ("key_gradient", 64, True): ((64, 64, 8, 2), (64, 16, 4, 2), (128, 16, 8, 2)),
    ("key_gradient", 128, False): ((64, 32, 4, 2), (32, 32, 4, 2)),
    ("key_gradient", 128, True): ((128, 16, 8, 2), (32, 32, 8, 2)),
    ("table_gradient", 64, True): ((64, 64, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1)),
    ("table_gradient", 128, True): ((64, 64, 8, 1), (64, 64, 4, 1), (32, 64, 4, 1)),
}


@dataclass(frozen=True)
class Shape:
    name: str
    lengths: tuple[int, ...]
    heads: int
    width: int
    biased: bool

    @property
    def work(self) -> float:
        """Pairs times width: a product of the tower takes twice as many operations."""
        return sum(n * (n + 1) / 2 for n in self.lengths) * self.heads * self.width


def shapes(small: bool) -> list[Shape]:
    if small:
        return [Shape("B 2 n 20 biased", (20, 9), 1, 16, True)]
    varied = tuple(1024 + 997 * i % 7169 for i in range(32))
    short = tuple(20 + 37 * i % 181 for i in range(128))
    return [
        Shape("B 512 n 256", (256,) * 512, 4, 64, False),
        Shape("B 32 n 2048", (2048,) * 32, 4, 64, False),
        Shape("B 16 n 8192", (8192,) * 16, 4, 128, False),
        Shape("B 32 n 1024 to 8192", varied, 4, 128, False),
        Shape("B 128 n 20 to 200 biased", short, 2, 64, True),
        Shape("B 32 n 2048 biased", (2048,) * 32, 4, 64, True),
        Shape("B 16 n 4096 biased", (4096,) * 16, 4, 128, True),
        Shape("B 16 n 4099", (4099,) * 16, 4, 256, False),
        Shape("B 16 n 2048 biased", (2048,) * 16, 4, 256, True),
    ]


class Inputs:
    """The tensors of a shape, and its kernels as calls without arguments. q, k and v are views of one buffer."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        tokens, longest = sum(shape.lengths), max(shape.lengths)
        uvqk = torch.randn(tokens, 4, shape.heads, shape.width, device=device).to(dtype)
        self.operands = (*uvqk.unbind(1)[1:], torch.randn_like(uvqk[:, 0]))
        offsets = pad(torch.tensor(shape.lengths).cumsum(0), (1, 0)).to(device)
        self.position: Tensor | None = None
        self.time: Tensor | None = None
        buckets = None
        if shape.biased:
            times = torch.cat([torch.randint(0, 10**6, (n,)).sort().values for n in shape.lengths]).to(device)
            buckets = time_bucket_ids(times, times + 100, offsets, num_buckets=128)
            self.position, self.time = torch.randn(2 * longest - 1, device=device), torch.randn(129, device=device)
        scale = torch.full((1,), 1 / longest, device=device)
        self.call = AttentionCall(offsets, longest, scale, shape.width**-0.5, AttentionMask(), buckets)
        self.gradients = [torch.empty_like(self.operands[0]) for _ in range(3)]

    def launch(self, kernel: str) -> object:
        tables, (dq, dk, dv) = (self.position, self.time), self.gradients
        match kernel:
            case "forward":
                return kernels.forward(self.call, self.operands[:3], *tables)
            case "query_gradient":
                return kernels.query_gradient(self.call, self.operands, *tables, dq)
            case "key_gradient":
                return kernels.key_gradient(self.call, self.operands, *tables, dk, dv)
            case "table_gradient":
                return kernels.table_gradients(self.call, self.operands, *tables, None)
        raise ValueError(kernel)


@contextmanager
def shipping(key: TileKey, tiles: Tiles) -> Iterator[None]:
    """Inside, one kernel has other tiles on every GPU."""
    tables = [(table, table[key]) for table in (TILES, HOPPER_TILES) if key in table]
    for table, _ in tables:
        table[key] = tiles
    try:
        yield
    finally:
        for table, shipped in tables:
            table[key] = shipped


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """Inside, a launch only has its kernel compiled, by a pool of threads; leaving waits for them all.

    What does not compile says so when it is launched.
    """
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *arguments, grid=grid, warmup=True, **options)

    JITFunction.run = compile_only
    try:
        with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            yield
    finally:
        JITFunction.run = run


def variants(shape: Shape, run: Any) -> Iterator[tuple[TileKey, Tiles]]:
    """Each variant of each kernel that the shape runs; the shipped one first."""
    width = max(64, shape.width)
    shipped = tiles_on(run.capability)
    for kernel in (*KERNELS, *(("table_gradient",) if shape.biased else ())):
        key = (kernel, 2, width, shape.biased)
        tried = CANDIDATES.get((kernel, width, shape.biased), ())
        others = dict.fromkeys((shipped[key], *(Tiles(*other) for other in tried[: 1 if run.small else None])))
        yield from ((key, tiles) for tiles in others)


def sweep(run: Any) -> None:
    """run: benchmarks.gpu.Run. A row for each kernel, shape and variant: milliseconds, or why there are none."""
    dtype = torch.float16 if run.small else torch.bfloat16
    for shape in shapes(run.small):
        inputs = functools.cache(functools.partial(Inputs, shape, run.device, dtype))
        if not (run.small or run.late):
            with compiling_ahead():
                for key, tiles in variants(shape, run):
                    with shipping(key, tiles):
                        inputs().launch(key[0])
        for key, tiles in variants(shape, run):
            name = f"{shape.name} / {key[0]} / {tuple(tiles)}"
            run.row("tiles", name, functools.partial(_row, run, inputs, shape, key, tiles))


def _row(run: Any, inputs: Callable[[], Inputs], shape: Shape, key: TileKey, tiles: Tiles) -> dict[str, Any]:
    kernel, _, width, biased = key
    with shipping(key, tiles):
        try:
            ms = run.time({kernel: lambda: inputs().launch(kernel)})[kernel]
        except OutOfResources as error:
            return {"key": [kernel, width, biased], "tiles": list(tiles), "fault": str(error)}
    row = {"key": [kernel, width, biased], "tiles": list(tiles), "shape": shape.name, "ms": ms}
    if kernel in KERNELS and not biased and width <= 128:
        counts = KERNELS[kernel]
        row["tflops"] = 2 * (counts.scores + counts.sums) * shape.work / ms / 1e9
        row["expected"] = bounds(kernel, tiles, width).expected
    return row


def verdicts(rows: dict[str, dict[str, Any]], capability: int) -> Iterator[str]:
    """For each kernel the tiles with the least time over its shapes (geometric mean), against the shipped ones."""
    times: dict[tuple[str, int, bool], dict[Tiles, dict[str, float]]] = {}
    for row in rows.values():
        if "ms" in row:
            kernel, width, biased = row["key"]
            times.setdefault((kernel, width, biased), {}).setdefault(Tiles(*row["tiles"]), {})[row["shape"]] = row["ms"]
    for (kernel, width, biased), of_tiles in times.items():
        shipped = tiles_on(capability)[kernel, 2, width, biased]
        name = f"{kernel}, width {width}, {'biased' if biased else 'plain'}"
        if shipped not in of_tiles:
            yield f"{name}: the shipped tiles {tuple(shipped)} did not run"
            continue
        gains = {
            tiles: _mean_ratio(of_tiles[shipped], taken)
            for tiles, taken in of_tiles.items()
            if taken.keys() == of_tiles[shipped].keys()
        }
        best = max(gains, key=lambda tiles: gains[tiles])
        keep = "keep" if gains[best] < 1.02 else f"ship {tuple(best)}, {gains[best]:.2f} times as fast as"
        yield f"{name}: {keep} {tuple(shipped)}"


def _mean_ratio(base: dict[str, float], other: dict[str, float]) -> float:
    return math.exp(sum(math.log(base[shape] / other[shape]) for shape in base) / len(base))
