"""`retrieve` over the passes of a trained model, not compiled, beside gr.load of the same checkpoint."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gr
from gr.models.saved_retrieval import SavedRetrieval
from gr.serving.index.exact import ExactIndex
from gr.serving.passes.retrieval import QueryPass
from gr.serving.servable import RequestError
from gr.serving.verbs.retrieval import RetrievalForm, RetrieveServable
from tests.support.float_tables import FloatTables
from tests.support.own_log import prepared, random_log
from tests.support.tiny import tiny_config

HISTORIES = [["item 03", "item 07"], ["item 11"], [], ["new", "item 03", "item 07"], ["new"], ["item 03"] * 30]


@pytest.fixture(scope="module", params=[False, True], ids=["without time", "with time"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SavedRetrieval:
    folder = tmp_path_factory.mktemp("retrieve")
    data = prepared(folder / "data", random_log(), user="user", item="item", time="when", time_unit="s")
    tower = {"kind": "hstu", "layers": 2, "heads": 2, "qk_dim": 4, "v_dim": 4, "time_bias": request.param}
    config = tiny_config(data, folder / "run", trainer={"steps": 1}, model={"tower": tower})
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        patch.setenv("LOCAL_WORLD_SIZE", "1")
        gr.train(config)
    loaded = gr.load(folder / "run")
    assert isinstance(loaded, SavedRetrieval)
    return loaded


def servable(saved: SavedRetrieval, counts: Counter[str], **form: Any) -> RetrieveServable:
    query = QueryPass(saved.model, FloatTables(saved.model, ["item_id"])).eval()

    @torch.no_grad()
    def run(*inputs: Tensor) -> list[Tensor]:
        return [query(*inputs)]

    timed = saved.config.model.tower.uses_time
    written = {"filter_seen": "all", "unknown": "zero", **form}
    return RetrieveServable(
        RetrievalForm(max_length=16, item_cardinality=saved.schema.item_cardinality, timed=timed, **written),
        saved.vocabularies["item_id"],
        [],
        ExactIndex(saved._ranker.ids, [saved.embed_items().vectors_KD]),
        run,
        counts.update,
    )


def columns_of(saved: SavedRetrieval, history: list[str], **more: Any) -> dict[str, np.ndarray]:
    columns = {"history": np.array(history, dtype=object)}
    if saved.config.model.tower.uses_time:
        columns["times"] = 1000 + 60 * np.arange(len(history))
    return columns | {name: np.asarray(value) for name, value in more.items()}


@pytest.mark.slow
@pytest.mark.parametrize("filter_seen", ["all", "window", "none"])
def test_as_the_loaded_model(saved: SavedRetrieval, filter_seen: Any) -> None:
    counts: Counter[str] = Counter()
    verb = servable(saved, counts, filter_seen=filter_seen)
    requests = [verb.encode(columns_of(saved, history, k=[k])) for k, history in enumerate(HISTORIES, start=3)]
    assert [request.rows for request in requests] == [2, 1, 0, 2, 0, 16]
    assert counts == {"history": 2}
    answers = verb.run(requests)
    for k, (history, answer) in enumerate(zip(HISTORIES, answers, strict=True), start=3):
        times = [columns_of(saved, history)["times"].tolist()] if saved.config.model.tower.uses_time else None
        (expected,) = saved.recommend([history], k, times=times, filter_seen=filter_seen)
        assert answer["items"].tolist() == [each.item for each in expected]
        assert np.allclose(answer["scores"], [each.score for each in expected], atol=1e-4)
        (alone,) = verb.run([verb.encode(columns_of(saved, history, k=[k]))])
        assert alone["items"].tolist() == answer["items"].tolist()


@pytest.mark.slow
def test_what_is_asked_and_answered(saved: SavedRetrieval) -> None:
    verb = servable(saved, Counter())
    timed = ["times"] if saved.config.model.tower.uses_time else []
    assert [(spec.name, spec.datatype) for spec in verb.inputs if spec.name != "times"] == [
        ("history", "BYTES"),
        ("k", "INT64"),
    ]
    assert [spec.name for spec in verb.inputs] == ["history", *timed, "k"]
    (answer,) = verb.run([verb.encode(columns_of(saved, [b"item 03"]))])
    assert len(answer["items"]) == 42, "k is the whole index where it has fewer than 100 items"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("columns", "field", "message"),
    [
        ({"histoy": [1]}, "histoy", "did you mean 'history'"),
        ({"history": None}, "history", "is missing"),
        ({"history": [["item 03"]]}, "history", r"has shape \[1, 1\], it must have one dimension"),
        ({"history": [7]}, "history", "these are text"),
        ({"history": ["item 03", 7]}, "history", "cannot be read"),
        ({"history": [b"\xff"]}, "history", "cannot be read"),
        ({"k": [0]}, "k", "is 0; the index has 43 items: 1 up to that"),
        ({"k": [44]}, "k", "is 44"),
        ({"k": [1.5]}, "k", "is float64 of shape"),
        ({"k": [1, 2]}, "k", r"shape \[2\], wanted one whole number"),
    ],
)
def test_wrong_requests_name_the_field(saved: SavedRetrieval, columns: dict, field: str, message: str) -> None:
    asked = columns_of(saved, ["item 03"])
    for name, value in columns.items():
        asked.pop(name, None)
        if value is not None:
            asked[name] = np.array(value, dtype=object if name == "history" else None)
    with pytest.raises(RequestError, match=message) as caught:
        servable(saved, Counter()).encode(asked)
    assert caught.value.field == field


@pytest.mark.slow
def test_times_and_unknown_items_that_are_refused(saved: SavedRetrieval) -> None:
    with pytest.raises(RequestError, match="1 of its items were not seen in training, which is refused here"):
        servable(saved, Counter(), unknown="reject").encode(columns_of(saved, ["item 03", "new"]))
    if not saved.config.model.tower.uses_time:
        return
    verb = servable(saved, Counter())
    history = np.array(["item 03", "item 07"], dtype=object)
    for times, message in (([1], r"has shape \[1\], wanted \[2\]"), ([2, 1], "go back"), ([1.5, 2.5], "whole seconds")):
        with pytest.raises(RequestError, match=message) as caught:
            verb.encode({"history": history, "times": np.array(times)})
        assert caught.value.field == "times"
