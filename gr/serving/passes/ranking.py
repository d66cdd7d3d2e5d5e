"""The forward passes of a ranking model with M-FALCON (arXiv 2402.17152, section 3.4): one user a call.

    Prefill   context and history -> keys and values of every layer
    Append    cached keys and values, the events after them -> those of the new events
    Score     cached keys and values, candidates -> outputs

No shape depends on a value, so torch.export takes them. What depends on lengths comes as a tensor.
E events, M candidates, T tokens of a call, N rows of the cache, L layers, H heads of keys and values, W widths of both
together, F features of an event, G and K features of the user (ids, numbers), D width, C tasks.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr.config.export import CacheDtype
from gr.config.ranking import ActionTask, InterleavedInput, RankingConfig
from gr.models.preprocessor import SequencePreprocessor
from gr.models.sequence_ranking import Head, SequenceRanker
from gr.schema import DataSchema
from gr.serving.passes.cache_scope import cache_scope
from gr.serving.passes.tower_layers import Layers, cache_heads, layers_of
from gr.serving.verbs.ranking import CACHE_DTYPES, RankingForm

# features -> the module that looks their ids up: forward([ids of each feature]) -> [vectors of each feature]
TablesOf = Callable[[Sequence[str]], nn.Module]


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


class Prefill(nn.Module):
    def __init__(self, context: ContextTokens | None, events: EventTokens, layers: Layers, dtype: torch.dtype) -> None:
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
        times_2E: Tensor | None = None,
    ) -> Tensor:
        """Keys and values, [T, L, H, W]. length_1: int64, the tokens that count; events after them fill the call up.

        times_2E: where the tower reads times, int64 seconds of each event, and of the event after it or the request.
        """
        x_TD = self.events(ids_FE, actions_E, position_E, bucket_E)
        context = 0
        if self.context is not None:
            context_GD = self.context(ids_G, numbers_K)
            context, x_TD = context_GD.shape[0], torch.cat([context_GD, x_TD])
        times_2T = None if times_2E is None else self._times(times_2E, context)
        attend = self.layers.attention.start(length_1, times_2T)
        return self.layers.keys_and_values(x_TD, lambda layer: attend, torch.arange(x_TD.shape[0]), self.dtype)

    def _times(self, times_2E: Tensor, context: int) -> Tensor:
        """Times of tokens: each is asked for the one after it, and context is as old as the first event."""
        own_E, next_E = times_2E
        times_2T = times_2E
        if self.events.interleaved:  # an item is asked for its action
            asked_T = torch.stack([own_E, next_E], dim=1).flatten()
            times_2T = torch.stack([own_E[:, None].expand(-1, 2).flatten(), asked_T])
        return torch.cat([own_E[:1].expand(2, context), times_2T], dim=1)


class Append(nn.Module):
    def __init__(self, events: EventTokens, layers: Layers, dtype: torch.dtype) -> None:
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
        x_TD = self.events(ids_FE, actions_E, position_E, bucket_E)
        place_T = length_1 + torch.arange(x_TD.shape[0])
        return layers.keys_and_values(
            x_TD,
            lambda layer: layers.attention.append(layers.cached(kv_NLHW, length_1, layer)),
            place_T,
            self.dtype,
        )


class Score(nn.Module):
    def __init__(self, candidates: CandidateTokens, layers: Layers, head: Head) -> None:
        super().__init__()
        self.candidates, self.layers, self.head = candidates, layers, head

    def forward(
        self,
        kv_NLHW: Tensor,
        length_1: Tensor,
        ids_FM: Tensor,
        position_1: Tensor,
        bucket_1: Tensor,
        ages_N: Tensor | None = None,
    ) -> Tensor:
        """Outputs of the tasks, [M, C]: logits, or numbers.

        ages_N: where the tower reads times, int64 seconds from each token in the cache to the request.
        """
        x_MD, layers = self.candidates(ids_FM, position_1, bucket_1), self.layers
        place_M = length_1.expand(x_MD.shape[0])  # all stand at the place after the history
        return self.head(
            layers(
                x_MD,
                lambda layer: layers.attention.candidates(layers.cached(kv_NLHW, length_1, layer), ages_N),
                place_M,
            )
        )


def ranking_passes(
    model: SequenceRanker, tables_of: TablesOf, *, cache_dtype: torch.dtype = torch.float32
) -> dict[str, nn.Module]:
    """prefill and score, and append where it has the bits of prefill. Raises ServingError for towers without passes."""
    tokens = model.tokens
    prefix = tokens.contextual if model.uses_candidates and tokens.place == "request" else 0
    events = EventTokens(tokens, tables_of(model.event_features))
    context = None
    if tokens.contextual:
        context = ContextTokens(tokens, tables_of(model.contextual) if model.contextual else None)
    keys, whole = (
        layers_of(model.tower, max_length=tokens.max_length, prefix=prefix, whole=whole) for whole in (False, True)
    )
    passes: dict[str, nn.Module] = {"prefill": Prefill(context, events, keys, cache_dtype)}
    if whole.attention.appends:
        passes["append"] = Append(events, keys, cache_dtype)
    candidates = CandidateTokens(tokens, tables_of(model.event_features))
    passes["score"] = Score(candidates, whole, model.head)
    return {name: each.eval() for name, each in passes.items()}


def ranking_form(config: RankingConfig, schema: DataSchema, *, microbatch: int, cache: CacheDtype) -> RankingForm:
    """The inputs of the passes of a model of this configuration."""
    model, time = config.model, config.model.time
    tower, scope = model.tower, cache_scope(config)
    heads, width = cache_heads(tower, model.dim, CACHE_DTYPES[cache])
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
        times=tower.uses_time,
        layers=tower.layers,
        heads=heads,
        width=width,
        cache=cache,
        microbatch=microbatch,
    )
