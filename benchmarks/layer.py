"""One HSTU layer, forward and backward, with dropout: norm, UVQK, SiLU, attention with position bias, gate, projection.

MovieLens-1M lengths, D = 64. The padded layer is the one of naive.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.attention import lognormal_lengths
from benchmarks.case import Case, Options, lazy, on_backend, own_backend
from benchmarks.naive import NaiveLayer
from gr.config.towers import HSTUConfig, STUConfig
from gr.ops.jagged import jagged_to_padded
from gr.sequence import JaggedSequence
from gr.towers import build_tower

TESTS = ("tests/ops/test_hstu_attention.py", "tests/unit/towers/test_hstu.py", "tests/unit/towers/test_stu.py")
_WIDTH, _LONGEST, _DROPOUT = 64, 200, 0.2
_LENGTHS = lognormal_lengths(128)


def _sequence(device: str) -> JaggedSequence:
    torch.manual_seed(0)
    values_TD = torch.randn(sum(_LENGTHS), _WIDTH, device=device, requires_grad=True)
    return JaggedSequence(values_TD, F.pad(torch.tensor(_LENGTHS).cumsum(0), (1, 0)).to(device), _LONGEST)


def _step(module: torch.nn.Module, inputs: Tensor, forward: Callable[[], Tensor]) -> Callable[[], object]:
    parameters = [inputs, *module.parameters()]
    grad = torch.randn_like(inputs)

    def run() -> object:
        out = forward()
        return torch.autograd.grad(out, parameters, grad.to(out.dtype))

    return run


def _ours(tower: HSTUConfig | STUConfig, device: str, dtype: torch.dtype) -> Callable[[], object]:
    sequence = _sequence(device)
    module = build_tower(tower, dim=_WIDTH, max_length=_LONGEST).to(device)

    def forward() -> Tensor:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return module(sequence).values_TD

    return _step(module, sequence.values_TD, forward)


def _padded(device: str) -> Callable[[], object]:
    sequence = _sequence(device)
    module = NaiveLayer(_WIDTH, _LONGEST, _DROPOUT, 211.0).to(device)
    with torch.no_grad():
        padded_BND = jagged_to_padded(sequence.values_TD, sequence.offsets_B1, _LONGEST)
    padded_BND.requires_grad_()
    return _step(module, padded_BND, lambda: module(padded_BND))


def cases(options: Options) -> list[Case]:
    own, device = own_backend(options.device), options.device
    hstu = HSTUConfig(layers=1, qk_dim=_WIDTH, v_dim=_WIDTH, dropout=_DROPOUT)
    stu = STUConfig(layers=1, heads=1, qk_dim=_WIDTH, v_dim=_WIDTH, dropout=_DROPOUT)

    def ours(tower: HSTUConfig | STUConfig, dtype: torch.dtype) -> Callable[[], object]:
        return lazy(lambda: _ours(tower, device, dtype))

    variants: dict[str, Callable[[], object]] = {
        "naive padded PyTorch": lazy(lambda: _padded(device)),
        "gr without a kernel float32": on_backend("torch", ours(hstu, torch.float32)),
        f"gr {own} float32": on_backend(own, ours(hstu, torch.float32)),
        f"gr {own} bfloat16": on_backend(own, ours(hstu, torch.bfloat16)),
    }
    stu_variants = {
        f"gr {own} {str(dtype)[6:]}": on_backend(own, ours(stu, dtype)) for dtype in (torch.float32, torch.bfloat16)
    }
    return [
        Case("HSTU layer, research form", variants, "naive padded PyTorch", memory=True),
        Case("HSTU layer, production form (STU)", stu_variants, f"gr {own} float32", memory=True),
    ]
