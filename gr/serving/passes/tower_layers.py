"""Towers in passes: their own layers, and attention of one history, which is whole or cached. One user a call.

T tokens of a call, N rows of the cache, M candidates, L layers, H heads of queries, G heads of keys and values, Q and V
widths of keys and values, W of both as they are cached, D width.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr.config.towers import HSTUConfig, LlamaConfig, SASRecConfig, STUConfig, TowerConfig
from gr.errors import ServingError
from gr.ops.hstu_attention import AttentionMask, CachedKeys, hstu_attention_cached, hstu_attention_start
from gr.ops.hstu_attention.time_buckets import bucket_edges
from gr.ops.rope import rope_tables
from gr.serving.passes.cached_rows import SCALE, stored, widened
from gr.towers.attend import Attend
from gr.towers.hstu import HSTU, HSTULayer
from gr.towers.llama import Llama, LlamaLayer
from gr.towers.sasrec import SASRec, SASRecLayer
from gr.towers.stu import STU, STULayer


class Attention(Protocol):
    """The attention of a tower, in all its layers.

    start: the first length_1 of T tokens. append: the tokens after a cache; appends says whether there is such a form,
    which has the bits of start. candidates: each sees a cache and itself. Where the tower reads times, int64 seconds:
    times_2T, of each token and of the one that it is asked for; ages_N, from each token in the cache to the request.
    """

    appends: bool

    def start(self, length_1: Tensor, times_2T: Tensor | None) -> Attend: ...

    def append(self, cache: CachedKeys) -> Attend: ...

    def candidates(self, cache: CachedKeys, ages_N: Tensor | None) -> Attend: ...


class _Pointwise(nn.Module):
    """SiLU attention without times, by the C++ operators."""

    def __init__(self, mask: AttentionMask, **settings: Any) -> None:
        """mask: without candidates. settings: divisor, and alpha where there is one."""
        super().__init__()
        self.mask, self.settings = mask, settings
        self.appends = not (mask.contextual_len or mask.min_full_attn_seq_len)

    def start(self, length_1: Tensor, times_2T: Tensor | None) -> Attend:
        return partial(hstu_attention_start, length=length_1, mask=self.mask, **self.settings)

    def append(self, cache: CachedKeys) -> Attend:
        return partial(hstu_attention_cached, cache=cache, candidates=False, mask=self.mask, **self.settings)

    def candidates(self, cache: CachedKeys, ages_N: Tensor | None) -> Attend:
        return partial(hstu_attention_cached, cache=cache, candidates=True, mask=self.mask, **self.settings)


class _Timed(nn.Module):
    """SiLU attention biased by the time between the key and the prediction."""

    appends = False  # the newest event is biased by the time of the next one
    edges: Tensor

    def __init__(self, divisor: float, buckets: int) -> None:
        super().__init__()
        self.divisor = divisor
        self.register_buffer("edges", torch.tensor(bucket_edges(buckets), dtype=torch.int64))

    def start(self, length_1: Tensor, times_2T: Tensor | None) -> Attend:
        assert times_2T is not None, "the form says that the passes take times"
        key_T, asked_T = times_2T
        buckets_TT = self._buckets(asked_T[:, None] - key_T[None])

        def attend(q_THQ: Tensor, k_THQ: Tensor, v_THV: Tensor, /, **named: Tensor | None) -> Tensor:
            place_T, time_bias, position_bias = torch.arange(q_THQ.shape[0]), *_biases(named)
            scores_HTT = q_THQ.transpose(0, 1) @ k_THQ.permute(1, 2, 0) + time_bias[buckets_TT]
            if position_bias is not None:
                scores_HTT = scores_HTT + position_bias[position_bias.shape[0] // 2 + place_T[None] - place_T[:, None]]
            weights_HTT = (F.silu(scores_HTT) / self.divisor).masked_fill(place_T[None] > place_T[:, None], 0.0)
            return (weights_HTT @ v_THV.transpose(0, 1)).transpose(0, 1)

        return attend

    def append(self, cache: CachedKeys) -> Attend:
        raise AssertionError("nothing is appended")

    def candidates(self, cache: CachedKeys, ages_N: Tensor | None) -> Attend:
        assert ages_N is not None, "the form says that the passes take times"
        ids_K = self._buckets(F.pad(ages_N, (0, 1))).to(torch.uint8)  # a candidate is as old as the request

        def attend(q_MHQ: Tensor, k_MHQ: Tensor, v_MHV: Tensor, /, **named: Tensor | None) -> Tensor:
            ids_MK = ids_K.expand(q_MHQ.shape[0], -1).contiguous()
            against: Attend = partial(hstu_attention_cached, cache=cache, candidates=True, divisor=self.divisor)
            return against(q_MHQ, k_MHQ, v_MHV, bucket_ids=ids_MK, **named)

        return attend

    def _buckets(self, seconds: Tensor) -> Tensor:
        return torch.bucketize(seconds.abs(), self.edges, right=True)


class _ByLength(nn.Module):
    """SiLU attention over the number of tokens, the newest one included. A candidate counts as that."""

    appends = False  # another token changes the divisor of all

    def __init__(self, undivided: _Pointwise | _Timed) -> None:
        super().__init__()
        self.undivided = undivided

    def start(self, length_1: Tensor, times_2T: Tensor | None) -> Attend:
        return self._over(length_1, self.undivided.start(length_1, times_2T))

    def append(self, cache: CachedKeys) -> Attend:
        raise AssertionError("nothing is appended")

    def candidates(self, cache: CachedKeys, ages_N: Tensor | None) -> Attend:
        return self._over(cache.length + 1, self.undivided.candidates(cache, ages_N))

    @staticmethod
    def _over(length_1: Tensor, attend: Attend) -> Attend:
        def divided(q: Tensor, k: Tensor, v: Tensor, /, **named: Tensor | None) -> Tensor:
            return attend(q, k, v, **named) / length_1

        return divided


def _biases(named: dict[str, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """The biases of time and of place."""
    time_bias = named["time_bias"]
    assert time_bias is not None, "a tower that reads times has their bias"
    return time_bias, named.get("position_bias")


class _Softmax(nn.Module):
    """softmax(q . k / sqrt(Q)) v, as matrix products; heads of queries share those of keys and values evenly."""

    appends = False  # its sums change in their last bits with the length

    def __init__(self, mask: AttentionMask) -> None:
        super().__init__()
        self.mask = mask

    def start(self, length_1: Tensor, times_2T: Tensor | None) -> Attend:
        def attend(q_THQ: Tensor, k_TGQ: Tensor, v_TGV: Tensor, /, **named: Tensor | None) -> Tensor:
            seen_TT = self.mask.seen(q_THQ.shape[0], length_1[0])
            q, k, v = (each.transpose(0, 1)[None] for each in (q_THQ, k_TGQ, v_TGV))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen_TT, enable_gqa=True)[0].transpose(0, 1)

        return attend

    def append(self, cache: CachedKeys) -> Attend:
        raise AssertionError("nothing is appended")

    def candidates(self, cache: CachedKeys, ages_N: Tensor | None) -> Attend:
        room_N = torch.arange(cache.k_NHQ.shape[0]) >= cache.length
        # What lies in the room may be anything, also NaN, which no weight of zero would hide.
        k_NGQ, v_NGV = (x.masked_fill(room_N[:, None, None], 0.0) for x in (cache.k_NHQ, cache.v_NHV))

        def attend(q_MHQ: Tensor, k_MGQ: Tensor, v_MGV: Tensor, /, **named: Tensor | None) -> Tensor:
            shared = q_MHQ.shape[1] // k_MGQ.shape[1]
            own_MHQ, own_MHV, k_NHQ, v_NHV = (
                each.to(q_MHQ.dtype).repeat_interleave(shared, dim=1) for each in (k_MGQ, v_MGV, k_NGQ, v_NGV)
            )
            scores_HMN = (q_MHQ.transpose(0, 1) @ k_NHQ.permute(1, 2, 0)).masked_fill(room_N, -torch.inf)
            itself_HM1 = (q_MHQ * own_MHQ).sum(-1).T[..., None]
            weights_HMK = (torch.cat([scores_HMN, itself_HM1], dim=-1) * q_MHQ.shape[2] ** -0.5).softmax(-1)
            seen_HMV = weights_HMK[..., :-1] @ v_NHV.transpose(0, 1)
            return seen_HMV.transpose(0, 1) + weights_HMK[..., -1].T[..., None] * own_MHV

        return attend


class Layers(nn.Module):
    """The layers of a tower. A subclass says how a kind of layer is called."""

    key_width: int
    attention: Attention

    def __init__(self, layers: nn.ModuleList, *, whole: bool, read: tuple[str, ...]) -> None:
        """whole: False where nothing reads the last layer but keys, values, which need its parts that begin as `read`
        has them."""
        super().__init__()
        self.whole, self.layers = whole, nn.ModuleList(layers if whole else [*layers[:-1], _part(layers[-1], read)])

    def keys_and_values(
        self, x_TD: Tensor, attend: Callable[[int], Attend], place_T: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """[T, L, G, W] in `dtype`, to which they are rounded before anything sees them.

        attend: of a layer. place_T: int64, of each token in its sequence.
        """
        kept: list[Tensor] = []

        def keep(k_TGQ: Tensor, v_TGV: Tensor) -> tuple[Tensor, Tensor]:
            kept.append(stored(k_TGQ, v_TGV, dtype))
            k, v = self.split(widened(kept[-1]))
            return k.to(k_TGQ.dtype), v.to(v_TGV.dtype)

        shared = self.shared(place_T, x_TD.dtype)
        for place, layer in enumerate(self.layers[:-1]):
            inner = attend(place)

            def seen(q: Tensor, k: Tensor, v: Tensor, /, inner: Attend = inner, **named: Any) -> Tensor:
                return inner(q, *keep(k, v), **named)

            x_TD = self.run(layer, x_TD, cast(Attend, seen), shared)
        keep(*self.keys(self.layers[-1], x_TD, shared))
        return torch.stack(kept, dim=1)

    def forward(self, x_TD: Tensor, attend: Callable[[int], Attend], place_T: Tensor) -> Tensor:
        """The tower's outputs, [T, D]."""
        shared = self.shared(place_T, x_TD.dtype)
        for place, layer in enumerate(self.layers):
            x_TD = self.run(layer, x_TD, attend(place), shared)
        return self.end(x_TD)

    def newest(self, x_TD: Tensor, times_2T: Tensor | None) -> Tensor:
        """The tower's output for the last of all T tokens, [1, D]: in the last layer it is a candidate, so that the
        others are keys and values alone there. times_2T: as in Attention.
        """
        place_T = torch.arange(x_TD.shape[0])
        length_1, shared = place_T[-1:] + 1, self.shared(place_T, x_TD.dtype)
        attend = self.attention.start(length_1, times_2T)
        for layer in self.layers[:-1]:
            x_TD = self.run(layer, x_TD, attend, shared)
        last = self.layers[-1]
        others = CachedKeys(*self.keys(last, x_TD, shared), length_1 - 1)
        ages_T = None if times_2T is None else times_2T[1, -1:] - times_2T[0]
        against = self.attention.candidates(others, ages_T)
        return self.end(self.run(last, x_TD[-1:], against, self.shared(place_T[-1:], x_TD.dtype)))

    def cached(self, kv_NLGW: Tensor, length_1: Tensor, place: int) -> CachedKeys:
        return CachedKeys(*self.split(widened(kv_NLGW[:, place])), length_1)

    def split(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        return kv[..., : self.key_width], kv[..., self.key_width :]

    def shared(self, place_T: Tensor, dtype: torch.dtype) -> Any:
        """The inputs of all layers beside the tokens."""
        return None

    def run(self, layer: nn.Module, x_TD: Tensor, attend: Attend, shared: Any) -> Tensor:
        return layer(x_TD, attend)

    def keys(self, layer: nn.Module, x_TD: Tensor, shared: Any) -> tuple[Tensor, Tensor]:
        """Keys [T, G, Q] and values [T, G, V] of a layer."""
        raise NotImplementedError

    def end(self, x_TD: Tensor) -> Tensor:
        return x_TD


class _GatedLayers(Layers):
    """The layers of HSTU and STU."""

    def __init__(self, tower: HSTU | STU, attention: nn.Module, *, whole: bool) -> None:
        super().__init__(tower.layers, whole=whole, read=("uvqk", "input_norm"))
        self.key_width, self.attention = tower.config.qk_dim, cast(Attention, attention)

    def keys(self, layer: nn.Module, x_TD: Tensor, shared: Any) -> tuple[Tensor, Tensor]:
        _, _, k_THQ, v_THV = cast(STULayer | HSTULayer, layer).project(x_TD)
        return k_THQ, v_THV


class _SASRecLayers(Layers):
    def __init__(self, tower: SASRec, *, whole: bool) -> None:
        super().__init__(tower.layers, whole=whole, read=("key_value",))
        self.last_norm = tower.last_norm if whole else None
        self.attention = _Softmax(AttentionMask())
        self.key_width = cast(SASRecLayer, self.layers[0]).width

    def keys(self, layer: nn.Module, x_TD: Tensor, shared: Any) -> tuple[Tensor, Tensor]:
        return cast(SASRecLayer, layer).keys(x_TD)

    def end(self, x_TD: Tensor) -> Tensor:
        assert self.last_norm is not None, "asked of the whole tower"
        return self.last_norm(x_TD)


class _LlamaLayers(Layers):
    def __init__(self, tower: Llama, prefix: int, *, whole: bool) -> None:
        super().__init__(tower.layers, whole=whole, read=("input_layernorm", "self_attn"))
        if not whole:
            last = cast(LlamaLayer, self.layers[-1])
            last.self_attn = _part(last.self_attn, ("k_proj", "v_proj"))  # type: ignore[assignment]
        self.norm = tower.norm if whole else None
        self.attention = _Softmax(AttentionMask(contextual_len=prefix))
        self.key_width, self.theta = tower.width, tower.config.rope_theta

    def shared(self, place_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return rope_tables(place_T, self.key_width, self.theta, dtype)

    def run(self, layer: nn.Module, x_TD: Tensor, attend: Attend, shared: Any) -> Tensor:
        return layer(x_TD, shared, attend)

    def keys(self, layer: nn.Module, x_TD: Tensor, shared: Any) -> tuple[Tensor, Tensor]:
        own = cast(LlamaLayer, layer)
        return own.self_attn.keys(own.input_layernorm(x_TD), shared)

    def end(self, x_TD: Tensor) -> Tensor:
        assert self.norm is not None, "asked of the whole tower"
        return self.norm(x_TD)


def layers_of(tower: nn.Module, *, max_length: int, prefix: int = 0, whole: bool = True) -> Layers:
    """The layers of a model's tower. max_length: as of the model. prefix: tokens of context that see the whole history.
    whole: as of Layers.

    Raises ServingError for a tower that has no form here.
    """
    match tower:
        case STU():
            attention = _Pointwise(tower.mask(prefix), divisor=tower.divisor, alpha=tower.alpha)
            return _GatedLayers(tower, attention, whole=whole)
        case HSTU() if tower.config.attention == "softmax":
            return _GatedLayers(tower, _Softmax(AttentionMask()), whole=whole)
        case HSTU():
            by_length = tower.config.divisor == "actual_len"
            divisor = 1.0 if by_length else tower.divisor(max_length)
            own: _Pointwise | _Timed = _Pointwise(AttentionMask(), divisor=divisor)
            # Where no layer attends, nothing may hold what attention reads: compiled code would have it nowhere.
            if tower.config.time_bias and (whole or tower.config.layers > 1):
                own = _Timed(divisor, tower.config.time_buckets)
            return _GatedLayers(tower, _ByLength(own) if by_length else own, whole=whole)
        case SASRec():
            return _SASRecLayers(tower, whole=whole)
        case Llama():
            return _LlamaLayers(tower, prefix, whole=whole)
    raise ServingError(f"a {type(tower).__name__} tower is not served: those of kind hstu, llama, sasrec and stu are")


def cache_heads(tower: TowerConfig, dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """G and W of what is cached, in `dtype`, for a tower that layers_of takes. dim: D."""
    more = SCALE if dtype == torch.int8 else 0
    match tower:
        case STUConfig() | HSTUConfig():
            return tower.heads, tower.qk_dim + tower.v_dim + more
        case SASRecConfig():
            return tower.heads, 2 * dim // tower.heads + more
        case LlamaConfig():
            return tower.key_heads, 2 * dim // tower.heads + more
    raise AssertionError("layers_of refuses others")


def _part(module: nn.Module, read: tuple[str, ...]) -> nn.Module:
    """The module with the weights whose names begin as `read` has them, which it shares with the whole one."""
    part = copy.copy(module)
    part._modules = {name: each for name, each in module._modules.items() if name.startswith(read)}
    part._parameters = {name: each for name, each in module._parameters.items() if name.startswith(read)}
    return part
