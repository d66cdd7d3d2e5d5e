"""Operators against the obvious way to write them: `python -m benchmarks.ops [attention sampled_logits ...]`.

Shapes are those of a MovieLens-1M step: B = 128 sequences, log-normal lengths cut to [20, 200] with a mean near 107, 1
head of 50, K = 3,883 items, 128 negatives. Every variant is forward plus backward, one thread, CPU time (compare.py).
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.compare import compare, print_machine, report
from gr.ops.backend import Backend, force_backend
from gr.ops.hstu_attention import TimeBuckets, hstu_attention, time_bucket_ids
from gr.ops.jagged import jagged_to_padded, padded_to_jagged
from gr.ops.linear_cross_entropy import linear_cross_entropy
from gr.ops.linear_cross_entropy.reference import linear_cross_entropy_reference
from gr.ops.sampled_logits import sampled_logits
from gr.ops.softmax_attention import softmax_attention

_EXAMPLES, _LONGEST, _WIDTH, _ITEMS, _NEGATIVES, _BUCKETS = 128, 200, 50, 3883, 128, 128


def _offsets() -> Tensor:
    lengths = torch.empty(_EXAMPLES).log_normal_(4.55, 0.75).round().long().clamp(20, _LONGEST)
    return F.pad(lengths.cumsum(0), (1, 0))


def _with_backend(name: Backend, run: Callable[[], object]) -> Callable[[], object]:
    def forced() -> object:
        with force_backend(name):
            return run()

    return forced


def _padded_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, position: Tensor | None, time: Tensor | None, ids: Tensor
) -> Tensor:
    """The public research code's way: everything padded to [B, H, N, N], biases gathered element by element."""
    q, k, v = (jagged_to_padded(x, offsets, _LONGEST).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(2, 3)
    if position is not None:
        i = torch.arange(_LONGEST)
        scores = scores + position[_LONGEST - 1 + i[None, :] - i[:, None]]
    if time is not None:
        scores = scores + time[ids][:, None]
    weights = F.silu(scores) / 211 * torch.ones(_LONGEST, _LONGEST).tril()
    return padded_to_jagged((weights @ v).transpose(1, 2), offsets, int(offsets[-1]))


def _padded_ids(buckets: TimeBuckets, offsets: Tensor) -> Tensor:
    ids = torch.zeros(_EXAMPLES, _LONGEST, _LONGEST, dtype=torch.long)
    for b, n in enumerate(offsets.diff().tolist()):
        i, j = torch.tril_indices(n, n)
        ids[b, i, j] = buckets.ids_P[int(buckets.pair_offsets_B1[b]) :][: i.numel()].long()
    return ids


def attention() -> None:
    offsets = _offsets()
    tokens = int(offsets[-1])
    timestamps = torch.randint(0, 10**7, (tokens,)).sort().values
    queries = timestamps + torch.randint(0, 10**4, (tokens,))
    buckets = time_bucket_ids(timestamps, queries, offsets, num_buckets=_BUCKETS)
    ids = _padded_ids(buckets, offsets)
    uvqk = torch.randn(tokens, 4, 1, _WIDTH)
    grad = torch.randn(tokens, 1, _WIDTH)
    position, time = (torch.randn(size).requires_grad_() for size in (2 * _LONGEST - 1, _BUCKETS + 1))
    for biased in (False, True):
        tables: dict[str, Any] = (
            {"position_bias": position, "time_bias": time, "time_buckets": buckets} if biased else {}
        )

        def run(dtype: torch.dtype, tables: dict[str, Any] = tables, biased: bool = biased) -> Callable[[], object]:
            q, k, v = (x.to(dtype).requires_grad_() for x in uvqk.unbind(1)[1:])
            extra = [position, time] if biased else []
            return lambda: torch.autograd.grad(
                hstu_attention(q, k, v, offsets, max_length=_LONGEST, divisor=211.0, **tables),
                [q, k, v, *extra],
                grad.to(dtype),
            )

        def padded(biased: bool = biased) -> object:
            q, k, v = (x.detach().requires_grad_() for x in uvqk.unbind(1)[1:])
            extra = [position, time] if biased else []
            out = _padded_attention(q, k, v, offsets, position if biased else None, time if biased else None, ids)
            return torch.autograd.grad(out, [q, k, v, *extra], grad)

        def softmax() -> object:
            q, k, v = (x.detach().requires_grad_() for x in uvqk.unbind(1)[1:])
            return torch.autograd.grad(softmax_attention(q, k, v, offsets, max_length=_LONGEST), [q, k, v], grad)

        variants = {
            "padded torch": padded,
            "blocked torch": _with_backend("torch", run(torch.float32)),
            "native float32": _with_backend("native", run(torch.float32)),
            "native bfloat16": _with_backend("native", run(torch.bfloat16)),
        }
        if not biased:
            variants["softmax (SDPA, padded)"] = softmax
        name = "with position and time bias" if biased else "without bias"
        report(
            f"hstu_attention {name}, T={tokens}, h1 d{_WIDTH}, forward+backward",
            compare(variants),
            baseline="padded torch",
        )

    def ids_by(name: Backend) -> Callable[[], object]:
        return _with_backend(name, lambda: time_bucket_ids(timestamps, queries, offsets, num_buckets=_BUCKETS))

    report(
        "time_bucket_ids, once per batch",
        compare({"torch": ids_by("torch"), "native": ids_by("native")}),
        baseline="torch",
    )


def logits() -> None:
    tokens = 13_700
    queries = torch.randn(tokens, _WIDTH, requires_grad=True)
    items = torch.randn(_ITEMS, _WIDTH, requires_grad=True)
    index = torch.randint(0, _ITEMS, (tokens, _NEGATIVES + 1))
    grad = torch.randn(tokens, _NEGATIVES + 1)

    def gathered() -> object:
        out = torch.einsum("td,tsd->ts", queries, items[index])
        return torch.autograd.grad(out, [queries, items], grad)

    def all_items() -> object:
        return torch.autograd.grad((queries @ items.T).gather(1, index), [queries, items], grad)

    def run() -> object:
        return torch.autograd.grad(sampled_logits(queries, items, index), [queries, items], grad)

    variants = {
        "gather [T, S, D]": gathered,
        "all items, then gather": all_items,
        "chunked torch": _with_backend("torch", run),
        "native": _with_backend("native", run),
    }
    title = f"sampled_logits T={tokens} S={_NEGATIVES + 1} K={_ITEMS} D={_WIDTH}, forward+backward"
    report(title, compare(variants, rounds=5), baseline="gather [T, S, D]")


def cross_entropy() -> None:
    tokens = 13_700
    queries = F.normalize(torch.randn(tokens, _WIDTH)).requires_grad_()
    items = F.normalize(torch.randn(_ITEMS, _WIDTH)).requires_grad_()
    target = torch.randint(0, _ITEMS, (tokens,))

    def plain() -> object:
        loss = linear_cross_entropy_reference(queries, items, target, scale=20.0).mean()
        return torch.autograd.grad(loss, [queries, items])

    def chunked(chunk: int) -> Callable[[], object]:
        return lambda: torch.autograd.grad(
            linear_cross_entropy(queries, items, target, scale=20.0, chunk=chunk).mean(), [queries, items]
        )

    variants: dict[str, Callable[[], object]] = {"F.cross_entropy on [T, K]": plain}
    variants |= {f"chunk {chunk}": chunked(chunk) for chunk in (64, 256, 1024)}
    title = f"linear_cross_entropy T={tokens} K={_ITEMS} D={_WIDTH}, forward+backward"
    report(title, compare(variants, rounds=5), baseline="F.cross_entropy on [T, K]")


_BENCHMARKS = {"attention": attention, "sampled_logits": logits, "linear_cross_entropy": cross_entropy}


def main(names: list[str]) -> None:
    unknown = set(names) - set(_BENCHMARKS)
    if unknown:
        raise SystemExit(f"unknown benchmark {', '.join(sorted(unknown))}; there are {', '.join(_BENCHMARKS)}")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print_machine()
    for name in names or _BENCHMARKS:
        _BENCHMARKS[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
