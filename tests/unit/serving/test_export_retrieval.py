"""A retrieval model from checkpoint to answers: what a package answers is what the model answers."""

import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import gr
from gr.config.export import load_export_config
from gr.config.retrieval import RetrievalConfig
from gr.models.saved_retrieval import SavedRetrieval
from gr.serving.export import export, publish
from gr.serving.gate.accuracy_gate import Limits
from gr.serving.gate.calibration import calibration
from gr.serving.index.approximate import ApproximateIndex
from gr.serving.package.version import Version
from gr.serving.passes import retrieval_build
from tests.support.own_log import prepared, random_log
from tests.support.tiny import tiny_config
from tests.support.tiny_preference import tiny_preference
from tests.support.toy_server import exchange, get, post, running

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("retrieval_package")]  # one worker compiles what several open
HISTORIES = [["item 03", "item 07"], ["item 11"], ["item 05"] * 3 + ["item 09", "item 21"] * 8]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads time and a feature of items, in a log's own ids."""
    folder = tmp_path_factory.mktemp("retrieval")
    makers = pd.DataFrame({"item": [f"item {i:02}" for i in range(43)], "maker": [f"maker {i % 5}" for i in range(43)]})
    columns = {"user": "user", "item": "item", "time": "when", "time_unit": "s", "actions": ("like", "share")}
    data = prepared(folder / "data", random_log(), **columns, item_features=makers)
    tower = {"kind": "hstu", "layers": 2, "heads": 2, "qk_dim": 4, "v_dim": 4, "time_bias": True}
    model = {"dim": 10, "tower": tower, "features": ["maker"]}
    trained(tiny_config(data, folder / "run", trainer={"steps": 2}, model=model))
    return folder / "run"


def trained(config: RetrievalConfig) -> RetrievalConfig:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        patch.setenv("LOCAL_WORLD_SIZE", "1")
        gr.train(config)
    return config


@pytest.fixture(scope="module")
def package(run: Path) -> Path:
    out = run.parent / "package"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval_build, "SHARD_ROWS", 20)
        export(run, out, load_export_config(["tables.dtype=fp32", "gate.rows=0"]))
    return out


def loaded(run: Path) -> SavedRetrieval:
    saved = gr.load(run)
    assert isinstance(saved, SavedRetrieval)
    return saved


def asked(history: list[str], k: int) -> dict[str, np.ndarray]:
    times = 1_700_000_000 + 600 * np.arange(len(history))
    return {"history": np.array(history, dtype=object), "times": times, "k": np.array([k])}


def test_answers_are_those_of_the_checkpoint(run: Path, package: Path) -> None:
    version, saved = Version.open(package), loaded(run)
    verb = version.verbs["retrieve"]
    answers = verb.run([verb.encode(asked(history, 6)) for history in HISTORIES])
    times = [asked(history, 6)["times"].tolist() for history in HISTORIES]
    for answer, expected in zip(answers, saved.recommend(HISTORIES, 6, times=times), strict=True):
        assert answer["items"].tolist() == [each.item for each in expected]
        assert np.allclose(answer["scores"], [each.score for each in expected], atol=1e-4)
    assert sorted(path.name for path in package.glob("weights/*/items/*")) == [
        "retrieval.json",
        *(f"vectors-{place:05d}.safetensors" for place in range(3)),
    ]
    vectors = verb._index.vectors(torch.arange(43))
    assert torch.equal(vectors, saved.embed_items().vectors_KD)
    verb.encode(asked(["item 03", "new"], 3))
    assert version.count_unknown.by_column() == {"history": 1}


def test_in_python_and_over_http(package: Path) -> None:
    version, (history, *_) = Version.open(package), HISTORIES
    verb = version.verbs["retrieve"]
    (expected,) = verb.run([verb.encode(asked(history, 6))])
    fields = asked(history, 6)
    fields["history"] = np.array([*history, "new"])  # one more item, which the model does not know
    fields["times"] = np.append(fields["times"], fields["times"][-1])
    datatypes = {"history": "BYTES", "times": "INT64", "k": "INT64"}
    inputs = [
        {"name": name, "datatype": datatypes[name], "shape": list(values.shape), "data": values.tolist()}
        for name, values in fields.items()
    ]
    with running(version) as (served, address):
        answer = served.engine.retrieve(history=history, times=fields["times"][:-1].tolist(), k=6)
        assert answer["items"].tolist() == expected["items"].tolist()
        empty = served.engine.retrieve(history=[], times=[], k=6)
        assert not len(empty["items"]) and not len(empty["scores"])
        status, _, body = exchange(address, post(json.dumps({"inputs": inputs}).encode()))
        assert status == 200, body
        outputs = {each["name"]: each for each in json.loads(body)["outputs"]}
        _, _, text = exchange(address, get("/metrics"))
    assert outputs["items"]["data"] == expected["items"].tolist()
    assert np.array_equal(np.array(outputs["scores"]["data"], np.float32), expected["scores"])
    assert 'gr_unknown_values_total{input="history"} 1.0' in text.decode()


def test_the_same_form_needs_no_compiling(run: Path, package: Path) -> None:
    assert not publish(run, package).compiled
    assert len(list((package / "code").glob("[!.]*"))) == 1


def test_an_inverted_file_and_its_recall(run: Path, package: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("faiss")
    config = load_export_config(
        ["tables.dtype=fp32", "gate.rows=0", "index.kind=approximate", "index.recall=0.9", "index.k=5"]
    )
    logging.getLogger("gr").addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, "gr.serving.passes.retrieval_build"):
        exported = export(run, package, config)
    logging.getLogger("gr").removeHandler(caplog.handler)
    assert not exported.compiled
    assert any(
        "recall" in line and f"at 5 on {retrieval_build.TUNING_QUERIES} histories" in line for line in caplog.messages
    )
    verb = Version.open(package).verbs["retrieve"]
    assert isinstance(verb._index, ApproximateIndex)
    (answer,) = verb.run([verb.encode(asked(HISTORIES[0], 5))])
    times = [asked(HISTORIES[0], 5)["times"].tolist()]
    (expected,) = loaded(run).recommend(HISTORIES[:1], 5, times=times)
    assert len({each.item for each in expected} & set(answer["items"].tolist())) >= 4


def test_a_preference_run_is_exported_and_served(run: Path, package: Path) -> None:
    """By the code of the retrieval model that it fine-tunes: nothing is compiled, and its own answers come back."""
    base = loaded(run)
    config = base.config
    assert isinstance(config, RetrievalConfig)
    levels = {"kind": "actions", "order": ["like", "share"]}
    task = {"levels": levels, "chosen": 1, "liked": 1, "loss": {"kind": "sdpo"}}
    preference = tiny_preference(
        Path(config.data.path), run.parent / "preference", run, model=config.model.model_dump(), trainer={"steps": 3},
        task=task,
    )  # fmt: skip
    trained(preference)
    saved = loaded(run.parent / "preference")
    rows = calibration(saved)
    assert rows.gate(rows.predict(saved.model), Limits()).verdict == "pass"
    try:
        exported = export(saved.folder, package, load_export_config(["tables.dtype=fp32", "gate.rows=0"]))
        assert not exported.compiled and exported.manifest.kind == "retrieval"
        times = [asked(history, 6)["times"].tolist() for history in HISTORIES]
        expected, before = (each.recommend(HISTORIES, 6, times=times) for each in (saved, base))
        with running(Version.open(package)) as (served, _):
            answers = [
                served.engine.retrieve(history=history, times=own, k=6)
                for history, own in zip(HISTORIES, times, strict=True)
            ]
        for answer, own, other in zip(answers, expected, before, strict=True):
            assert answer["items"].tolist() == [each.item for each in own]
            np.testing.assert_allclose(answer["scores"], [each.score for each in own], atol=1e-4)
            assert not np.allclose(answer["scores"], [each.score for each in other], atol=1e-3)
    finally:
        publish(run, package)
