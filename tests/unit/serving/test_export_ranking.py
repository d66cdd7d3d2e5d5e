"""A ranking model from checkpoint to answers, compiled: cold, cached, appended, over HTTP, and after `gr publish`."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gr
from gr.cli import main
from gr.config import RunConfig
from gr.config.export import load_export_config
from gr.errors import ServingError
from gr.models.saved_ranking import SavedRanking
from gr.serving import Engine
from gr.serving.export import export, publish
from gr.serving.package.version import Version
from gr.serving.verbs.ranking import RankServable
from tests.support.history_folder import histories_by_user
from tests.support.toy_server import exchange, get, post, running

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranking_package")]  # one worker compiles what several open
ITEMS, CATEGORIES = [1, 2, 39, 7, 40], [1, 2, 42, 0, 11]
Answer = Mapping[str, np.ndarray]


@pytest.fixture(scope="module")
def package(absolute_ranking_run: RunConfig) -> Path:
    out = Path(absolute_ranking_run.run_dir).parent / "package"
    assert export(absolute_ranking_run.run_dir, out, load_export_config(["tables.dtype=fp32", "gate.rows=0"])).compiled
    return out


@pytest.fixture(scope="module")
def histories(absolute_ranking_run: RunConfig) -> dict[int, dict[str, list]]:
    """Of the users with most of their events within the model's window."""
    users = histories_by_user(data_of(absolute_ranking_run))
    return {user: row for user, row in users.items() if 8 <= len(row["item_ids"]) <= 15}


def data_of(run: RunConfig) -> Path:
    return Path(run.data.path)  # type: ignore[attr-defined]


def asked(row: Mapping[str, Any], events: int | None = None, candidates: slice = slice(None)) -> dict[str, Any]:
    """The first `events` of a history and candidates, in the log's own ids."""
    own = slice(0, events)
    history = {"item_id": row["item_ids"][own], "category": row["category"][own], "timestamp": row["timestamps"][own]}
    history |= {name: [bits >> bit & 1 for bits in row["actions"][own]] for bit, name in enumerate(("like", "share"))}
    return {
        "history": history,
        "context": {"country": [row["country"]], "age": [row["age"]]},
        "candidates": {"item_id": ITEMS[candidates], "category": CATEGORIES[candidates]},
    }


def rank_of(version: Version) -> RankServable:
    rank = version.verbs["rank"]
    assert isinstance(rank, RankServable)
    return rank


def same(one: Answer, other: Answer) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_answers_are_those_of_the_checkpoint_and_the_same_bits_from_the_cache(
    absolute_ranking_run: RunConfig, package: Path, histories: dict[int, dict[str, list]]
) -> None:
    saved = gr.load(absolute_ranking_run.run_dir)
    assert isinstance(saved, SavedRanking) and len(histories) > 5
    rank = rank_of(Version.open(package))
    together = rank.run([rank.encode(asked(row)) for row in histories.values()])
    for (user, row), mate in zip(histories.items(), together, strict=True):
        (cold,) = rank.run([rank.encode(asked(row))])
        table = pa.table({"user_id": [user] * len(ITEMS), "item_id": ITEMS, "category": CATEGORIES})
        for name, values in saved.score(table, data_of(absolute_ranking_run)).items():
            np.testing.assert_allclose(cold[f"score_{name}"], values, atol=5e-6)
        assert same(cold, mate), "in a batch with others"
        parts = [rank.run([rank.encode(asked(row, candidates=part))])[0] for part in (slice(0, 2), slice(2, None))]
        assert same(cold, {name: np.concatenate([part[name] for part in parts]) for name in cold}), "in two parts"
        for events in (len(row["item_ids"]) // 2, None, None):  # computed, extended, found
            (answer,) = rank.run([rank.encode({**asked(row, events), "user": user})])
        assert same(cold, answer), "from the cache"
    users = len(histories)
    assert rank.cache is not None and rank.cache.counts == {"missed": users, "extended": users, "hit": users}


@pytest.mark.slow
@pytest.mark.full
def test_layers_in_bf16_and_keys_in_int8_answer_near_the_checkpoint_and_the_same_bits_from_the_cache(
    absolute_ranking_run: RunConfig, histories: dict[int, dict[str, list]], tmp_path: Path
) -> None:
    """Every dense layer: the last has a bias of one number, which a compiler takes for a constant if it may."""
    settings = ["tables.dtype=fp32", "dense=bf16", "cache=int8", "gate.rows=0"]
    assert export(absolute_ranking_run.run_dir, tmp_path / "package", load_export_config(settings)).compiled
    saved = gr.load(absolute_ranking_run.run_dir)
    assert isinstance(saved, SavedRanking)
    rank = rank_of(Version.open(tmp_path / "package"))
    for user, row in histories.items():
        (cold,) = rank.run([rank.encode({**asked(row), "user": user})])
        (hit,) = rank.run([rank.encode({**asked(row), "user": user})])
        assert same(cold, hit)
        table = pa.table({"user_id": [user] * len(ITEMS), "item_id": ITEMS, "category": CATEGORIES})
        for name, values in saved.score(table, data_of(absolute_ranking_run)).items():
            difference = np.abs(cold[f"score_{name}"] - values).max()
            assert 1e-6 < difference < 0.02
    assert rank.cache is not None and rank.cache.counts["hit"] == len(histories)


def test_another_history_is_computed_anew_and_counted(package: Path, histories: dict[int, dict[str, list]]) -> None:
    first, second, *_ = histories.values()
    with Engine.open(package) as engine:
        engine.rank(**asked(first), user="a")
        expected = engine.rank(**asked(second))
        assert same(engine.rank(**asked(second), user="a"), expected)
        rank = engine.servable("rank")
        assert isinstance(rank, RankServable) and rank.cache is not None
        assert rank.cache.counts["changed"] + rank.cache.counts["shorter"] == 1


def test_over_http(package: Path, histories: dict[int, dict[str, list]]) -> None:
    row = next(iter(histories.values()))
    version = Version.open(package)
    rank = rank_of(version)
    (expected,) = rank.run([rank.encode(asked(row))])
    fields = asked(row)
    fields["candidates"] = {"item_id": [*ITEMS, 4_000], "category": [*CATEGORIES, 1]}  # one that it does not know
    flat = {f"{group}.{name}": values for group in fields for name, values in fields[group].items()}
    tensors = {spec.name: (spec, np.asarray(flat[spec.name])) for spec in rank.inputs if spec.name in flat}
    inputs = [
        {"name": name, "datatype": spec.datatype, "shape": list(values.shape),
         "data": values.astype(bool if spec.datatype == "BOOL" else values.dtype).tolist()}
        for name, (spec, values) in tensors.items()
    ]  # fmt: skip
    inputs.append({"name": "user", "datatype": "BYTES", "shape": [1], "data": ["u7"]})
    with running(version) as (_, address):
        for _ in range(2):
            status, _, body = exchange(address, post(json.dumps({"inputs": inputs}).encode()))
            assert status == 200, body
            answer = {each["name"]: each["data"] for each in json.loads(body)["outputs"]}
            for name, values in expected.items():
                assert np.array_equal(np.array(answer[name][:-1], np.float32), values) and answer[name][-1] is None
        _, _, text = exchange(address, get("/metrics"))
    for line in ('gr_kv_cache_total{outcome="hit"} 1.0', 'gr_kv_cache_total{outcome="missed"} 1.0', "_users 1.0"):
        assert line in text.decode()
    assert 'gr_unknown_values_total{input="candidates.item_id"} 2.0' in text.decode()


def test_it_opens_where_there_is_no_compiler(package: Path, tmp_path: Path) -> None:
    """Its own operators are loaded, none are built, and a flipped bit of them is refused by name."""
    (library,) = package.glob("code/*/operators.so")
    program = (
        "import sys; from gr.errors import ServingError; from gr.serving.package.version import Version\n"
        "try: print(list(Version.open(sys.argv[1]).verbs))\n"
        "except ServingError as error: print(error)"
    )

    def opened() -> str:
        environment = {**os.environ, "PATH": "/nowhere", "XDG_CACHE_HOME": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", program, package], env=environment, capture_output=True, text=True)
        return done.stdout or done.stderr

    assert opened() == "['rank']\n" and not (tmp_path / "gr").exists()
    whole = library.read_bytes()
    try:
        library.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ServingError, match=r"operators\.so: is not what gr wrote"):
            Version.open(package)
    finally:
        library.write_bytes(whole)


def test_other_weights_take_the_same_code(
    absolute_ranking_run: RunConfig, package: Path, histories: dict[int, dict[str, list]]
) -> None:
    row = next(iter(histories.values()))
    first, _ = sorted((Path(absolute_ranking_run.run_dir) / "checkpoints").glob("step-*"))
    rank = rank_of(Version.open(package))
    (before,) = rank.run([rank.encode(asked(row))])
    assert not publish(first, package).compiled
    rank = rank_of(Version.open(package))
    (after,) = rank.run([rank.encode(asked(row))])
    assert not same(before, after)


def test_bench_asks_it_from_a_file_of_histories(
    package: Path,
    histories: dict[int, dict[str, list]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A row is a request. `user` and `timestamp` may be left out, a column that the model needs may not."""
    columns: dict[str, list] = {}
    for row in histories.values():
        fields = asked(row)
        for field, values in ((f"{part}.{name}", fields[part][name]) for part in fields for name in fields[part]):
            columns.setdefault(field, []).append(values[0] if field.startswith("context.") else list(values))
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    command = ["bench", str(package), "--input", str(tmp_path / "rows.parquet"), "--scenario=offline", "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["package"]["requests_per_second"] > 0
    del columns["history.item_id"]
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    assert main(command) == 2
    assert "history.item_id: is missing" in capsys.readouterr().err
