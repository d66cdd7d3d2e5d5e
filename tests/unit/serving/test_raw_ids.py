"""Models of raw ids in one process and in a package: rows by the map of the saved step, ids in and out."""

import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import gr
import gr.serving.export as exporting
import gr.serving.tables.packed as packing
from gr.config import RunConfig
from gr.config.base import import_target
from gr.config.export import ExportConfig, load_export_config
from gr.embeddings import table_weights
from gr.errors import CheckpointError, ServingError
from gr.models.saved import Saved
from gr.serving.index.exact import ExactIndex
from gr.serving.package.layout import RAW_ID_FILE, read_current
from gr.serving.package.version import Version
from gr.serving.passes.build import Built
from gr.serving.tables.id_rows import IdRows
from gr.serving.tables.quantize import pack
from gr.serving.verbs.ranking import FORM_FILE, RankingForm, RankServable
from gr.serving.verbs.retrieval import RetrieveServable
from gr.serving.verbs.retrieval_package import FORM, StoredRetrieval
from tests.support.history_folder import histories_by_user
from tests.support.raw_ids import raw_click_config, write_raw_clicks, write_raw_histories
from tests.support.tiny import tiny_config
from tests.support.tiny_histories import tiny_ranking_config, write_histories

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("raw_ids")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Click model of 40 steps with checkpoints of steps 20 and 40, between which rows change hands."""
    from gr.dist import world
    from gr.experiment import train

    folder = tmp_path_factory.mktemp("raw")
    data = write_raw_clicks(folder / "data")
    checkpoint = {"every": 20, "keep_last": 2}
    with world("cpu") as alone:
        train(raw_click_config(data, folder / "run", trainer={"steps": 40}, checkpoint=checkpoint), alone)
    write_raw_clicks(folder / "later", rows=300, seed=1, start=1200)
    return folder / "run"


def rows_of(run: Path) -> pa.Table:
    return pq.read_table(run.parent / "later" / "part-00000.parquet").drop_columns("label")


def columns_of(table: pa.Table) -> dict[str, np.ndarray]:
    lists = {name: np.array(table[name].to_pylist()) for name in ("tags",)}
    return {name: table[name].to_numpy() for name in table.column_names if name not in lists} | lists


def test_the_loaded_model_predicts_as_the_run_does(run: Path, tmp_path: Path) -> None:
    """And counts the ids that have no row, as the evaluation of the run does."""
    saved = gr.load(run)
    scores = saved.score(rows_of(run))
    gr.predict(run, run.parent / "later" / "part-00000.parquet", tmp_path / "scores.parquet")
    assert np.abs(scores - pq.read_table(tmp_path / "scores.parquet")["score"].to_numpy()).max() < 1e-6
    lookups = saved.read_lookups()
    assert lookups["item/ids"] == 300 and 0 < lookups["item/shared"] < 300 and lookups["tags/ids"] == 900
    assert np.array_equal(saved.score(rows_of(run)), scores), "the map is only read"


@pytest.fixture(scope="module")
def package(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of step 20."""
    out = tmp_path_factory.mktemp("package") / "package"
    checkpoint = run / "checkpoints" / "step-00000020"
    exporting.export(checkpoint, out, load_export_config(["tables.dtype=fp32", "tables.own.item=int8", "gate.rows=0"]))
    return out


def test_a_package_answers_by_the_map_of_its_weights(run: Path, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published weights bring their own map; a version that is open keeps its own, so no answer mixes both."""

    def refused(*_: object) -> None:
        raise AssertionError("compiles")

    monkeypatch.setattr(exporting, "_compile", refused)
    request = columns_of(rows_of(run))

    def scores(version: Version) -> np.ndarray:
        score = version.verbs["score"]
        return score.run([score.encode(request)])[0]["score"]

    before = Version.open(package)
    old = gr.load(run / "checkpoints" / "step-00000020")
    assert np.abs(scores(before) - old.score(rows_of(run))).max() < 2e-3
    assert before.count_unknown.by_column()["item"] == old.read_lookups()["item/shared"]
    exporting.publish(run / "checkpoints" / "step-00000040", package)
    after, new = Version.open(package), gr.load(run / "checkpoints" / "step-00000040")
    assert np.abs(scores(after) - new.score(rows_of(run))).max() < 2e-3
    assert np.abs(scores(before) - old.score(rows_of(run))).max() < 2e-3
    assert RAW_ID_FILE in after.manifest.files
    assert after.manifest.files[RAW_ID_FILE] != before.manifest.files[RAW_ID_FILE]


def eager(saved: Saved) -> tuple[Built, dict[str, Callable[..., list[torch.Tensor]]], IdRows]:
    """What a package of fp32 rows would have, not compiled."""
    build = import_target(exporting.BUILDERS[saved.config.kind])
    built = build(saved, dict.fromkeys(table_weights(saved.model), "fp32"), ExportConfig())
    passes = {name: lambda *inputs, each=each: [each.module(*inputs)] for name, each in built.passes.items()}
    return built, passes, IdRows(*exporting._raw_ids(saved))


def trained(config: RunConfig) -> Saved:
    from gr.dist import world
    from gr.experiment import train

    with world("cpu") as alone:
        train(config, alone)
    return gr.load(config.run_dir)


def test_retrieval_takes_and_gives_raw_items(tmp_path: Path) -> None:
    data = write_raw_histories(tmp_path / "data")
    tables = {"tables": {"item_id": {"ids": {"kind": "dynamic", "rows": 48, "ways": 8}}}}
    saved = trained(tiny_config(data, tmp_path / "run", trainer={"steps": 2}, embeddings=tables))
    built, passes, id_rows = eager(saved)
    form = StoredRetrieval.model_validate_json(built.artifacts[FORM]).form
    vectors = saved.embed_items()
    index = ExactIndex(torch.from_numpy(vectors.ids.to_numpy()), [vectors.vectors_KD])
    counts: Counter[str] = Counter()
    verb = RetrieveServable(form, saved.vocabularies["item_id"], [], index, passes["query"], counts.update, id_rows)
    lists = pq.read_table(next(data.glob("part-*.parquet")))["item_ids"].to_pylist()
    unknown = [5, 6]  # the catalogue has neither
    for history in [*[each for each in lists if len(each) > 3][:4], unknown]:
        (expected,) = saved.recommend([history], k=5)
        with torch.no_grad():
            (answer,) = verb.run([verb.encode({"history": np.array(history), "k": np.array([5])})])
        assert answer["items"].tolist() == [each.item for each in expected]
        assert np.allclose(answer["scores"], [each.score for each in expected], atol=1e-5)
    assert counts["history"] >= len(unknown)


def test_ranking_reads_rows_of_raw_ids(tmp_path: Path) -> None:
    write_histories(tmp_path / "data", users=64, longest=15)
    dynamic, hashed = {"kind": "dynamic", "rows": 32, "ways": 8}, {"kind": "hashed", "rows": 9}
    tables = {"tables": {"item_id": {"ids": dynamic}, "category": {"ids": hashed}}}
    saved = trained(tiny_ranking_config(tmp_path / "data", tmp_path / "run", trainer={"steps": 2}, embeddings=tables))
    built, passes, id_rows = eager(saved)
    form, counts = RankingForm.model_validate_json(built.artifacts[FORM_FILE]), Counter[str]()
    ranks = RankServable(form, passes, saved.vocabularies, version="v1", id_rows=id_rows, count_unseen=counts.update)
    users = histories_by_user(tmp_path / "data")
    user, row = next((user, row) for user, row in users.items() if 8 <= len(row["item_ids"]) <= 15)
    items, categories = [1, 2, 39, 7, 40], [1, 2, 42, 0, 11]
    history = {"item_id": row["item_ids"], "category": row["category"], "timestamp": row["timestamps"]}
    history |= {name: [bits >> bit & 1 for bits in row["actions"]] for bit, name in enumerate(("like", "share"))}
    request = {
        "history": {name: np.array(values) for name, values in history.items()},
        "context": {"country": [row["country"]], "age": [row["age"]]},
        "candidates": {"item_id": items, "category": categories},
    }
    (answer,) = ranks.run([ranks.encode(request)])
    expected = saved.score(
        pa.table({"user_id": [user] * 5, "item_id": items, "category": categories}), tmp_path / "data"
    )
    for name, values in expected.items():
        np.testing.assert_allclose(answer[f"score_{name}"], values, atol=5e-6)
    assert "candidates.category" not in counts, "a hashed id has a row"


def test_a_delta_makes_the_version_that_a_whole_publish_makes(run: Path, package: Path, tmp_path: Path) -> None:
    """Bit for bit, the map of ids included; and only from the step that is served, of the same run."""
    before, after = (run / "checkpoints" / f"step-{step:08d}" for step in (20, 40))
    whole, delta = (Path(shutil.copytree(package, tmp_path / name)) for name in ("whole", "delta"))
    for copy in (whole, delta):
        exporting.publish(before, copy)
    first = read_current(delta).weights
    packed: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "pack", lambda weight, kind: packed.append(len(weight)) or pack(weight, kind))
        exported = exporting.publish(after, delta, since=20)
    assert 0 < sum(packed) < sum(table.rows for table in exported.manifest.tables.values())
    assert exported.stored == exporting.publish(after, whole).stored, "the manifest has every file's SHA-256"
    with pytest.raises(ServingError, match=r"serves step 40, and --since is 20; gr publish .* publishes it whole"):
        exporting.publish(after, delta, since=20)
    exporting.publish(before, delta)
    assert read_current(delta).weights == first
    with pytest.raises(CheckpointError, match=r"--since 20: .* is step 20, name a step before it"):
        exporting.publish(before, delta, since=20)
    other = Path(shutil.copytree(run, tmp_path / "other")) / "checkpoints"
    (other / before.name / "SHA256SUMS").write_text("")
    with pytest.raises(ServingError, match="serves a step 20 that is not"):
        exporting.publish(other / after.name, delta, since=20)
    shutil.rmtree(other / before.name)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 20 .* \(steps: 40\)"):
        exporting.publish(other / after.name, delta, since=20)


KILLED = """
import os, signal, sys
import gr.serving.package.writer as writer
from gr.serving.export import publish
write_text = writer.write_text
writer.write_text = lambda path, text: os.kill(os.getpid(), signal.SIGKILL)
publish(sys.argv[1], sys.argv[2], since=20)
"""


def test_a_delta_that_is_killed_leaves_what_was_served(run: Path, package: Path, tmp_path: Path) -> None:
    """At the last moment before the version is served; the same delta then follows again."""
    before, after = (run / "checkpoints" / f"step-{step:08d}" for step in (20, 40))
    own = Path(shutil.copytree(package, tmp_path / "package"))
    exporting.publish(before, own)
    served = read_current(own)
    done = subprocess.run([sys.executable, "-c", KILLED, str(after), str(own)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert read_current(own) == served and Version.open(own).manifest.step == 20
    assert exporting.publish(after, own, since=20).manifest.step == Version.open(own).manifest.step == 40
