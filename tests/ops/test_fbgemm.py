"""FBGEMM's HSTU attention as a backend: one table of cases on a stand-in of both its interfaces, and on a GPU.

The stand-in (tests/support/fbgemm_hstu.py) is our reading of its sources; what a GPU adds is that the kernels are so.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from gr.errors import InstallError
from gr.ops import fbgemm, triton
from gr.ops.backend import backend_for, fbgemm_forced, force_backend
from gr.ops.hstu_attention import AttentionMask, hstu_attention, time_bucket_ids
from gr.ops.hstu_attention import fbgemm as path
from tests.ops.test_hstu_attention import MAX_LENGTH, NAMES, Case, make_case, offsets_of, run
from tests.ops.test_hstu_masks import LENGTHS, TARGETS, mask_of
from tests.support.fbgemm_hstu import SIGNATURES, stand_in
from tests.support.tolerances import assert_near

WIDTHS = (2, 32, 32)
CPU = torch.device("cpu")
# For what is decided before the kernels are called.
anywhere = pytest.mark.parametrize("kernels", ["1.3 to 1.8"], indirect=True)


@dataclass(frozen=True)
class Kernels:
    """Where they run, the dtypes to try there, and what they were called with (a stand-in alone says it)."""

    device: str
    dtypes: tuple[torch.dtype, ...]
    calls: list[dict[str, Any]]


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, *modules: ModuleType) -> None:
    """A machine with a GPU of this capability, or none, where these modules are installed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(triton, "load", lambda: None)
    for name in fbgemm._MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def _fresh() -> Iterator[None]:
    fbgemm.load.cache_clear()
    yield
    fbgemm.load.cache_clear()


@pytest.fixture(params=[*SIGNATURES, pytest.param("installed", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _fresh: None) -> Kernels:
    if request.param == "installed":
        try:
            fbgemm.load()
        except InstallError as error:
            pytest.skip(str(error))
        return Kernels("cuda", (torch.bfloat16,), [])
    calls: list[dict[str, Any]] = []
    pretend(monkeypatch, (9, 0), stand_in(request.param, calls))
    monkeypatch.setattr(torch.ops.fbgemm, "hstu_varlen_fwd_90", "is registered", raising=False)
    monkeypatch.setattr(path, "DTYPES", (*path.DTYPES, torch.float32))
    return Kernels("cpu", (torch.float32, torch.bfloat16, torch.float16), calls)


def on(device: str, case: Case) -> Case:
    fields = {name: x.to(device) for name, x in vars(case).items() if isinstance(x, Tensor)}
    if case.mask is not None and case.mask.num_targets_B is not None:
        fields["mask"] = replace(case.mask, num_targets_B=case.mask.num_targets_B.to(device))
    return replace(case, **fields)


def plain_case(
    lengths: list[int],
    mask: AttentionMask | None = None,
    *,
    per_row: bool = False,
    widths: tuple[int, int, int] = WIDTHS,
) -> Case:
    case = make_case(lengths, widths, torch.bfloat16, biased=False, per_row=per_row)
    return replace(case, mask=mask, alpha=0.25)


def assert_kernels(case: Case, kernels: Kernels) -> None:
    case = on(kernels.device, case)
    reference = run(case, torch.float64, "torch")
    for dtype in kernels.dtypes:
        kernels.calls.clear()
        for name, actual, expected in zip(NAMES, run(case, dtype, "fbgemm"), reference, strict=False):
            assert_near(actual, expected, dtype, f"{name} under {case.mask}")
        assert len(kernels.calls) == (kernels.device == "cpu")


@pytest.mark.parametrize("per_row", [False, True], ids=["one divisor", "a divisor a row"])
def test_causal(kernels: Kernels, per_row: bool) -> None:
    assert_kernels(plain_case([200, 0, 1, 64, 63, 0, 65], per_row=per_row), kernels)


@pytest.mark.parametrize("window", [1, 40, MAX_LENGTH - 1, MAX_LENGTH, 10 * MAX_LENGTH])
def test_window(kernels: Kernels, window: int) -> None:
    assert_kernels(plain_case(LENGTHS, mask_of(None, window)), kernels)


@pytest.mark.parametrize("prefix", [0, 1, 70], ids=["", "prefix", "long prefix"])
@pytest.mark.parametrize("targets", [None, TARGETS, [0] * 6], ids=["", "targets", "no targets"])
def test_candidates_and_prefix(kernels: Kernels, targets: list[int] | None, prefix: int) -> None:
    """Empty sequences, sequences of candidates alone and of a prefix alone among them."""
    lengths = [200, 0, 70, 128, 71, 130] if prefix > 1 else LENGTHS
    if targets is not None:
        targets = [min(count, max(0, n - prefix)) for count, n in zip(targets, lengths, strict=True)]
    assert_kernels(plain_case(lengths, mask_of(targets, prefix=prefix)), kernels)


@pytest.mark.parametrize("width", [32, 64, 128, 256])
def test_every_width(kernels: Kernels, width: int) -> None:
    assert_kernels(plain_case([70, 5], widths=(1, width, width)), kernels)


def test_no_tokens(kernels: Kernels) -> None:
    for lengths in ([], [0, 0]):
        case = on(kernels.device, plain_case(lengths, mask_of([0] * len(lengths))))
        for value in run(case, kernels.dtypes[0], "fbgemm"):
            assert value.shape == (0, 2, 32)


def test_any_strides(kernels: Kernels) -> None:
    """Views of one buffer go in as they are; rows at odd places, columns apart and an expanded gradient as copies."""
    case, dtype = on(kernels.device, plain_case([70, 0, 5])), kernels.dtypes[-1]
    wanted = [x.to(dtype).requires_grad_() for x in (case.q, case.k, case.v)]
    uvqk = torch.stack([x.detach() for x in (*wanted, wanted[0])], 1)
    odd = torch.empty(75, 2, 33, dtype=dtype, device=kernels.device)
    apart = wanted[2].detach().permute(2, 1, 0).contiguous().permute(2, 1, 0)
    views = [uvqk[:, 0], odd[..., 1:].copy_(wanted[1].detach()), apart]
    turned = torch.randn(32, 2, 75, dtype=dtype, device=kernels.device).permute(2, 1, 0)
    results = []
    with force_backend("fbgemm"):
        for inputs, grad in (
            (wanted, turned.contiguous()),
            ([x.requires_grad_() for x in views], turned),
        ):
            out = hstu_attention(*inputs, case.offsets, max_length=MAX_LENGTH, divisor=7.0)
            expanded = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
            results.append([out, *torch.autograd.grad(out, inputs, grad), *expanded])
    for packed, viewed in zip(*results, strict=True):
        assert_near(viewed, packed, torch.float32 if kernels.device == "cpu" else dtype, "with strides")
    if kernels.calls:
        assert kernels.calls[-1]["q"].data_ptr() == uvqk.data_ptr()


def test_an_earlier_output_is_not_used(kernels: Kernels) -> None:
    case = on(kernels.device, plain_case([70, 5]))
    x = [x.to(kernels.dtypes[-1]) for x in (case.q, case.k, case.v)]
    with force_backend("fbgemm"):
        out = hstu_attention(*x, case.offsets, max_length=MAX_LENGTH, divisor=7.0)
        again = hstu_attention(*x, case.offsets, max_length=MAX_LENGTH, divisor=7.0, output=out + 1)
    assert torch.equal(out, again)


@anywhere
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (mask_of([1], 2), "max_attn_len does not combine with num_targets_B"),
        (mask_of(None, 2, prefix=1), "max_attn_len does not combine with contextual_len"),
        (mask_of(None, 2, full=1), "max_attn_len does not combine with min_full_attn_seq_len"),
    ],
    ids=["targets", "prefix", "full"],
)
def test_masks_it_has_not(mask: AttentionMask, message: str, kernels: Kernels) -> None:
    case = on(kernels.device, plain_case([5], mask))
    with pytest.raises(ValueError, match=f"^HSTU attention by fbgemm: {message}; or use trainer.kernels: triton$"):
        run(case, torch.bfloat16, "fbgemm")
    assert not kernels.calls


@anywhere
@pytest.mark.parametrize("name", ["position_bias", "time_bias"])
def test_biases_it_has_not(name: str, kernels: Kernels) -> None:
    x, offsets = torch.zeros(5, 1, 32, dtype=torch.bfloat16, device=kernels.device), offsets_of([5]).to(kernels.device)
    times = torch.arange(5, device=kernels.device)
    given: dict[str, Any] = {"position_bias": torch.zeros(9, device=kernels.device)}
    if name == "time_bias":
        given = {"time_bias": torch.zeros(129, device=kernels.device)}
        given["time_buckets"] = time_bucket_ids(times, times, offsets, num_buckets=128)
    with force_backend("fbgemm"), pytest.raises(ValueError, match=f"{name} is not .* trainer.kernels: triton$"):
        hstu_attention(x, x, x, offsets, max_length=5, divisor=1.0, **given)


@anywhere
@pytest.mark.parametrize(
    ("widths", "dtype", "message"),
    [
        ((48, 48), torch.bfloat16, "equally wide, 32, 64, 128 or 256 a head, not 48 and 48"),
        ((32, 64), torch.bfloat16, "equally wide, 32, 64, 128 or 256 a head, not 32 and 64"),
        ((32, 32), torch.float32, "bfloat16 or float16, not torch.float32: set trainer.precision: bf16; or use"),
    ],
    ids=["48", "32 and 64", "float32"],
)
def test_heads_and_dtypes_it_has_not(
    widths: tuple[int, int],
    dtype: torch.dtype,
    message: str,
    kernels: Kernels,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(path, "DTYPES", (torch.bfloat16, torch.float16))
    q, v = (torch.zeros(5, 1, width, dtype=dtype, device=kernels.device) for width in widths)
    with force_backend("fbgemm"), pytest.raises(ValueError, match=message):
        hstu_attention(q, q, v, offsets_of([5]).to(kernels.device), max_length=5, divisor=1.0)


@anywhere
def test_everything_else_runs_as_under_triton(kernels: Kernels) -> None:
    with force_backend("fbgemm"):
        assert fbgemm_forced() and backend_for(CPU) == "triton"
        with force_backend("torch"):
            assert not fbgemm_forced() and backend_for(CPU) == "torch"
    assert not fbgemm_forced()


@anywhere
def test_never_chosen_by_itself(kernels: Kernels) -> None:
    run(plain_case([5]), torch.bfloat16, "auto")
    assert not kernels.calls


EMPTY = ModuleType("hstu")


@pytest.mark.parametrize(
    ("capability", "modules", "message"),
    [
        (None, [], "'fbgemm' needs a GPU of sm_8x or sm_90, and there is no CUDA device: use operators: auto"),
        ((7, 5), [], "needs a GPU of sm_8x or sm_90, and this one is sm_75"),
        ((10, 0), [], "needs a GPU of sm_8x or sm_90, and this one is sm_100"),
        ((9, 0), [], r"not installed \(.*fbgemm_gpu.experimental.hstu.*hstu.*\): .*--build-target=hstu .*=9.0; or use"),
        (
            (8, 6),
            [EMPTY],
            r"not installed \(.*no attribute 'hstu_attn_varlen_func'\): .*ARCH_LIST=8.0; or use operators: triton",
        ),
        (
            (8, 0),
            [stand_in("later", [])],
            "built without sm_80, or torch for a CUDA before 12.4: in fbgemm_gpu/ .*--build-target",
        ),
    ],
    ids=["no GPU", "old", "new", "not installed", "another hstu", "another generation"],
)
@pytest.mark.usefixtures("_fresh")
def test_where_it_cannot_be_had(
    capability: tuple[int, int] | None,
    modules: list[ModuleType],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, capability, *modules)
    with pytest.raises(InstallError, match=message) as raised, force_backend("fbgemm"):
        pass
    assert "\n" not in str(raised.value)
