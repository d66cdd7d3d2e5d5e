"""The passes of a ranking model against its own forward pass."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gr.batch import ITEM_FEATURE, RankingBatch
from gr.config.towers import TOWERS
from gr.errors import ServingError
from gr.models.sequence_ranking import SequenceRanker
from gr.ops.time_encoding import time_bucket
from gr.serving.passes.ranking import ranking_passes
from tests.support.float_tables import FloatTables
from tests.support.tiny_histories import SCHEMA, tiny_ranking_config
from tests.unit.models.test_sequence_ranking import batch_of

STU = {"kind": "stu", "layers": 3, "heads": 2, "qk_dim": 4, "v_dim": 6, "dropout": 0.0}
HSTU = {"kind": "hstu", "layers": 2, "heads": 2, "qk_dim": 4, "v_dim": 4, "dropout": 0.0}
# Of these keys and values may be kept from one request to the next.
APPENDED: dict[str, dict[str, Any]] = {
    "additive, absolute": {"input": {"kind": "additive"}, "place": "absolute", "tower": STU},
    "interleaved, absolute, window": {"place": "absolute", "tower": {**STU, "max_attn_len": 5}},
    "group norm": {"place": "absolute", "tower": {**STU, "group_norm": True, "divisor": 7.0}},
    "all": {"all": True, "tower": STU},
    "all, hstu": {"all": True, "tower": HSTU},
    "all, hstu, max_len": {"all": True, "tower": {**HSTU, "divisor": "max_len", "concat_ua": True}},
}
SOFTMAX = {"attention": "softmax", "position_bias": False}
SASREC = {"kind": "sasrec", "layers": 2, "heads": 2, "ffn_dim": 8, "dropout": 0.0}
LLAMA = {"kind": "llama", "layers": 2, "heads": 2, "ffn_dim": 12}
# Of these no keys and values outlive a request, so that nothing is appended.
WITHIN_A_REQUEST: dict[str, dict[str, Any]] = {
    "request": {"place": "request", "tower": STU},
    "request, full attention": {"tower": {**STU, "max_attn_len": 3, "min_full_attn_seq_len": 2}},
    "request, llama": {"place": "request", "tower": LLAMA},
    "llama, shared keys": {"input": {"kind": "additive"}, "place": "absolute", "tower": {**LLAMA, "kv_heads": 1}},
    "all, llama": {"all": True, "tower": LLAMA},
    "all, sasrec": {"all": True, "tower": SASREC},
    "all, sasrec of one layer": {"all": True, "tower": {**SASREC, "layers": 1}},
    "all, hstu, softmax": {"all": True, "tower": {**HSTU, **SOFTMAX, "v_dim": 6}},
    "all, hstu, time": {"all": True, "tower": {**HSTU, "time_bias": True, "time_buckets": 30}},
    "all, hstu, time alone": {"all": True, "tower": {**HSTU, "layers": 1, "time_bias": True, "position_bias": False}},
}
FORMS = APPENDED | WITHIN_A_REQUEST


def model_of(form: dict[str, Any]) -> SequenceRanker:
    changes = dict(form)
    supervision = "all" if changes.pop("all", False) else "candidates"
    base = tiny_ranking_config()
    config = tiny_ranking_config(
        model={**base.model.model_dump(), **changes}, task={**base.task.model_dump(), "supervision": supervision}
    )
    with torch.device("meta"):
        model = SequenceRanker(config, SCHEMA)
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


class OneUser:
    """The inputs of the passes for the one example of a batch, whose newest events are candidates of one request."""

    def __init__(self, model: SequenceRanker, batch: RankingBatch) -> None:
        self.model, tokens = model, model.tokens
        events, candidates = len(batch.actions_T), batch.scored
        self.history = events - candidates
        assert batch.timestamps_T is not None and tokens.time is not None
        times = batch.timestamps_T[: self.history + 1]
        absolute = not model.uses_candidates or tokens.place == "absolute"
        seconds = times.diff(prepend=times[:1]) if absolute else times[-1] - times
        places = torch.arange(self.history + 1)
        buckets = time_bucket(seconds, tokens.time.scale, tokens.time.buckets)
        places = places if absolute else self.history - places
        ids = torch.stack([batch.features[name].values() for name in (ITEM_FEATURE, "category")])
        self.events = (ids[:, : self.history], batch.actions_T[: self.history], places[:-1], buckets[:-1])
        self.candidates = (ids[:, self.history :], places[-1:], buckets[-1:])
        self.context = (batch.features["country"].values(), batch.numeric_BK[0])
        self.per_event = 2 if tokens.interleaved else 1
        self.first = tokens.contextual
        self.seconds = times if getattr(model.tower, "config", None) and model.tower.config.uses_time else None

    def times(self, rows: int) -> list[Tensor]:
        """[2, rows] where the tower reads times."""
        if self.seconds is None:
            return []
        times = torch.cat([self.seconds, self.seconds[-1:].expand(rows - self.history)])
        return [torch.stack([times[:-1], times[1:]])]

    def ages(self, rows: int) -> list[Tensor]:
        """[rows] where the tower reads times."""
        if self.seconds is None:
            return []
        ages = self.seconds[-1] - self.seconds[:-1]
        tokens = torch.cat([ages[:1].expand(self.first), ages.repeat_interleave(self.per_event)])
        return [torch.nn.functional.pad(tokens, (0, rows - len(tokens)), value=999)]

    def tokens(self, events: int) -> Tensor:
        return torch.tensor([self.first + events * self.per_event])

    def part(self, start: int, stop: int) -> tuple[Tensor, ...]:
        ids, *others = self.events
        return ids[:, start:stop], *(each[start:stop] for each in others)


def example(model: SequenceRanker, history: int, candidates: int) -> tuple[OneUser, RankingBatch]:
    batch = batch_of([history + candidates], [candidates])
    assert batch.timestamps_T is not None
    batch.timestamps_T[history:] = batch.timestamps_T[history]  # one request
    return OneUser(model, batch), batch


def full(model: SequenceRanker, batch: RankingBatch) -> Tensor:
    """Each candidate by itself, as the newest event of its history: with supervision of all, nothing hides the rest."""
    history, rows = len(batch.actions_T) - batch.scored, []
    if model.uses_candidates:
        return model(batch)
    for candidate in range(batch.scored):
        kept = [*range(history), history + candidate]
        alone = batch_of([len(kept)], [1])
        ids = batch.features.values()
        total = len(batch.actions_T)
        alone.features.values()[:] = torch.cat([ids[kept], ids[total : 2 * total][kept], ids[2 * total :]])
        alone.actions_T[:], alone.numeric_BK[:] = batch.actions_T[kept], batch.numeric_BK
        assert alone.timestamps_T is not None and batch.timestamps_T is not None
        alone.timestamps_T[:] = batch.timestamps_T[kept]
        rows.append(model(alone))
    return torch.cat(rows)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_equal_the_full_forward_pass(form: str) -> None:
    model = model_of(FORMS[form])
    passes = ranking_passes(model, lambda features: FloatTables(model, features))
    user, batch = example(model, 9, 5)
    kv = passes["prefill"](*user.events, user.tokens(9), *user.context, *user.times(9))
    scored = passes["score"](kv, user.tokens(9), *user.candidates, *user.ages(len(kv)))
    torch.testing.assert_close(scored, full(model, batch), rtol=1e-5, atol=5e-6)
    # Events that only fill the call up, and room in the cache, change nothing: no bit where keys outlive a request.
    exact = {"rtol": 0, "atol": 0} if form in APPENDED else {"rtol": 1e-5, "atol": 5e-6}
    ids, *others = user.events
    padded = (torch.nn.functional.pad(ids, (0, 7), value=1), *(torch.nn.functional.pad(x, (0, 7)) for x in others))
    wide = passes["prefill"](*padded, user.tokens(9), *user.context, *user.times(16))
    torch.testing.assert_close(wide[: len(kv)], kv, **exact)
    wide[len(kv) :] = torch.nan
    again = passes["score"](wide, user.tokens(9), *user.candidates, *user.ages(len(wide)))
    torch.testing.assert_close(again, scored, **exact)


def test_every_registered_tower_has_a_form_here() -> None:
    assert {form["tower"]["kind"] for form in FORMS.values()} == set(TOWERS)


@pytest.mark.parametrize("form", APPENDED)
@torch.no_grad()
def test_append_has_the_bits_of_prefill(form: str) -> None:
    model = model_of(FORMS[form])
    passes = ranking_passes(model, lambda features: FloatTables(model, features))
    user, _ = example(model, 11, 5)
    whole = passes["prefill"](*user.events, user.tokens(11), *user.context)
    kv = passes["prefill"](*user.part(0, 5), user.tokens(5), *user.context)
    added = passes["append"](kv, user.tokens(5), *user.part(5, 11))
    assert torch.equal(torch.cat([kv, added]), whole)


@torch.no_grad()
def test_a_split_of_the_candidates_has_the_same_bits() -> None:
    model = model_of(FORMS["additive, absolute"])
    passes = ranking_passes(model, lambda features: FloatTables(model, features))
    user, _ = example(model, 9, 32)
    kv = passes["prefill"](*user.events, user.tokens(9), *user.context)
    ids, *when = user.candidates
    parts = [passes["score"](kv, user.tokens(9), part, *when) for part in ids.split(16, dim=1)]
    assert torch.equal(torch.cat(parts), passes["score"](kv, user.tokens(9), ids, *when))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@torch.no_grad()
def test_a_cache_of_fewer_bits_is_close(dtype: torch.dtype) -> None:
    model = model_of(FORMS["additive, absolute"])
    user, batch = example(model, 11, 5)
    passes = ranking_passes(model, lambda features: FloatTables(model, features), cache_dtype=dtype)
    kv = passes["prefill"](*user.part(0, 5), user.tokens(5), *user.context)
    kv = torch.cat([kv, passes["append"](kv, user.tokens(5), *user.part(5, 11))])
    assert kv.dtype == dtype
    assert torch.equal(kv, passes["prefill"](*user.events, user.tokens(11), *user.context))
    scored = passes["score"](kv, user.tokens(11), *user.candidates)
    torch.testing.assert_close(scored, model(batch), rtol=0.05, atol=0.05)


def test_other_towers_are_refused() -> None:
    model = model_of({"all": True, "tower": HSTU})
    model.tower = torch.nn.Identity()
    with pytest.raises(ServingError, match="a Identity tower is not served: those of kind hstu, llama"):
        ranking_passes(model, lambda features: FloatTables(model, features))
