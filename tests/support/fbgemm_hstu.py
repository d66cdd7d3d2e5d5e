"""A stand-in for the package fbgemm_gpu.experimental.hstu: what its published sources say it computes, in plain torch.

Our reading of README.md, hstu/cuda_hstu_attention.py, src/hstu_ampere and src/hstu_hopper of pytorch/FBGEMM, at v1.8.0
(the same interface since v1.3.0) and at commit 71d6f8b of its main branch; no kernel was run. What the sources refuse
is refused here, except float32: with it a translation can be checked beyond the rounding of half precisions.
T packed tokens, H heads, D width, n length, c context tokens, t targets.
"""

import inspect
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_REQUIRED = inspect.Parameter.empty
_ENDS = {"target_group_size": 1, "window_size": (-1, -1), "alpha": 1.0, "rab": None, "has_drab": False}
_QKV = dict.fromkeys(("q", "k", "v"), _REQUIRED)
_LENGTHS = dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), _REQUIRED)
_COUNTS = dict.fromkeys(("num_contexts", "num_targets"), _REQUIRED)
SIGNATURES: dict[str, dict[str, Any]] = {
    "1.3 to 1.8": {
        **_QKV,
        **dict.fromkeys(("seq_offsets_q", "seq_offsets_k"), _REQUIRED),
        **_LENGTHS,
        **_COUNTS,
        **_ENDS,
        **{"is_delta_q": False, "descale_q": None, "descale_k": None, "descale_v": None},
    },
    "later": {
        **_QKV,
        **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"), _REQUIRED),
        **_LENGTHS,
        "scaling_seqlen": _REQUIRED,
        **_COUNTS,
        **_ENDS,
        **dict.fromkeys(("kv_cache", "page_offsets", "page_ids", "last_page_lens", "func")),
        "quant_mode": -1,
    },
}
_ABSENT = ("seqused", "rab", "drab", "delta", "descale", "cache", "page", "func", "quant")  # not in this stand-in


def stand_in(interface: str, calls: list[dict[str, Any]]) -> ModuleType:
    """A module with hstu_attn_varlen_func of one of SIGNATURES; each call adds its arguments to `calls`."""
    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
        for name, default in SIGNATURES[interface].items()
    ]
    signature = inspect.Signature(parameters)

    def hstu_attn_varlen_func(*args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        calls.append(given)
        assert all(value in (None, False, -1) for name, value in given.items() if any(x in name for x in _ABSENT))
        offsets_q, offsets_k = (
            value for name, value in given.items() if "seq_offsets_" in name or "cu_seqlens" in name
        )
        assert torch.equal(offsets_q, offsets_k)
        _check(given, offsets_q)
        return _attention(given, offsets_q)

    setattr(hstu_attn_varlen_func, "__signature__", signature)  # noqa: B010 (mypy: a function has none)
    module = ModuleType("fbgemm_gpu.experimental.hstu")
    setattr(module, "hstu_attn_varlen_func", hstu_attn_varlen_func)  # noqa: B010 (mypy: a module has none)
    return module


def _check(given: dict[str, Any], offsets: Tensor) -> None:
    """The conditions of the Python function and of hstu_ops_gpu.cpp, and what their 16-byte loads and TMA assume."""
    q, k, v = (given[name] for name in "qkv")
    assert q.dtype == k.dtype == v.dtype and k.shape == v.shape == q.shape
    assert q.shape[0] > 0 and q.shape[2] in (32, 64, 128, 256)
    for x in (q, k, v):
        _check_rows(x)
    counts = [x for x in (given["num_contexts"], given["num_targets"]) if x is not None]
    batch = offsets.numel() - 1
    assert batch > 0 and all(x.dtype == torch.int32 and x.is_contiguous() for x in (offsets, *counts))
    assert all(x.shape == (batch,) for x in counts)
    if counts and given["window_size"] != (-1, 0):
        raise ValueError("context or target is True and causal is not True, this is undefined behavior")
    assert given["max_seqlen_q"] == given["max_seqlen_k"] >= int(offsets.diff().max())
    assert given["target_group_size"] > 0


def _check_rows(x: Tensor) -> None:
    assert x.stride(-1) == 1, "Input tensor must have contiguous last dimension"
    assert x.data_ptr() % 16 == 0 and all(s > 0 and s % 8 == 0 for s in x.stride()[:2])


def _attention(given: dict[str, Any], offsets: Tensor) -> Tensor:
    q, k, v = (given[name] for name in "qkv")
    scaling = given.get("scaling_seqlen", -1)
    outputs = []
    for b, (start, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False)):
        contexts, targets = (0 if given[x] is None else int(given[x][b]) for x in ("num_contexts", "num_targets"))
        assert contexts + targets <= end - start
        seen = _seen(given, end - start, contexts, targets)
        scores = given["alpha"] * torch.einsum("ihd,jhd->hij", q[start:end].double(), k[start:end].double())
        outputs.append(torch.einsum("hij,jhd->ihd", F.silu(scores) * seen, v[start:end].double()))
    out = (torch.cat(outputs) / (given["max_seqlen_q"] if scaling == -1 else scaling)).to(q.dtype)
    if out.requires_grad:
        out.register_hook(_check_rows)
    return out


def _seen(given: dict[str, Any], n: int, c: int, t: int) -> Tensor:
    """bool [n, n], apply_mask of the forward kernels: a window of -1, or beyond max_seqlen_k, is no window."""
    longest = given["max_seqlen_k"]
    left, right = (longest if not 0 <= size <= longest else size for size in given["window_size"])
    row, col = torch.arange(n)[:, None], torch.arange(n)[None, :]
    seen = (col <= row + right) & (col >= row - left)
    history, group = n - t, given["target_group_size"]
    own = history + (row - history) // group * group
    seen &= ~((row >= history) & (col >= history) & (col < own))
    return seen | ((row < c) & (col < history))
