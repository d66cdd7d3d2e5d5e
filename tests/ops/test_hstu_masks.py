"""The masks of HSTU attention: the definition against the rules in words, every path against the definition.

T packed tokens, B examples, H heads.
"""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gr.ops.backend import Backend, force_backend
from gr.ops.hstu_attention import AttentionMask, hstu_attention, time_bucket_ids
from gr.ops.hstu_attention import native as native_path
from tests.ops.test_hstu_attention import MAX_LENGTH, NAMES, Case, make_case, offsets_of, run
from tests.support.operators import bfloat16_products
from tests.support.tolerances import assert_near

LENGTHS = [200, 0, 1, 63, 64, 65]
# More than a tile of candidates, few, none; a sequence of candidates alone.
TARGETS = [130, 0, 1, 5, 0, 60]


def sees(query: int, key: int, length: int, mask: AttentionMask, targets: int) -> bool:
    """The rules of the mask, one by one, for one pair of tokens."""
    history, prefix, window = length - targets, mask.contextual_len, mask.max_attn_len
    if query == key:
        return True
    if key >= history:  # a candidate
        return False
    if query < prefix:
        return True
    if key > query:
        return False
    stands = min(query, history)
    if window == 0 or (mask.min_full_attn_seq_len and stands >= history - mask.min_full_attn_seq_len):
        return True
    apart = stands - max(key, prefix - 1 if prefix else 0)
    return apart <= window


def mask_of(targets: list[int] | None, window: int = 0, prefix: int = 0, full: int = 0) -> AttentionMask:
    return AttentionMask(
        num_targets_B=None if targets is None else torch.tensor(targets, dtype=torch.int64),
        max_attn_len=window,
        contextual_len=prefix,
        min_full_attn_seq_len=full,
    )


def masked_case(
    mask: AttentionMask, lengths: list[int], *, heads: int = 2, position: bool = True, time: bool = True
) -> Case:
    case = replace(make_case(lengths, (heads, 16, 25), torch.float32), mask=mask, alpha=0.25)
    if not position:
        case = replace(case, position_bias=None)
    if not time or mask.contextual_len:
        case = replace(case, time_bias=None, buckets=None)
    return case


def assert_masked(case: Case, dtype: torch.dtype, backend: Backend) -> None:
    names = [*NAMES[:4], *(["dposition"] if case.position_bias is not None else []), "dtime"]
    reference = run(case, torch.float64, backend)
    for name, actual, expected in zip(names, run(case, dtype, backend), reference, strict=False):
        assert_near(actual, expected, dtype, f"{name} under {case.mask}")


def test_definition_is_the_rules() -> None:
    for length, targets, window, prefix, full in itertools.product(
        range(8), range(4), (0, 1, 2, 9), range(4), (0, 1, 3)
    ):
        if targets + prefix > length or (full and not window):
            continue
        mask = mask_of(None, window, prefix, full)
        expected = [[sees(i, j, length, mask, targets) for j in range(length)] for i in range(length)]
        assert mask.seen(length, torch.tensor(length - targets)).tolist() == expected, (length, targets, mask)


@pytest.mark.parametrize("prefix", [0, 1], ids=["", "prefix"])
@pytest.mark.parametrize(("window", "full"), [(0, 0), (1, 0), (40, 0), (100, 1), (100, 30)], ids=str)
@pytest.mark.parametrize("targets", [None, TARGETS], ids=["", "targets"])
def test_path_matches_definition(backend: Backend, targets: list[int] | None, window: int, full: int, prefix: int):
    if targets is not None and prefix:
        targets = [min(count, max(0, length - prefix)) for count, length in zip(targets, LENGTHS, strict=True)]
    assert_masked(masked_case(mask_of(targets, window, prefix, full), LENGTHS), torch.float32, backend)


@pytest.mark.parametrize(("window", "full"), [(0, 0), (20, 0), (20, 70)], ids=str)
@pytest.mark.parametrize("targets", [None, [60, 0, 0, 58, 1]], ids=["", "targets"])
def test_long_prefix(backend: Backend, targets: list[int] | None, window: int, full: int) -> None:
    """A prefix of more than one tile reaches tiles above the diagonal; one sequence is a prefix alone."""
    case = masked_case(mask_of(targets, window, 70, full), [200, 0, 70, 128, 130])
    assert_masked(case, torch.float32, backend)


@pytest.mark.parametrize("position", [False, True], ids=["", "position"])
@pytest.mark.parametrize("time", [False, True], ids=["", "time"])
def test_each_bias_under_targets_and_window(backend: Backend, position: bool, time: bool) -> None:
    case = masked_case(mask_of(TARGETS, 40, full=10), LENGTHS, position=position, time=time)
    assert_masked(case, torch.float32, backend)


@pytest.mark.parametrize("mask", [mask_of(TARGETS, 30), mask_of([100, 0, 0, 50, 1, 0], 0, 1)], ids=["window", "prefix"])
def test_bfloat16(backend: Backend, mask: AttentionMask, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default tiles of this CPU, and the bfloat16 tiles where they exist but are not the default."""
    assert_masked(masked_case(mask, LENGTHS), torch.bfloat16, backend)
    if bfloat16_products():
        monkeypatch.setattr(native_path, "native_dtype", lambda dtype: dtype)
        assert_masked(masked_case(mask, LENGTHS), torch.bfloat16, backend)


def test_a_mask_that_hides_nothing_changes_nothing(backend: Backend) -> None:
    plain = make_case(LENGTHS, (2, 16, 16), torch.float32)
    for mask in (AttentionMask(), mask_of([0] * 6), mask_of(None, window=MAX_LENGTH)):
        masked = run(replace(plain, mask=mask), torch.float32, backend)
        for name, expected, actual in zip(NAMES, run(plain, torch.float32, backend), masked, strict=True):
            assert torch.equal(actual, expected) or (name == "dposition_bias" and backend == "torch"), name


def test_candidates_never_see_each_other(backend: Backend) -> None:
    """A change of a candidate changes no bit of another output, and it gets no gradient from other outputs."""
    case = masked_case(mask_of([80, 4], 0), [200, 70])
    before = run(case, torch.float32, backend)[0]
    for changed in (120, 150, 199, 266, 269):
        values = {name: getattr(case, name).clone() for name in ("q", "k", "v")}
        for value in values.values():
            value[changed] = torch.randn_like(value[changed]) * 100
        after = run(replace(case, **values), torch.float32, backend)[0]
        moved = (after != before).flatten(1).any(1)
        assert moved.nonzero().flatten().tolist() == [changed]
    for name in ("k", "v"):
        grad = torch.zeros_like(case.grad)
        grad[150] = case.grad[150]
        only = dict(zip("qkv", run(replace(case, grad=grad), torch.float32, backend)[1:4], strict=True))[name]
        assert (only[150] != 0).all() and (only[:120] != 0).all()
        assert (only[120:150] == 0).all() and (only[151:] == 0).all()


@pytest.mark.parametrize("window", [0, 50])
def test_candidates_at_once_are_candidates_one_by_one(backend: Backend, window: int) -> None:
    """With both biases, a candidate stands right after the history and has its query time."""
    history, candidates, width = 100, 70, 16
    tokens = history + candidates
    moments = torch.randint(0, 10**6, (history,)).sort().values
    query_time = int(moments[-1]) + 1000
    times = F.pad(moments, (0, candidates), value=query_time)
    queries = F.pad(moments[1:], (0, candidates + 1), value=query_time)
    q, k, v = (torch.randn(tokens, 2, width) for _ in range(3))
    position, time = torch.randn(2 * MAX_LENGTH - 1), torch.randn(129)

    def score(rows: list[int], targets: int) -> Tensor:
        offsets = offsets_of([len(rows)])
        buckets = time_bucket_ids(times[rows], queries[rows], offsets, num_buckets=128)
        return hstu_attention(
            *(x[rows] for x in (q, k, v)),
            offsets,
            max_length=MAX_LENGTH,
            divisor=211.0,
            mask=mask_of([targets], window),
            position_bias=position,
            time_bias=time,
            time_buckets=buckets,
        )

    with force_backend(backend):
        together = score(list(range(tokens)), candidates)[history:]
        alone = torch.cat([score([*range(history), c], 1)[-1:] for c in range(history, tokens)])
    assert_near(together, alone, torch.float32, "candidates")


@pytest.mark.parametrize("mask", [mask_of([100, 3, 0], 40), mask_of([100, 3, 0], 40, 2, 9)], ids=["window", "prefix"])
def test_same_bits_whatever_the_batch_the_threads_and_the_time(backend: Backend, mask: AttentionMask) -> None:
    lengths = [180, 63, 129]
    case = masked_case(mask, lengths, position=False, time=False)
    torch.set_num_threads(1)
    whole, again = run(case, torch.float32, backend), run(case, torch.float32, backend)
    assert all(torch.equal(x, y) for x, y in zip(whole, again, strict=True))
    if backend != "native":
        return
    torch.set_num_threads(2)
    assert all(torch.equal(x, y) for x, y in zip(whole, run(case, torch.float32, backend), strict=True))
    biased = masked_case(mask, lengths)
    two = run(biased, torch.float32, backend)
    torch.set_num_threads(1)
    assert all(torch.equal(x, y) for x, y in zip(two, run(biased, torch.float32, backend), strict=True))
    alone = replace(
        case,
        **{name: getattr(case, name)[:180] for name in ("q", "k", "v", "grad")},
        offsets=torch.tensor([0, 180]),
        mask=replace(mask, num_targets_B=torch.tensor([100])),
    )
    for batched, single in zip(whole, run(alone, torch.float32, backend), strict=True):
        assert torch.equal(batched[:180], single)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_targets_B": torch.tensor([1, -1])}, "num_targets_B is -1 for sequence 1 of 2 tokens, .* negative"),
        ({"num_targets_B": torch.tensor([4, 0])}, "num_targets_B is 4 for sequence 0 of 3 tokens, more than it has"),
        ({"num_targets_B": torch.tensor([1, 1], dtype=torch.int32)}, "num_targets_B must be int64 .*int32"),
        ({"num_targets_B": torch.tensor([1, 1, 1])}, r"num_targets_B must be .* \[2\], not .* \[3\]"),
        ({"num_targets_B": torch.tensor([1.0, 1.0])}, "num_targets_B must be int64 .*float32"),
        ({"num_targets_B": torch.tensor([1, 1]), "contextual_len": 2}, "sequence 1 .* contextual_len = 2"),
        ({"contextual_len": 3}, "sequence 1 of 2 tokens, .* contextual_len = 3"),
        ({"max_attn_len": -1}, "max_attn_len must not be negative: it is -1"),
        ({"contextual_len": -2}, "contextual_len must not be negative"),
        ({"max_attn_len": 2, "min_full_attn_seq_len": -2}, "min_full_attn_seq_len must not be negative"),
        ({"min_full_attn_seq_len": 2}, "min_full_attn_seq_len widens the window of max_attn_len, which is 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_wrong_masks(fields: dict[str, Any], message: str) -> None:
    x = torch.zeros(5, 1, 4)
    with pytest.raises(ValueError, match=message):
        hstu_attention(x, x, x, torch.tensor([0, 3, 5]), max_length=5, divisor=1.0, mask=AttentionMask(**fields))


def test_prefix_has_no_time_buckets() -> None:
    case = replace(make_case([5], (1, 4, 4), torch.float32), mask=mask_of(None, prefix=1))
    with pytest.raises(ValueError, match="contextual_len and time_bias do not combine"):
        run(case, torch.float32, "torch")
