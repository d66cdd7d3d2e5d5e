"""STU against its equations on padded tensors, and what candidates, batch mates and recomputation must not change.

B examples, N padded length, H heads.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from gr.config.retrieval import RetrievalModelConfig
from gr.config.towers import STUConfig
from gr.ops.backend import backend_for
from gr.sequence import JaggedSequence
from gr.towers import build_tower
from gr.towers.stu import STU
from tests.support.tolerances import relative_error
from tests.support.towers import D, N, check_against, randomised, sequence, to_packed, to_padded

LENGTHS = [4, 0, 3, 9, 5]
TARGETS = torch.tensor([1, 0, 0, 4, 2])
RECOMPUTE = ("gate", "layer")


def build(*, dim: int = D, max_length: int = N, **fields: object) -> STU:
    options = {"layers": 2, "heads": 2, "qk_dim": 3, "v_dim": 4, "dropout": 0.0, **fields}
    return STU(STUConfig(**options), dim=dim, max_length=max_length)


def with_candidates(lengths: list[int], targets: Tensor | None, prefix: int, dtype=torch.float64) -> JaggedSequence:
    return replace(sequence(lengths, dtype=dtype, times=False), num_targets_B=targets, contextual_len=prefix)


def normalise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt() * weight + bias


def mask_of(tower: STU, seq: JaggedSequence) -> Tensor:
    """bool [B, N, N] as the production code has it: prefix and candidates are one place each."""
    lengths = seq.offsets_B1.diff().tolist()
    targets = [0] * len(lengths) if seq.num_targets_B is None else seq.num_targets_B.tolist()
    window, full, prefix = tower.config.max_attn_len, tower.config.min_full_attn_seq_len, seq.contextual_len
    seen = torch.zeros(len(lengths), N, N, dtype=torch.bool)
    for b, (length, count) in enumerate(zip(lengths, targets, strict=True)):
        history = length - count
        for i, j in itertools.product(range(length), repeat=2):
            place = min(i, history)
            past = j < min(i, history)
            apart = place - max(j, prefix - 1)
            near = not window or apart <= window or (full and place >= history - full)
            seen[b, i, j] = i == j or (past and near) or (i < prefix and j < history)
    return seen


def padded_stu(tower: STU, seq: JaggedSequence) -> Tensor:
    """The production layer, stage by stage, on [B, N, D]."""
    config = tower.config
    H, Q, V = config.heads, config.qk_dim, config.v_dim
    divisor = config.divisor or N
    mask_BNN = mask_of(tower, seq)
    x_BND = to_padded(seq.values_TD, seq.offsets_B1)
    for layer in tower.layers:
        normed = normalise(x_BND, layer.input_norm.weight, layer.input_norm.bias)
        projected = normed @ layer.uvqk.weight.T + layer.uvqk.bias
        u, v, q, k = projected.split([H * V, H * V, H * Q, H * Q], dim=-1)
        u = u * torch.sigmoid(u)
        q, k, v = (t.unflatten(-1, (H, -1)) for t in (q, k, v))
        scores_BHNN = torch.einsum("bihq,bjhq->bhij", q, k) / math.sqrt(Q)
        weights = scores_BHNN * torch.sigmoid(scores_BHNN) / divisor * mask_BNN[:, None]
        a_BNHV = torch.einsum("bhij,bjhv->bihv", weights, v)
        weight, bias = layer.output_norm.weight, layer.output_norm.bias
        if config.group_norm:
            a_normed = normalise(a_BNHV, weight[:, None], bias[:, None]).flatten(2)
        else:
            a_normed = normalise(a_BNHV.flatten(2), weight, bias)
        gated = torch.cat([u, a_BNHV.flatten(2), u * a_normed], dim=-1)
        x_BND = x_BND + gated @ layer.output.weight.T
    return to_packed(x_BND, seq.offsets_B1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("group_norm", [True, False], ids=["groups", ""])
@pytest.mark.parametrize(("targets", "prefix"), [(None, 0), (TARGETS, 0), (None, 2), (TARGETS, 3)], ids=str)
@pytest.mark.parametrize(("window", "full"), [(0, 0), (2, 0), (2, 3)], ids=str)
def test_equals_the_definition(window, full, targets, prefix, group_norm, recompute, dtype) -> None:
    """float64 runs the operator's definition, float32 its fast path."""
    tower = build(
        group_norm=group_norm, recompute=recompute, max_attn_len=window, min_full_attn_seq_len=full, divisor=5.5
    )
    check_against(padded_stu, tower, with_candidates(LENGTHS, targets, prefix), dtype)


def test_divisor_is_the_longest_sequence_there_can_be() -> None:
    assert build().divisor == N and build(divisor=3.5).divisor == 3.5
    check_against(padded_stu, build(), with_candidates(LENGTHS, TARGETS, 0), torch.float64)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_a_candidate_moves_no_other_output(recompute: str) -> None:
    """By no bit, through a stack of layers, with a prefix that sees the whole history."""
    tower = randomised(build(recompute=recompute), torch.float32)
    before = with_candidates([9, 7], torch.tensor([4, 3]), 2, torch.float32)
    wanted = tower(before).values_TD
    for changed in (5, 7, 8, 14):
        values_TD = before.values_TD.clone()
        values_TD[changed] = 100 * torch.randn(D)
        moved = (tower(before.with_values(values_TD)).values_TD != wanted).any(1)
        assert moved.nonzero().flatten().tolist() == [changed]


def test_history_ahead_of_candidates_is_causal() -> None:
    tower = randomised(build(max_attn_len=3), torch.float32)
    before = with_candidates([9], torch.tensor([2]), 0, torch.float32)
    values_TD = before.values_TD.clone()
    values_TD[4] = 100 * torch.randn(D)
    moved = (tower(before.with_values(values_TD)).values_TD != tower(before).values_TD).any(1)
    assert moved.tolist() == [False] * 4 + [True] * 5


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("window", [0, 2])
def test_candidates_at_once_are_candidates_one_by_one(window: int, prefix: int) -> None:
    tower = randomised(build(max_attn_len=window))
    together = with_candidates([9], torch.tensor([4]), prefix)
    wanted = tower(together).values_TD[5:]
    for candidate in range(5, 9):
        rows = [0, 1, 2, 3, 4, candidate]
        alone = replace(
            together.with_values(together.values_TD[rows]),
            offsets_B1=torch.tensor([0, 6]),
            num_targets_B=torch.tensor([1]),
        )
        assert torch.allclose(tower(alone).values_TD[-1], wanted[candidate - 5], rtol=1e-12, atol=1e-13)


def test_an_example_does_not_depend_on_its_batch_mates() -> None:
    """Not on their values, by no bit; and not on their lengths, as it would if the longest of a batch divided."""
    tower = randomised(build(max_length=50), torch.float32)
    batch = with_candidates(LENGTHS, TARGETS, 0, torch.float32)
    poisoned = batch.with_values(batch.values_TD.clone())
    poisoned.values_TD[:4] = torch.nan
    poisoned.values_TD[7:] = torch.nan
    wanted = tower(batch).values_TD[4:7]
    assert torch.equal(tower(poisoned).values_TD[4:7], wanted)
    own_TD = batch.values_TD[4:7]
    for mate in (0, 3, 40):
        mates = JaggedSequence(
            torch.cat([own_TD, torch.randn(mate, D)]), torch.tensor([0, 3, 3 + mate]), max_length=max(3, mate)
        )
        assert torch.allclose(tower(mates).values_TD[:3], wanted, rtol=1e-6, atol=1e-7)


def random_batch(lengths: list[int], dim: int, dtype: torch.dtype = torch.float32) -> JaggedSequence:
    values_TD = torch.randn(sum(lengths), dim, generator=torch.Generator().manual_seed(3)).to(dtype)
    return JaggedSequence(values_TD.requires_grad_(), torch.tensor([0, *lengths]).cumsum(0), max(lengths))


def gradients(tower: STU, seq: JaggedSequence, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    out_TD = tower(seq).values_TD
    return [out_TD.detach(), *torch.autograd.grad(out_TD.square().sum(), [seq.values_TD, *tower.parameters()])]


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_same_bits_every_time_and_on_two_threads(recompute: str) -> None:
    """Between thread counts, outputs and gradients of the input keep their bits. Gradients of parameters are sums over
    the tokens, which torch's products and norms split by threads: they differ in the last bits.
    """
    tower = build(dim=32, max_length=700, heads=2, qk_dim=16, v_dim=16, recompute=recompute)
    seq = replace(random_batch([700, 1, 300], 32), num_targets_B=torch.tensor([90, 0, 5]))
    torch.set_num_threads(1)
    once, again = gradients(tower, seq), gradients(tower, seq)
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))
    torch.set_num_threads(2)
    twice, again = gradients(tower, seq), gradients(tower, seq)
    assert all(torch.equal(x, y) for x, y in zip(twice, again, strict=True))
    if backend_for(torch.device("cpu")) == "native":
        assert torch.equal(once[0], twice[0]) and torch.equal(once[1], twice[1])
    for (name, _), one, two in zip(tower.named_parameters(), once[2:], twice[2:], strict=True):
        assert relative_error(two, one) < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recomputation_changes_no_bit(dtype: torch.dtype) -> None:
    """With dropout, whose draws are made again."""
    seq = replace(random_batch([70, 0, 30], D, dtype), num_targets_B=torch.tensor([9, 0, 5]), contextual_len=2)
    wanted, got = (gradients(randomised(build(dropout=0.4, recompute=name), dtype).train(), seq) for name in RECOMPUTE)
    assert all(torch.equal(x, y) for x, y in zip(wanted, got, strict=True))


def kept_bytes(tower: STU, tokens: int) -> int:
    """What the forward pass allocates and still holds at its end: all that is kept for the backward pass, and the
    output, which is the kept input of a next layer."""
    seq = random_batch([tokens // 2, tokens // 2], tower.layers[0].input_norm.weight.numel(), torch.bfloat16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        out = tower(seq)
    total = sum(event.self_cpu_memory_usage for event in profiler.events())
    assert out.values_TD.grad_fn is not None
    return total


@pytest.mark.parametrize(("recompute", "wanted"), [("gate", 12), ("layer", 4)])
def test_activation_bytes_of_a_token(recompute: str, wanted: int) -> None:
    """In bfloat16 with H Q = H V = D = d. arXiv 2402.17152, section 3.3, counts 14 d for x (2 d), its norm (2 d),
    u, v, q, k (8 d) and the attention (2 d). "gate" keeps all but the norm; "layer" keeps x and the attention."""
    dim = 64
    tower = build(dim=dim, layers=1, heads=2, qk_dim=32, v_dim=32, dropout=0.1, recompute=recompute).bfloat16()
    kept_bytes(tower, 512)
    a_token = (kept_bytes(tower, 1024) - kept_bytes(tower, 512)) / 512
    statistics = 8  # mean and 1 / standard deviation of the first norm
    assert wanted * dim <= a_token <= wanted * dim + statistics


def test_attention_is_computed_once() -> None:
    if backend_for(torch.device("cpu")) != "native":
        pytest.skip("no C++ operators here")
    for recompute in RECOMPUTE:
        tower = build(layers=3, recompute=recompute)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            gradients(tower, random_batch([20, 3], D))
        names = [event.name for event in profiler.events()]
        assert (names.count("gr::hstu_attention"), names.count("gr::hstu_attention_backward")) == (3, 3), recompute


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("group_norm", [True, False], ids=["groups", ""])
@pytest.mark.parametrize("lengths", [[0], [0, 0, 0], [3, 0]], ids=str)
def test_every_parameter_gets_a_gradient(lengths: list[int], group_norm: bool, recompute: str) -> None:
    """Also without tokens: DDP waits for all of them, and None on one rank would hang the run."""
    tower = randomised(build(group_norm=group_norm, recompute=recompute), torch.float32)
    out_TD = tower(with_candidates(lengths, torch.zeros(len(lengths), dtype=torch.int64), 1, torch.float32)).values_TD
    assert out_TD.shape == (sum(lengths), D)
    out_TD.square().sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None and (parameter.grad != 0).any() == (sum(lengths) > 0), name


def test_dropout_only_in_training() -> None:
    seq = sequence(LENGTHS, dtype=torch.float32)
    tower, without = (randomised(build(dropout=rate), torch.float32) for rate in (0.5, 0.0))
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(tower.train()(seq).values_TD)
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    assert torch.equal(tower.eval()(seq).values_TD, without(seq).values_TD)
    with torch.no_grad():
        assert torch.equal(tower(seq).values_TD, without(seq).values_TD)


def test_initial_weights() -> None:
    """Xavier-uniform matrices, zero bias, norms of weight 1 and bias 0, in as many groups as heads."""
    torch.manual_seed(0)
    layer, other = build(dim=40, heads=2, qk_dim=20, v_dim=30, group_norm=True).layers
    for matrix, shape in ((layer.uvqk.weight, (200, 40)), (layer.output.weight, (40, 180))):
        bound = math.sqrt(6 / sum(shape))
        assert matrix.shape == shape and 0.95 * bound < matrix.abs().max() <= bound
    assert (layer.uvqk.bias == 0).all() and layer.output.bias is None
    assert layer.output_norm.weight.shape == (2,) and layer.input_norm.weight.shape == (40,)
    assert not torch.equal(layer.uvqk.weight, other.uvqk.weight)


def test_window_of_the_configuration() -> None:
    with pytest.raises(ValidationError, match="min_full_attn_seq_len=3 widens the window of max_attn_len, which is 0"):
        STUConfig(min_full_attn_seq_len=3)
    STUConfig(min_full_attn_seq_len=3, max_attn_len=10)


def test_candidates_beyond_a_sequence() -> None:
    with pytest.raises(ValueError, match="num_targets_B is 5 for sequence 0 of 4 tokens, more than it has"):
        build()(with_candidates([4, 2], torch.tensor([5, 0]), 0, torch.float32))


@pytest.mark.parametrize("kind", ["hstu", "sasrec"])
@pytest.mark.parametrize("fields", [{"num_targets_B": torch.tensor([1, 1])}, {"contextual_len": 1}])
def test_the_other_towers_refuse_what_they_would_take_for_events(kind, fields):
    config = RetrievalModelConfig.model_validate({"dim": D, "tower": {"kind": kind}})
    with pytest.raises(ValueError, match="no mask for candidates or a contextual prefix; use the STU tower"):
        build_tower(config.tower, dim=config.dim, max_length=N)(
            replace(sequence([3, 2], dtype=torch.float32), **fields)
        )


def test_it_is_built_from_a_configuration():
    config = RetrievalModelConfig.model_validate(
        {"dim": D, "tower": {"kind": "stu", "layers": 2, "heads": 2, "qk_dim": 3}}
    )
    tower = build_tower(config.tower, dim=config.dim, max_length=N)
    assert isinstance(tower, STU) and len(tower.layers) == 2
    assert tower(sequence([3, 0, 2], dtype=torch.float32)).values_TD.shape == (5, D)
