"""The shapes of what the C++ operators return, for torch.export: it traces a model without values.

Only operators of a forward pass that is served are here. Letters as in the operators' own files.
"""

import torch
from torch import Tensor


def register() -> None:
    """Called once the library is loaded: before, there is no operator to describe."""
    torch.library.register_fake("gr::hstu_attention", _attention)
    torch.library.register_fake("gr::hstu_attention_cached", _attention)
    torch.library.register_fake("gr::norm_mul_dropout", _norm_mul_dropout)
    torch.library.register_fake("gr::rms_norm", _rms_norm)
    torch.library.register_fake("gr::rotate", _rotate)
    torch.library.register_fake("gr::softmax_attention", _softmax_attention)
    torch.library.register_fake("gr::swiglu", _swiglu)


def _attention(q_THQ: Tensor, k_THQ: Tensor, v_THV: Tensor, *others: object, **named: object) -> Tensor:
    return torch.empty_like(v_THV, memory_format=torch.contiguous_format)


def _norm_mul_dropout(
    u_TU: Tensor,
    a_TU: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    concat: bool,
    dropout: float,
    seed: int,
) -> Tensor:
    return u_TU.new_empty(u_TU.shape[0], u_TU.shape[1] * (3 if concat else 1))


def _rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_TD), x_TD.new_empty(x_TD.shape[0])


def _rotate(x_THQ: Tensor, cos_T1P: Tensor, sin_T1P: Tensor, back: bool) -> Tensor:
    return torch.empty_like(x_THQ, memory_format=torch.contiguous_format)


def _softmax_attention(q_THQ: Tensor, k_TGQ: Tensor, v_TGV: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    T, H, _ = q_THQ.shape
    return v_TGV.new_empty(T, H, v_TGV.shape[2]), v_TGV.new_empty(T, H)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)
