"""Attention against cached keys and values: the definition, and the bits of the packed operator."""

import pytest
import torch
from torch import Tensor

from gr.ops.backend import force_backend
from gr.ops.hstu_attention import AttentionMask, CachedKeys, hstu_attention, hstu_attention_cached, time_bucket_ids

H, Q, V, LONGEST, BUCKETS = 2, 16, 25, 400, 20
CACHED = [0, 1, 63, 64, 65, 130, 200]
ADDED = [1, 3, 70]


def cache_of(k: Tensor, v: Tensor, at: int) -> CachedKeys:
    """The first `at` rows; those after them have no tokens, and NaN where a read would show."""
    k, v = k.clone(), v.clone()
    k[at:], v[at:] = torch.nan, torch.nan
    return CachedKeys(k, v, torch.tensor([at]))


class Drawn:
    """q, k and v of a sequence as views of one buffer, and its times."""

    def __init__(self, tokens: int) -> None:
        torch.manual_seed(tokens)
        q, k, v = torch.randn(tokens, 2 * H * Q + H * V).split([H * Q, H * Q, H * V], 1)
        self.q, self.k, self.v = (x.unflatten(1, (H, -1)) for x in (q, k, v))
        self.offsets = torch.tensor([0, tokens])
        self.times = torch.randint(0, 10**6, (tokens,)).sort().values
        self.position, self.time = torch.randn(2 * LONGEST - 1), torch.randn(BUCKETS + 1)

    def packed(self, mask: AttentionMask, **biases: Tensor) -> Tensor:
        buckets = time_bucket_ids(self.times, self.times, self.offsets, num_buckets=BUCKETS)
        return hstu_attention(
            *(self.q, self.k, self.v, self.offsets),
            **{"max_length": LONGEST, "divisor": 211.0, "alpha": 0.25, "mask": mask},
            **biases,
            **({"time_buckets": buckets} if "time_bias" in biases else {}),
        )

    def cached(self, at: int, rows: slice, candidates: bool, mask: AttentionMask, **biases: Tensor) -> Tensor:
        if "time_bias" in biases:
            biases["bucket_ids"] = self.bucket_ids(at, rows, candidates)
        return hstu_attention_cached(
            *(x[at:][rows] for x in (self.q, self.k, self.v)),
            cache_of(self.k, self.v, at),
            **{"candidates": candidates, "divisor": 211.0, "alpha": 0.25, "mask": mask},
            **biases,
        )

    def bucket_ids(self, at: int, rows: slice, candidates: bool) -> Tensor:
        query = self.times[at:][rows]
        apart = (query[:, None] - self.times).abs()
        if not candidates:
            apart = torch.nn.functional.pad(apart, (0, len(query)))
        if candidates:
            apart = torch.cat([apart, torch.zeros(len(query), 1, dtype=torch.int64)], 1)
        edges = torch.tensor([0.301 * k for k in range(1, BUCKETS + 1)], dtype=torch.float64).exp().ceil().long()
        return torch.bucketize(apart, edges, right=True).to(torch.uint8)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("window", [0, 7, 100])
def test_has_the_bits_of_the_packed_operator(window: int, biased: bool) -> None:
    for at in CACHED:
        for added in ADDED:
            drawn = Drawn(at + added)
            biases = {"position_bias": drawn.position, "time_bias": drawn.time} if biased else {}
            everything = slice(None)
            appended = drawn.cached(at, everything, False, AttentionMask(max_attn_len=window), **biases)
            assert torch.equal(drawn.packed(AttentionMask(max_attn_len=window), **biases)[at:], appended), (at, added)
            masked = AttentionMask(torch.tensor([added]), window)
            scored = drawn.cached(at, everything, True, AttentionMask(max_attn_len=window), **biases)
            assert torch.equal(drawn.packed(masked, **biases)[at:], scored), (at, added)
            parts = [slice(0, 1), slice(1, added)]
            split = [drawn.cached(at, part, True, AttentionMask(max_attn_len=window), **biases) for part in parts]
            assert torch.equal(torch.cat(split), scored), (at, added)


@pytest.mark.parametrize("mask", [AttentionMask(None, 7, 3), AttentionMask(None, 0, 3), AttentionMask(None, 7, 0, 5)])
def test_candidates_under_masks_that_see_ahead(mask: AttentionMask) -> None:
    at, added = 70, 9
    drawn = Drawn(at + added)
    packed = AttentionMask(torch.tensor([added]), mask.max_attn_len, mask.contextual_len, mask.min_full_attn_seq_len)
    assert torch.equal(drawn.packed(packed)[at:], drawn.cached(at, slice(None), True, mask))
    with pytest.raises(ValueError, match="nothing can be appended"):
        drawn.cached(at, slice(None), False, mask)


@pytest.mark.parametrize("candidates", [False, True])
def test_every_path_is_the_definition(candidates: bool) -> None:
    drawn = Drawn(100)
    biases = {"position_bias": drawn.position, "time_bias": drawn.time}
    mask = AttentionMask(max_attn_len=50)
    with force_backend("torch"):
        defined = drawn.cached(70, slice(None), candidates, mask, **biases)
        packed = drawn.packed(AttentionMask(torch.tensor([30]) if candidates else None, 50), **biases)
    torch.testing.assert_close(packed[70:], defined, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(drawn.cached(70, slice(None), candidates, mask, **biases), defined, rtol=1e-5, atol=1e-5)


def test_a_bfloat16_cache_is_widened() -> None:
    drawn = Drawn(100)
    new = [x[70:] for x in (drawn.q, drawn.k, drawn.v)]
    half = cache_of(drawn.k.bfloat16(), drawn.v.bfloat16(), 70)
    wide = CachedKeys(half.k_NHQ.float(), half.v_NHV.float(), half.length)
    expected = hstu_attention_cached(*new, wide, candidates=True, divisor=211.0)
    assert torch.equal(hstu_attention_cached(*new, half, candidates=True, divisor=211.0), expected)


def test_refusals() -> None:
    drawn = Drawn(10)
    new, cache = (drawn.q[7:], drawn.k[7:], drawn.v[7:]), cache_of(drawn.k, drawn.v, 7)
    for operands, message in [
        ((drawn.q[7:], drawn.k, drawn.v[7:], cache), "k as q"),
        ((*new, cache._replace(k_NHQ=drawn.k[:, :1])), "the cache has heads"),
        ((*new, cache._replace(k_NHQ=drawn.k.double())), "float32 or bfloat16"),
        ((drawn.q[7:].double(), *new[1:], cache), "all float32"),
        ((*new, cache._replace(length=torch.tensor(7))), r"int64 \[1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            hstu_attention_cached(*operands, candidates=True, divisor=1.0)
    good = (*new, cache)
    with pytest.raises(ValueError, match="num_targets_B"):
        hstu_attention_cached(*good, candidates=True, divisor=1.0, mask=AttentionMask(torch.tensor([3])))
    with pytest.raises(ValueError, match="given together"):
        hstu_attention_cached(*good, candidates=True, divisor=1.0, time_bias=drawn.time)
    ids = torch.zeros(3, 7, dtype=torch.uint8)
    with pytest.raises(ValueError, match="bucket_ids must be"):
        hstu_attention_cached(*good, candidates=True, divisor=1.0, time_bias=drawn.time, bucket_ids=ids)
