"""HSTU against a padded definition of its own, and what must hold of any tower.

B examples, N padded length, H heads.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gr.config.towers import HSTUConfig
from gr.sequence import JaggedSequence
from gr.towers import build_tower
from gr.towers.hstu import HSTU
from tests.support.towers import D, N, check_against, randomised, sequence, to_packed, to_padded

DIVISORS = ("constant", "max_len", "actual_len")
LENGTHS = [4, 0, 1, 9, 2]


def build(**fields: object) -> HSTU:
    options = {"layers": 2, "heads": 2, "qk_dim": 3, "v_dim": 4, "dropout": 0.0, "time_bias": True, **fields}
    tower = build_tower(HSTUConfig(**options), dim=D, max_length=N)
    assert isinstance(tower, HSTU)
    return tower


def normalise(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()


def padded_hstu(tower: HSTU, seq: JaggedSequence) -> Tensor:
    """facts/hstu.md section 1.2, written from that table: Eq. 1-3 of arXiv 2402.17152 as the public code has them."""
    config = tower.config
    H, Q, V = config.heads, config.qk_dim, config.v_dim
    lengths_B = seq.offsets_B1.diff()
    i, j = torch.arange(N)[:, None], torch.arange(N)[None, :]
    mask_BNN = (j <= i) & (i < lengths_B[:, None, None])
    divisor_B = {
        "constant": torch.full_like(lengths_B, config.divisor_value, dtype=torch.float64),
        "max_len": torch.full_like(lengths_B, N, dtype=torch.float64),
        "actual_len": lengths_B.clamp(min=1).double(),
    }[config.divisor]
    x_BND = to_padded(seq.values_TD, seq.offsets_B1)
    for layer in tower.layers:
        projected = normalise(x_BND) @ layer.uvqk
        projected = projected * torch.sigmoid(projected)
        u, v, q, k = projected.split([H * V, H * V, H * Q, H * Q], dim=-1)
        q, k, v = (t.reshape(len(lengths_B), N, H, -1) for t in (q, k, v))
        scores_BHNN = torch.einsum("bihq,bjhq->bhij", q, k)
        if config.position_bias:
            scores_BHNN = scores_BHNN + layer.position_bias[(N - 1) + (j - i)]
        if config.time_bias:
            scores_BHNN = scores_BHNN + layer.time_bias[buckets(seq, config.time_buckets)][:, None]
        weights = scores_BHNN * torch.sigmoid(scores_BHNN) / divisor_B[:, None, None, None] * mask_BNN[:, None]
        a = normalise(torch.einsum("bhij,bjhv->bihv", weights, v).flatten(2))
        gated = torch.cat([u, a, u * a], dim=-1) if config.concat_ua else u * a
        x_BND = x_BND + gated @ layer.output.weight.T + layer.output.bias
    return to_packed(x_BND, seq.offsets_B1)


def buckets(seq: JaggedSequence, last: int) -> Tensor:
    """int64 [B, N, N]: floor(ln(max(1, |t_(i+1) - t_j|)) / 0.301), at most `last`."""
    assert seq.timestamps_T is not None and seq.query_timestamps_T is not None
    out = torch.zeros(len(seq.offsets_B1) - 1, N, N, dtype=torch.int64)
    for b, (start, end) in enumerate(itertools.pairwise(seq.offsets_B1.tolist())):
        for i, j in itertools.product(range(end - start), repeat=2):
            apart = abs(int(seq.query_timestamps_T[start + i] - seq.timestamps_T[start + j]))
            out[b, i, j] = min(math.floor(math.log(max(1, apart)) / 0.301), last)
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("divisor", DIVISORS)
@pytest.mark.parametrize("position_bias", [True, False], ids=["position", ""])
@pytest.mark.parametrize("time_bias", [True, False], ids=["time", ""])
@pytest.mark.parametrize("concat_ua", [True, False], ids=["ua", ""])
def test_equals_the_definition(concat_ua, time_bias, position_bias, divisor, dtype) -> None:
    """float64 runs the operator's reference, float32 its fast path."""
    tower = build(
        concat_ua=concat_ua,
        time_bias=time_bias,
        position_bias=position_bias,
        divisor=divisor,
        divisor_value=11.0,
        time_buckets=30,
    )
    seq = sequence(LENGTHS)
    assert {0, 30} < set(buckets(seq, 30).flatten().tolist())
    check_against(padded_hstu, tower, seq, dtype)


@pytest.mark.parametrize("attention", ["pointwise", "softmax"])
@pytest.mark.parametrize("divisor", DIVISORS)
def test_later_tokens_never_change_earlier_outputs(divisor: str, attention: str) -> None:
    bias = attention == "pointwise"
    tower = randomised(build(divisor=divisor, attention=attention, position_bias=bias, time_bias=bias)).eval()
    before = sequence([7, 5])
    assert before.timestamps_T is not None and before.query_timestamps_T is not None
    for cut in (1, 4):
        values, times = before.values_TD.clone(), before.timestamps_T.clone()
        values[cut:7], times[cut:7] = 1e3 * torch.randn(7 - cut, D, dtype=torch.float64), 0
        queries = before.query_timestamps_T.clone()
        queries[cut:7] += 10**6
        after = JaggedSequence(values, before.offsets_B1, N, times, queries)
        wanted, got = tower(before).values_TD, tower(after).values_TD
        assert torch.equal(got[:cut], wanted[:cut]) and torch.equal(got[7:], wanted[7:])
        assert (got[cut:7] != wanted[cut:7]).any(dim=1).all()


@pytest.mark.parametrize("divisor", DIVISORS)
def test_an_example_does_not_see_its_batch_mates(divisor: str) -> None:
    tower = randomised(build(divisor=divisor), torch.float32).eval()
    batch = sequence(LENGTHS, dtype=torch.float32)
    poisoned = batch.with_values(batch.values_TD.clone())
    poisoned.values_TD[:4] = torch.nan
    poisoned.values_TD[5:14] = torch.nan
    got, wanted = tower(poisoned).values_TD, tower(batch).values_TD
    assert torch.allclose(got[[4, 14, 15]], wanted[[4, 14, 15]], rtol=1e-5, atol=1e-6)
    for start, end in ((0, 4), (5, 14)):
        own = JaggedSequence(
            batch.values_TD[start:end],
            torch.tensor([0, end - start]),
            N,
            batch.timestamps_T[start:end],
            batch.query_timestamps_T[start:end],
        )
        assert torch.allclose(tower(own).values_TD, wanted[start:end], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", ["pointwise", "softmax"])
def test_every_parameter_gets_a_gradient(attention: str) -> None:
    bias = attention == "pointwise"
    tower = randomised(build(attention=attention, position_bias=bias, time_bias=bias, concat_ua=True))
    tower(sequence([N, 3])).values_TD.square().sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    if bias:
        gradient = tower.layers[0].position_bias.grad
        assert (gradient[:N] != 0).all() and (gradient[N:] == 0).all(), "the future has no weight"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("attention", ["pointwise", "softmax"])
@pytest.mark.parametrize("lengths", [[0], [0, 0, 0]])
def test_no_tokens_still_give_every_parameter_a_gradient(attention: str, lengths: list[int], dtype) -> None:
    """DDP waits for all of them: None on the one rank without tokens would hang the run."""
    bias = attention == "pointwise"
    tower = randomised(build(attention=attention, position_bias=bias, time_bias=bias, divisor="actual_len"), dtype)
    out = tower(sequence(lengths, dtype=dtype)).values_TD
    assert out.shape == (0, D)
    out.sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None and (parameter.grad == 0).all(), name


def test_dropout_only_in_training() -> None:
    tower = randomised(build(dropout=0.5))
    without = randomised(build(dropout=0.0))
    seq = sequence(LENGTHS)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(tower.train()(seq).values_TD)
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    assert torch.equal(tower.eval()(seq).values_TD, without(seq).values_TD)
    assert not torch.equal(outputs[0], without(seq).values_TD)


def test_time_bias_needs_timestamps() -> None:
    with pytest.raises(ValueError, match="time_bias=True needs a sequence with timestamps_T and query_timestamps_T"):
        build()(sequence([3], times=False))
    build(time_bias=False)(sequence([3], times=False, dtype=torch.float32))


def test_initial_weights() -> None:
    """N(0, 0.02) for the projection and the biases, Xavier and zero for the output; and no two layers alike."""
    torch.manual_seed(0)
    tower = build_tower(HSTUConfig(layers=2, heads=2, qk_dim=20, time_bias=True), dim=40, max_length=500)
    first, second = tower.layers
    for parameter in (first.uvqk, first.position_bias):
        assert abs(parameter.std() - 0.02) < 0.002 and abs(parameter.mean()) < 0.002
    assert F.pad(first.output.bias, (0, 0)).abs().sum() == 0
    bound = math.sqrt(6 / sum(first.output.weight.shape))
    assert 0.95 * bound < first.output.weight.abs().max() <= bound
    assert not torch.equal(first.uvqk, second.uvqk)
    assert first.time_bias.shape == (129,) and first.position_bias.shape == (999,)
