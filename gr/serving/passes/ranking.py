"""The forward passes of a ranking model with M-FALCON (arXiv 2402.17152, section 3.4): one user a call.

    Prefill   context and history -> keys and values of every layer
    Append    cached keys and values, the events after them -> those of the new events
    Score     cached keys and values, candidates -> outputs

No shape depends on a value, so torch.export takes them. What depends on lengths comes as a tensor.
E events, M candidates, T tokens of a call, N rows of the cache, L layers, H heads, Q and V widths of keys and values,
W = Q + V, F features of an event, G and K features of the user (ids, numbers), D width, C tasks.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr.config.ranking import ActionTask, InterleavedInput, RankingConfig
from gr.config.towers import HSTUConfig, STUConfig
from gr.errors import ServingError
from gr.models.preprocessor import SequencePreprocessor
from gr.models.sequence_ranking import Head, SequenceRanker
from gr.ops.hstu_attention import AttentionMask, CachedKeys, hstu_attention_cached, hstu_attention_start
from gr.schema import DataSchema
from gr.serving.passes.cache_scope import cache_scope
from gr.serving.verbs.ranking import RankingForm
from gr.towers.attend import Attend
from gr.towers.hstu import HSTU, HSTULayer
from gr.towers.stu import STU, STULayer

# features -> the module that looks their ids up: forward([ids of each feature]) -> [vectors of each feature]
TablesOf = Callable[[Sequence[str]], nn.Module]


class FloatTables(nn.Module):
    """Tables as they were trained."""

    def __init__(self, model: SequenceRanker, features: Sequence[str]) -> None:
        super().__init__()
        configs = [config for config in model.tables.embedding_configs() if {*config.feature_names} & {*features}]
        self.weights = nn.ParameterList(model.tables.embeddings[config.name].weight for config in configs)
        self.places = [
            next(place for place, config in enumerate(configs) if name in config.feature_names) for name in features
        ]
        self.dim = model.dim

    def forward(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """ids: integers [n] of each feature. Returns float32 [n, D] of each."""
        return [
            F.embedding(own.long(), self.weights[place])[:, : self.dim]
            for own, place in zip(ids, self.places, strict=True)
        ]


class _Places(nn.Module):
    """The vectors added to a token for its position and its time."""

    def __init__(self, tokens: SequencePreprocessor) -> None:
        super().__init__()
        self.position, self.age = tokens.position, tokens.age

    def forward(self, position: Tensor, bucket: Tensor) -> Tensor:
        place = F.embedding(position, self.position)
        return place if self.age is None else place + F.embedding(bucket, self.age)


class EventTokens(nn.Module):
    """Events with their actions -> one token each, or two where the input is interleaved."""

    def __init__(self, tokens: SequencePreprocessor, tables: nn.Module) -> None:
        super().__init__()
        self.tables, self.places = tables, _Places(tokens)
        self.actions, self.acted = tokens.actions, tokens.acted
        self.interleaved, self.scale = tokens.interleaved, tokens.dim**0.5

    def forward(self, ids_FE: Tensor, actions_E: Tensor, position_E: Tensor, bucket_E: Tensor) -> Tensor:
        """[T, D]. ids_FE: integers. actions_E: int64, bit k: action k was taken. position_E, bucket_E: int64."""
        items_ED = torch.stack(self.tables(ids_FE.unbind(0))).sum(0)
        place_ED = self.places(position_E, bucket_E)
        bits_EA = (actions_E[:, None] >> torch.arange(self.actions.shape[0])) & 1
        acted_ED = bits_EA.to(items_ED.dtype) @ self.actions + self.acted
        items_ED = items_ED * self.scale + place_ED
        if self.interleaved:
            return torch.stack([items_ED, acted_ED + place_ED], dim=1).flatten(0, 1)
        return items_ED + acted_ED


class CandidateTokens(nn.Module):
    """Candidates -> one token each, all at one position and time."""

    def __init__(self, tokens: SequencePreprocessor, tables: nn.Module) -> None:
        super().__init__()
        self.tables, self.places = tables, _Places(tokens)
        self.candidate, self.scale = tokens.candidate, tokens.dim**0.5

    def forward(self, ids_FM: Tensor, position_1: Tensor, bucket_1: Tensor) -> Tensor:
        items_MD = torch.stack(self.tables(ids_FM.unbind(0))).sum(0) * self.scale + self.places(position_1, bucket_1)
        return items_MD if self.candidate is None else items_MD + self.candidate


class ContextTokens(nn.Module):
    """Features of the user -> one token each, those of ids first."""

    def __init__(self, tokens: SequencePreprocessor, tables: nn.Module | None) -> None:
        super().__init__()
        self.tables, self.numeric = tables, tokens.numeric
        # A copy: a tensor that one pass reads by two names has one of them in its compiled code.
        self.position = nn.Parameter(tokens.position.detach()[tokens.max_events + 1 :].clone(), requires_grad=False)

    def forward(self, ids_G: Tensor, numbers_K: Tensor) -> Tensor:
        parts = []
        if self.tables is not None:
            parts += self.tables(ids_G[:, None].unbind(0))
        if self.numeric is not None:
            parts.append(numbers_K[:, None] * self.numeric[0] + self.numeric[1])
        return torch.cat(parts) + self.position


class _Layers(nn.Module):
    """The layers of a tower, and what their attention has in common."""

    layers: nn.ModuleList
    mask: AttentionMask
    settings: dict[str, Any]

    def __init__(self, model: SequenceRanker, *, prefix: bool, whole: bool) -> None:
        """prefix: context sees the whole history. whole: False where nothing reads the last layer but keys, values."""
        super().__init__()
        tower = _served(model.tower)
        self.layers = nn.ModuleList(tower.layers if whole else [*tower.layers[:-1], _without_output(tower.layers[-1])])
        self.qk_dim = tower.config.qk_dim
        if isinstance(tower, STU):
            self.mask = tower.mask(model.tokens.contextual if prefix else 0)
            self.settings = {"divisor": tower.divisor, "alpha": tower.alpha}
        else:
            self.mask, self.settings = AttentionMask(), {"divisor": tower.divisor(model.tokens.max_length)}

    def keys_and_values(self, x_TD: Tensor, attend: Callable[[int], Attend], dtype: torch.dtype) -> Tensor:
        """[T, L, H, W] in `dtype`, to which they are rounded before anything sees them. attend: of a layer."""
        kept: list[Tensor] = []

        def keep(k_THQ: Tensor, v_THV: Tensor) -> tuple[Tensor, Tensor]:
            kept.append(torch.cat([k_THQ, v_THV], dim=-1).to(dtype))
            return k_THQ.to(dtype).to(k_THQ.dtype), v_THV.to(dtype).to(v_THV.dtype)

        for place, layer in enumerate(self.layers[:-1]):
            inner = attend(place)

            def seen(q: Tensor, k: Tensor, v: Tensor, /, inner: Attend = inner, **named: Tensor | None) -> Tensor:
                return inner(q, *keep(k, v), **named)

            x_TD = layer(x_TD, seen)
        _, _, k_THQ, v_THV = cast(STULayer | HSTULayer, self.layers[-1]).project(x_TD)
        keep(k_THQ, v_THV)
        return torch.stack(kept, dim=1)

    def cached(self, kv_NLHW: Tensor, length_1: Tensor, place: int) -> CachedKeys:
        return CachedKeys(kv_NLHW[:, place, :, : self.qk_dim], kv_NLHW[:, place, :, self.qk_dim :], length_1)


def _served(tower: nn.Module) -> STU | HSTU:
    """The tower. Raises ServingError for one whose attention has no form against a cache."""
    if isinstance(tower, STU):
        return tower
    if isinstance(tower, HSTU):
        config = tower.config
        if config.attention == "pointwise" and not config.time_bias and config.divisor != "actual_len":
            return tower
    raise ServingError(
        f"a {type(tower).__name__} tower is not served as it is configured: attention against a cache is that of stu, "
        "and of hstu with attention=pointwise, time_bias=false and a divisor other than actual_len"
    )


def _without_output(layer: nn.Module) -> nn.Module:
    """The layer with the weights that its keys and values need, which it shares with the whole one."""
    part = copy.copy(layer)
    part._modules = {name: each for name, each in layer._modules.items() if not name.startswith("output")}
    part._parameters = {name: each for name, each in layer._parameters.items() if not name.endswith("_bias")}
    return part


class Prefill(nn.Module):
    def __init__(self, context: ContextTokens | None, events: EventTokens, layers: _Layers, dtype: torch.dtype) -> None:
        super().__init__()
        self.context, self.events, self.layers, self.dtype = context, events, layers, dtype

    def forward(
        self,
        ids_FE: Tensor,
        actions_E: Tensor,
        position_E: Tensor,
        bucket_E: Tensor,
        length_1: Tensor,
        ids_G: Tensor,
        numbers_K: Tensor,
    ) -> Tensor:
        """Keys and values, [T, L, H, W]. length_1: int64, the tokens that count; events after them fill the call up."""
        x_TD = self.events(ids_FE, actions_E, position_E, bucket_E)
        if self.context is not None:
            x_TD = torch.cat([self.context(ids_G, numbers_K), x_TD])
        layers = self.layers
        attend = partial(hstu_attention_start, length=length_1, mask=layers.mask, **layers.settings)
        return layers.keys_and_values(x_TD, lambda place: attend, self.dtype)


class Append(nn.Module):
    def __init__(self, events: EventTokens, layers: _Layers, dtype: torch.dtype) -> None:
        super().__init__()
        self.events, self.layers, self.dtype = events, layers, dtype

    def forward(
        self,
        kv_NLHW: Tensor,
        length_1: Tensor,
        ids_FE: Tensor,
        actions_E: Tensor,
        position_E: Tensor,
        bucket_E: Tensor,
    ) -> Tensor:
        """Keys and values of the events that follow the first length_1 rows of the cache, [T, L, H, W]."""
        layers = self.layers

        def attend(place: int) -> Attend:
            return partial(
                hstu_attention_cached,
                cache=layers.cached(kv_NLHW, length_1, place),
                candidates=False,
                mask=layers.mask,
                **layers.settings,
            )

        x_TD = self.events(ids_FE, actions_E, position_E, bucket_E)
        return layers.keys_and_values(x_TD, attend, self.dtype)


class Score(nn.Module):
    def __init__(self, candidates: CandidateTokens, layers: _Layers, head: Head) -> None:
        super().__init__()
        self.candidates, self.layers, self.head = candidates, layers, head

    def forward(
        self, kv_NLHW: Tensor, length_1: Tensor, ids_FM: Tensor, position_1: Tensor, bucket_1: Tensor
    ) -> Tensor:
        """Outputs of the tasks, [M, C]: logits, or numbers."""
        x_MD = self.candidates(ids_FM, position_1, bucket_1)
        for place, layer in enumerate(self.layers.layers):
            attend = partial(
                hstu_attention_cached,
                cache=self.layers.cached(kv_NLHW, length_1, place),
                candidates=True,
                mask=self.layers.mask,
                **self.layers.settings,
            )
            x_MD = layer(x_MD, attend)
        return self.head(x_MD)


def ranking_passes(
    model: SequenceRanker, tables_of: TablesOf, *, cache_dtype: torch.dtype = torch.float32
) -> dict[str, nn.Module]:
    """prefill and score, and append where no token sees what comes after it. Raises ServingError for other towers."""
    tokens = model.tokens
    prefix = model.uses_candidates and tokens.place == "request" and tokens.contextual > 0
    events = EventTokens(tokens, tables_of(model.event_features))
    context = None
    if tokens.contextual:
        context = ContextTokens(tokens, tables_of(model.contextual) if model.contextual else None)
    keys, whole = (_Layers(model, prefix=prefix, whole=whole) for whole in (False, True))
    passes: dict[str, nn.Module] = {"prefill": Prefill(context, events, keys, cache_dtype)}
    if not (keys.mask.contextual_len or keys.mask.min_full_attn_seq_len):
        passes["append"] = Append(events, keys, cache_dtype)
    candidates = CandidateTokens(tokens, tables_of(model.event_features))
    passes["score"] = Score(candidates, whole, model.head)
    return {name: each.eval() for name, each in passes.items()}


def ranking_form(
    config: RankingConfig, schema: DataSchema, *, microbatch: int, cache_dtype: torch.dtype
) -> RankingForm:
    """The inputs of the passes of a model of this configuration."""
    model, time = config.model, config.model.time
    tower, scope = model.tower, cache_scope(config)
    assert isinstance(tower, STUConfig | HSTUConfig), "ranking_passes refuses others"
    return RankingForm(
        items=schema.item_cardinality,
        event_features=dict(schema.event_features),
        contextual=dict(schema.contextual),
        contextual_numeric=tuple(schema.contextual_numeric),
        actions=tuple(schema.actions),
        timestamps=schema.timestamps,
        max_events=config.data.max_length - 1,  # a candidate is one of the model's events
        scale=None if time is None else time.scale,
        buckets=0 if time is None else time.buckets,
        absolute=config.task.supervision == "all" or model.place == "absolute",
        interleaved=isinstance(model.input, InterleavedInput),
        tasks={task.name: isinstance(task, ActionTask) for task in config.task.tasks},
        lifetime=scope.lifetime,
        reason=scope.reason,
        layers=tower.layers,
        heads=tower.heads,
        width=tower.qk_dim + tower.v_dim,
        cache_dtype="float32" if cache_dtype == torch.float32 else "bfloat16",
        microbatch=microbatch,
    )
