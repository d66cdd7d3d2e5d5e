"""`rank`: answers are those of the model's own forward pass, with and without a cache; requests that are refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from gr.batch import RankingBatch
from gr.data.vocabulary import Vocabulary
from gr.errors import ServingError
from gr.models.sequence_ranking import SequenceRanker, predictions
from gr.serving.passes.ranking import ranking_form, ranking_passes
from gr.serving.servable import RequestError
from gr.serving.verbs.kv_cache import KVCache
from gr.serving.verbs.ranking import RankServable
from tests.support.float_tables import FloatTables
from tests.support.tiny_histories import SCHEMA, tiny_ranking_config
from tests.unit.models.test_sequence_ranking import batch_of
from tests.unit.serving.passes.test_ranking import FORMS, full, model_of

TASKS = ("like", "share", "watched")


def servable(form: str, cache: KVCache | None = None, **arguments: Any) -> tuple[SequenceRanker, RankServable]:
    model = model_of(FORMS[form])
    changes = {name: value for name, value in FORMS[form].items() if name != "all"}
    base = tiny_ranking_config()
    config = tiny_ranking_config(
        model={**base.model.model_dump(), **changes},
        task={**base.task.model_dump(), "supervision": "all" if "all" in FORMS[form] else "candidates"},
    )
    shape = ranking_form(config, SCHEMA, microbatch=16, cache="fp32")
    passes = ranking_passes(model, lambda features: FloatTables(model, features))
    vocabularies = {name: Vocabulary(name) for name in ("item_id", "category", "country")}
    run: dict[str, Callable[..., list[torch.Tensor]]] = {
        name: lambda *inputs, each=each: [each(*inputs)] for name, each in passes.items()
    }
    return model, RankServable(shape, run, vocabularies, **{"version": "v1", "cache": cache, **arguments})


def example(history: int, candidates: int, seed: int = 0) -> RankingBatch:
    batch = batch_of([history + candidates], [candidates], seed)
    assert batch.timestamps_T is not None
    batch.timestamps_T[history:] = batch.timestamps_T[history]
    return batch


def request_of(batch: RankingBatch, user: int | None = None) -> dict[str, Any]:
    events = len(batch.actions_T) - batch.scored
    assert batch.timestamps_T is not None
    items, categories = (batch.features[name].values().numpy() for name in ("item_id", "category"))
    return {
        "history": {
            "item_id": items[:events],
            "category": categories[:events],
            "like": (batch.actions_T[:events] & 1).numpy(),
            "share": (batch.actions_T[:events] >> 1 & 1).numpy(),
            "timestamp": batch.timestamps_T[:events].numpy(),
        },
        "context": {"country": batch.features["country"].values().numpy(), "age": batch.numeric_BK[0].numpy()},
        "candidates": {"item_id": items[events:], "category": categories[events:]},
        "timestamp": batch.timestamps_T[events : events + 1].numpy(),
        **({} if user is None else {"user": user}),
    }


def answer(ranks: RankServable, batch: RankingBatch, user: int | None = None) -> np.ndarray:
    (scores,) = ranks.run([ranks.encode(request_of(batch, user))])
    return np.stack([scores[f"score_{name}"] for name in TASKS])


@pytest.mark.parametrize("form", FORMS)
def test_is_the_models_own_prediction(form: str) -> None:
    model, ranks = servable(form)
    for history, candidates in ((9, 5), (1, 20) if "all" not in FORMS[form] else (1, 5), (0, 3)):
        batch = example(history, min(candidates, 14 - history))
        with torch.no_grad():
            expected = predictions(full(model, batch), tiny_ranking_config().task.tasks)
        np.testing.assert_allclose(answer(ranks, batch), np.stack(expected), rtol=2e-5, atol=5e-6)


def test_cached_and_computed_answers_have_the_same_bits() -> None:
    cache = KVCache(1 << 20)
    _, ranks = servable("additive, absolute", cache)
    _, alone = servable("additive, absolute")
    batch = example(12, 3)
    # Each of the requests knows more of the history: 0, 4, 5, 5 and 12 events.
    for events in (0, 4, 5, 5, 12):
        ids, total = batch.features.values(), len(batch.actions_T)
        kept = [*range(events), *range(12, 15)]
        cut = example(events, 3)
        cut.features.values()[:] = torch.cat([ids[kept], ids[total : 2 * total][kept], ids[2 * total :]])
        assert cut.timestamps_T is not None and batch.timestamps_T is not None
        cut.actions_T[:], cut.timestamps_T[:] = batch.actions_T[kept], batch.timestamps_T[kept]
        cut.numeric_BK[:] = batch.numeric_BK
        assert np.array_equal(answer(ranks, cut, user=7), answer(alone, cut))
    assert cache.counts == {"missed": 1, "extended": 3, "hit": 1}


def test_another_history_or_model_is_computed_anew() -> None:
    cache = KVCache(1 << 20)
    _, ranks = servable("additive, absolute", cache)
    _, alone = servable("additive, absolute")
    first, other, longer = example(6, 3), example(6, 3, seed=1), example(30, 3)
    for batch in (first, other, longer):
        assert np.array_equal(answer(ranks, batch, user=7), answer(alone, batch))
    assert cache.counts == {"missed": 1, "changed": 2}
    _, newer = servable("additive, absolute", cache, version="v2")
    answer(newer, longer, user=7)
    assert cache.counts["other_version"] == 1


def test_a_form_that_is_not_append_exact_keeps_nothing() -> None:
    cache = KVCache(1 << 20)
    _, ranks = servable("request", cache)
    answer(ranks, example(6, 3), user=7)
    assert len(cache) == 0 and not cache.counts


def test_how_candidates_are_split_changes_no_bit() -> None:
    _, ranks = servable("additive, absolute")
    fields = request_of(example(6, 3))
    items, categories = np.arange(1, 41), np.arange(40) % 43
    whole, part = (
        ranks.run([ranks.encode({**fields, "candidates": {"item_id": items[own], "category": categories[own]}})])[0]
        for own in (slice(None), slice(29, 36))
    )
    assert all(np.array_equal(whole[name][29:36], part[name]) for name in whole)


def test_unknown_items_are_counted_and_have_no_score() -> None:
    counted: dict[str, int] = {}
    _, ranks = servable("additive, absolute", count_unseen=counted.update)
    fields = request_of(example(6, 3))
    fields["candidates"] = {"item_id": [5, 99, 6], "category": [1, 1, 1]}
    (scores,) = ranks.run([ranks.encode(fields)])
    assert np.isnan(scores["score_like"]).tolist() == [False, True, False]
    assert counted["candidates.item_id"] == 1


def test_unknown_values_may_be_refused_and_a_feature_may_be_0() -> None:
    counted: dict[str, int] = {}
    _, ranks = servable("additive, absolute", count_unseen=counted.update, unknown="reject")
    fields = request_of(example(6, 3))
    fields["candidates"] = {"item_id": [5, 6], "category": [0, 1]}
    ranks.encode(fields)
    for group, name in (("context", "country"), ("candidates", "item_id")):
        wrong = {**fields, group: {**fields[group], name: np.array([99] * len(fields[group][name]))}}
        with pytest.raises(RequestError, match=f"{name}: . of its values were not seen in training"):
            ranks.encode(wrong)
    assert counted == {"context.country": 1, "candidates.item_id": 2}


def test_users_are_text_or_numbers_and_answers_are_finite() -> None:
    model, ranks = servable("additive, absolute", KVCache(1 << 20))
    fields = request_of(example(6, 3))
    for user in (7, np.int64(7), "7", [b"7"], np.array(["7"], dtype=object)):
        assert ranks.encode({**fields, "user": user}).user == "7"
    with torch.no_grad():
        next(model.head.parameters()).fill_(torch.nan)
    with pytest.raises(ServingError, match="not finite"):
        ranks.run([ranks.encode(fields)])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("history.item_ids", [1], "no such field; did you mean 'history.item_id'"),
        ("history.like", [1, 0], "has 2 values, it must have 6"),
        ("history.like", [0.5] * 6, "must be whole numbers"),
        ("history.category", [1, 2], "has 2 values, history.item_id has 6"),
        ("history.timestamp", [6, 5, 4, 3, 2, 1], "event 1 is before the event before it"),
        ("timestamp", [0], "is before the newest event"),
        ("context.age", [np.nan], "no finite number"),
        ("context.country", [1, 2], "has 2 values, it must have 1"),
        ("candidates.item_id", ["film"] * 3, "item_id"),
        ("candidates.item_id", [[1, 2, 3]], "one dimension"),
        ("user", [1, 2], "has 2 values, it must have 1"),
    ],
)
def test_refusals_name_the_field(field: str, value: Any, message: str) -> None:
    _, ranks = servable("additive, absolute")
    fields = request_of(example(6, 3))
    group, _, name = field.partition(".")
    changed = {**fields, group: {**fields[group], name: np.array(value)} if name else np.array(value)}
    with pytest.raises(RequestError, match=message) as refused:
        ranks.encode(changed)
    assert refused.value.field == field


def test_a_missing_field_is_named_and_text_is_looked_up() -> None:
    _, ranks = servable("additive, absolute")
    fields = request_of(example(6, 3))
    del fields["history"]["category"]
    with pytest.raises(RequestError, match=r"history\.category: is missing"):
        ranks.encode(fields)
    words = pa.array([f"film {item:02}" for item in range(1, 41)])
    text = RankServable(
        ranks.form,
        {},
        {"item_id": Vocabulary("item_id", np.arange(1, 41), words), "category": Vocabulary("category"),
         "country": Vocabulary("country")},
        version="v1",
    )  # fmt: skip
    fields = request_of(example(6, 3))
    for group in ("history", "candidates"):
        ids = fields[group]["item_id"]
        fields[group]["item_id"] = np.array([f"film {item:02}".encode() for item in ids], dtype=object)
    encoded = text.encode(fields)
    empty = {name: [] for name in fields["history"]}
    assert not len(text.encode({**fields, "history": empty}).events_EC)
    assert encoded.known_M.all() and next(s for s in text.inputs if s.name == "history.item_id").datatype == "BYTES"
