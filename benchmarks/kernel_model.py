"""What bounds each HSTU attention kernel on an H100 or H200, counted by tile; to be held against the first GPU run.

    python -m benchmarks.kernel_model

For one tile of outer x inner scores, without bias or mask, half precision, in clocks of one SM:
mma      products on tensor cores
shared   operands that wgmma reads from shared memory (each warp group by itself), and tiles written there
L2       rows loaded
special  one tanh an element
issue    instructions an element, counted in compiled code (kernels of 128 x 64 and 64 x 128 tiles, width 64)

The tensor side takes the longest of mma, shared and L2, the vector side the longer of special and issue. Half of the
shorter side is taken to be exposed, and what is left is scaled by what Triton's softmax attention reaches of the same
count (392 of 593 TFLOP/s at width 128 without a mask, FlashAttention-3's charts). Biases and HBM are not counted.
"""

from dataclasses import dataclass

from gr.ops.hstu_attention.triton import Tiles, tiles_on

SMS, CLOCK_HZ, MMA_FLOP, SHARED_BYTES, SPECIAL, LANES = 132, 1.755e9, 4096, 128, 16, 128
L2_BYTES = 5.5e12 / SMS / CLOCK_HZ  # a clock and SM
REACHED = 392 / 593


@dataclass(frozen=True)
class Kernel:
    """scores: products of two operands in shared memory. sums: products of a computed tile, which is in registers."""

    scores: int
    sums: int
    instructions: float


KERNELS = {
    "forward": Kernel(1, 1, 6.3),
    "query_gradient": Kernel(2, 1, 10.6),
    "key_gradient": Kernel(2, 2, 11.5),
}


@dataclass(frozen=True)
class Bounds:
    """TFLOP/s of executed products at which each resource is full, and what is expected."""

    mma: float
    shared: float
    l2: float
    special: float
    issue: float
    expected: float


def bounds(kernel: str, tiles: Tiles, width: int) -> Bounds:
    """width: of queries, keys and values alike."""
    counts, outer, inner = KERNELS[kernel], tiles.outer, tiles.inner
    flops = (counts.scores + counts.sums) * 2 * outer * inner * width
    groups = tiles.warps // 4
    parts = max(1, groups * 64 // outer)  # warp groups that share 64 rows, each with a part of the columns
    element = 2
    read = counts.scores * (64 + inner / parts) * width + counts.sums * inner * width / parts
    loaded = 2 * inner * width * element
    clocks = {
        "mma": flops / MMA_FLOP,
        "shared": (groups * read * element + loaded) / SHARED_BYTES,
        "l2": loaded / L2_BYTES,
        "special": outer * inner / SPECIAL,
        "issue": counts.instructions * outer * inner / LANES,
    }
    tensor = max(clocks["mma"], clocks["shared"], clocks["l2"])
    vector = max(clocks["special"], clocks["issue"])
    expected = (max(tensor, vector) + min(tensor, vector) / 2) / REACHED
    rates = {name: flops / taken * CLOCK_HZ * SMS / 1e12 for name, taken in clocks.items()}
    return Bounds(**rates, expected=flops / expected * CLOCK_HZ * SMS / 1e12)


def both_ways(expected: dict[str, float]) -> float:
    """Useful TFLOP/s, forward and backward: 14 d a pair, of which 4, 6 and 8 d are executed by the kernels."""
    executed = {"forward": 4, "query_gradient": 6, "key_gradient": 8}
    return 14 / sum(executed[kernel] / rate for kernel, rate in expected.items())


def main() -> None:
    print(f"{'kernel':16s} width {'tiles':18s} {'mma':>6s} shared     L2 special issue expected TFLOP/s executed")
    for width in (64, 128):
        expected = {}
        for kernel in KERNELS:
            tiles = tiles_on(90)[kernel, 2, width, False]
            of = bounds(kernel, tiles, width)
            expected[kernel] = of.expected
            rates = f"{of.mma:6.0f} {of.shared:6.0f} {of.l2:6.0f} {of.special:7.0f} {of.issue:5.0f} {of.expected:8.0f}"
            print(f"{kernel:16s} {width:5d} {tuple(tiles)!s:18s} {rates}")
        print(f"forward and backward at width {width}: {both_ways(expected):.0f} TFLOP/s useful")


if __name__ == "__main__":
    main()
