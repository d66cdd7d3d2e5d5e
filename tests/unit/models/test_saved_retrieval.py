"""A loaded retrieval model in the log's own ids, and what of its checkpoint may be damaged."""

import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gr
from gr.checkpoint import resolve
from gr.checkpoint.checksums import SUMS
from gr.cli import main
from gr.config import RetrievalConfig
from gr.errors import ConfigError, DamagedCheckpointError, DataError
from gr.models.saved_retrieval import SavedRetrieval
from gr.schema import DataSchema
from tests.support.own_log import prepared, random_log
from tests.support.tiny import tiny_config, write_tiny

COLUMNS: dict[str, Any] = {"user": "user", "item": "item", "time": "when", "time_unit": "s"}


@pytest.fixture(autouse=True)
def _no_other_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")


@pytest.fixture
def config(tmp_path: Path) -> RetrievalConfig:
    data = prepared(tmp_path / "data", random_log(), **COLUMNS)
    config = tiny_config(data, tmp_path / "run", trainer={"steps": 2})
    gr.train(config)
    return config


def loaded(path: Path | str) -> SavedRetrieval:
    saved = gr.load(path)
    assert isinstance(saved, SavedRetrieval)
    return saved


def test_histories_in_own_ids(config: RetrievalConfig) -> None:
    saved = loaded(config.run_dir)
    history = ["item 03", "item 07"]
    first, none, again, strange = saved.recommend([history, [], ["new", *history, None], ["new"]], 5)
    assert len(first) == 5 and none == [] and again == first and strange == []
    assert not {each.item for each in first} & set(history), "seen items are left out"
    everything = saved.recommend([history], 43, filter_seen="none")[0]
    assert len({each.item for each in everything}) == 43 and len(saved.recommend([history], 43)[0]) == 41
    scores = saved.score([history], [each.item for each in everything])
    assert np.allclose(scores[0], [each.score for each in everything], atol=1e-5)
    vectors = saved.embed_items()
    assert len(vectors.ids) == 43 and np.allclose(
        (saved.embed_users([history]) @ vectors.vectors_KD.T)[0].sort(descending=True).values, scores[0], atol=1e-4
    )
    assert saved.recommend([], 5) == [] and saved.score([], history).shape == (0, 2)


def test_wrong_calls(config: RetrievalConfig) -> None:
    saved = loaded(config.run_dir)
    for k in (0, 44, 2.5, "3", True):
        with pytest.raises(ConfigError, match=f"k={k}: the corpus has 43 items; set k to 1 up to that"):
            saved.recommend([["item 03"]], k)
    for histories in ([["item 03", 7]], [[7]]):
        with pytest.raises(DataError, match=r"are of mixed kinds|these are text"):
            saved.recommend(histories, 3)
    for histories in (["item 03", "item 07"], "item 03", [None], {"a": ["item 03"]}):
        with pytest.raises(DataError, match=r"history 0 is .*, wanted a list of items: \[\[\.\.\.\], \.\.\.\]$"):
            saved.recommend(histories, 3)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="item 'new' is not known to the model"):
        saved.score([["item 03"]], ["item 03", "new"])
    with pytest.raises(DataError, match="times must have a list for each history, of the same length"):
        saved.recommend([["item 03"]], 3, times=[[1, 2]])
    with pytest.raises(DataError, match="history 1: times go back; pass events oldest first"):
        saved.recommend([["item 03"], ["item 03", "item 07"]], 3, times=[[9], [5, 1]])
    for time in (datetime(2026, 1, 1), np.datetime64("2026-01-01"), 1.5):
        with pytest.raises(DataError, match=r"times are whole seconds since 1970, and not of type .*; pandas"):
            saved.recommend([["item 03"]], 3, times=[[time]])


def test_ids_that_stand_for_themselves(tmp_path: Path) -> None:
    """Of a folder without vocabularies; those beyond its items are not known."""
    config = tiny_config(write_tiny(tmp_path / "data"), tmp_path / "run", trainer={"steps": 2})
    gr.train(config)
    saved = loaded(config.run_dir)
    (best,) = saved.recommend([[1, 2, 61, 0, -5]], 3)
    assert best == saved.recommend([[1, 2]], 3)[0] and all(isinstance(each.item, int) for each in best)
    with pytest.raises(DataError, match="item 61 is not known"):
        saved.score([[1]], [61])


def resum(checkpoint: Path) -> None:
    """Sums that fit, as an author of a checkpoint would write them."""
    import hashlib

    names = [line.partition("  ")[2] for line in (checkpoint / SUMS).read_text().splitlines()]
    sums = (f"{hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
    (checkpoint / SUMS).write_text("".join(sums))


def test_damage(config: RetrievalConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint = resolve(config.run_dir)
    file = checkpoint / "vocabulary" / "item_id.parquet"
    content = file.read_bytes()
    assert not (checkpoint / "vocabulary" / "user_id.parquet").exists(), "users are no input"
    file.write_bytes(content[:30] + bytes([content[30] ^ 1]) + content[31:])
    with pytest.raises(DamagedCheckpointError, match=r"vocabulary/item_id.parquet: is not what was written"):
        gr.load(checkpoint)
    resum(checkpoint)
    with pytest.raises(DataError, match=r"item_id.parquet: is not the file that schema.json names \(SHA-256\)"):
        loaded(checkpoint).recommend([["item 03"]], 3)
    shutil.copy(tmp_path / "data" / "vocabulary" / "item_id.parquet", file)
    schema = json.loads((checkpoint / "schema.json").read_text())
    schema["vocabularies"] = {"../../../../etc/passwd": "0" * 64}
    (checkpoint / "schema.json").write_text(json.dumps(schema))
    resum(checkpoint)
    assert main(["recommend", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "top.parquet")]) == 2
    err = capfd.readouterr().err.splitlines()
    assert len(err) == 1 and "schema.json: field vocabularies" in err[0]
    # And in the data folder: what is damaged is not trained on.
    data = tmp_path / "data" / "vocabulary" / "item_id.parquet"
    for damaged, fault in ((content[:-1], "is not the file that schema.json names"), (None, "the file has gone")):
        data.unlink()
        if damaged is not None:
            data.write_bytes(damaged)
        with pytest.raises(DataError, match=fault):
            gr.train(config.model_copy(update={"run_dir": str(tmp_path / "again")}))


def test_evaluation_data_of_another_vocabulary(config: RetrievalConfig, tmp_path: Path) -> None:
    log = random_log(seed=1)
    other = prepared(tmp_path / "other", log.assign(item=log.item + "!"), **COLUMNS)
    out = str(tmp_path / "top.parquet")
    call = ["--checkpoint", config.run_dir, "--out", out, "--k", "3", f"evaluation.path={other}"]
    with pytest.raises(
        DataError, match=r"other vocabularies of item_id: prepare .*other with `gr prepare events --voc"
    ):
        gr.recommend(config.run_dir, out, [f"evaluation.path={other}"])
    assert main(["recommend", *call]) == 2
    again = prepared(tmp_path / "again", log, **COLUMNS, vocabulary=config.data.path)
    assert DataSchema.load(again).item_cardinality == DataSchema.load(config.data.path).item_cardinality
    assert main(["recommend", *call[:-1], f"evaluation.path={again}"]) == 0


def test_the_embed_command(config: RetrievalConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    call = ["embed", "--checkpoint", config.run_dir, "--out", str(tmp_path / "vectors")]
    assert main(call) == 0 and "vectors of 43 items and 57 users" in capfd.readouterr().out
    for arguments, fault in (
        (call, "exists: name another folder, or replace it with --force"),
        ([*call[:-1], str(tmp_path / "none" / "vectors")], "there is no folder"),
        (
            [*call[:-1], str(tmp_path / "data" / "schema.json"), "--force"],
            "is no folder, so --force does not replace it",
        ),
    ):
        assert main(arguments) == 2
        err = capfd.readouterr().err.splitlines()
        assert fault in err[-1] and "Traceback" not in "".join(err)
    assert main([*call, "--force"]) == 0
    predict = ["predict", "--checkpoint", config.run_dir, "--input", "x", "--out", str(tmp_path / "p.parquet")]
    assert main(predict) == 2
    assert "retrieval models predict nothing of rows" in capfd.readouterr().err
