"""A click model whose tables are on cards: the same answers on 1, 2, 3 and 6 of them, from code compiled once."""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

import gr
import gr.serving.export as exporting
from gr.cli import main
from gr.config.export import load_export_config
from gr.embeddings import table_weights
from gr.errors import ConfigError, ServingError
from gr.models import build_model
from gr.models.dense import initialise_dense
from gr.models.saved_click import SavedClick
from gr.schema import SparseColumn
from gr.serving.engine import Engine
from gr.serving.package.layout import GOLDEN, WEIGHTS, CardsRecord, read_current
from gr.serving.package.version import Version
from gr.serving.package.weights import map_tensors, write_tensors
from gr.serving.passes.click import PassOfCards, build
from gr.serving.tables.card_tables import BATCH, TablesOnCards
from gr.serving.tables.packed import StoredTables
from gr.serving.tables.place_tables import place, write_cards
from tests.support.served_click import train_click
from tests.support.tiny_tabular import DENSE, tiny_click_config, write_tiny_tabular

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("card_package")]  # one worker compiles what several open
SIZES = (41, 64, 23, 300, 7, 129, 90)
COLUMNS = tuple(
    SparseColumn(name=f"c{place}", cardinality=size, hots=3 if place == 1 else 1) for place, size in enumerate(SIZES)
)
COUNTS = (3, 1, 2, 6)
SAME = ("tables.dtype=int8", "tables.own.c2=fp16", "gate.rows=0")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs of one form."""
    folder = tmp_path_factory.mktemp("cards")
    write_tiny_tabular(folder / "data", columns=COLUMNS)
    first, second = (train_click(folder / "data", folder / f"run-{seed}", seed=seed) for seed in (0, 5))
    return first, second


@pytest.fixture(scope="module")
def packages(runs: tuple[Path, Path]) -> dict[int, Path]:
    """By number of cards. The first is compiled, and the others take its code."""
    folder = runs[0].parent
    paths = {count: folder / f"package-{count}" for count in COUNTS}
    for count, path in paths.items():
        if count != COUNTS[0]:
            shutil.copytree(paths[COUNTS[0]], path)
        config = load_export_config([*SAME, f"cards={count}"])
        exported = exporting.export(runs[0], path, config)
        assert exported.compiled == (count == COUNTS[0])
    return paths


@pytest.fixture
def package(packages: dict[int, Path], tmp_path: Path) -> Path:
    """A copy of the one with three cards."""
    return Path(shutil.copytree(packages[3], tmp_path / "package"))


@pytest.fixture(autouse=True)
def no_card_is_left() -> Iterator[None]:
    yield
    assert not [child.name for child in multiprocessing.active_children() if child.name.startswith("card-")]


def request(rows: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(rows)
    dense = {name: random.normal(size=rows).astype(np.float32) for name in DENSE}
    return dense | {
        column.name: random.integers(0, column.cardinality, (rows, 3) if column.hots == 3 else rows)
        for column in COLUMNS
    }


def scores(version: Version, *rows: int) -> np.ndarray:
    score = version.verbs["score"]
    return np.concatenate([answer["score"] for answer in score.run([score.encode(request(count)) for count in rows])])


def test_equal_bits_from_one_code_on_any_number_of_cards(runs: tuple[Path, Path], packages: dict[int, Path]) -> None:
    answers, codes, most = {}, set(), 2 * BATCH + 77
    for count, path in packages.items():
        version = Version.open(path)
        try:
            cards = version.manifest.cards
            assert cards is not None and len(cards.cards) == count
            assert sorted(name for card in cards.cards for name in card.tables) == sorted(version.manifest.tables)
            answers[count] = scores(version, most, 1, 7)
            codes.add(read_current(path).code)
            alone = scores(version, 7)
            assert np.allclose(answers[count][-7:], alone, atol=1e-6)
        finally:
            version.close()
    assert len(codes) == 1
    assert all(np.array_equal(answers[count], answers[COUNTS[0]]) for count in COUNTS)
    columns = request(most)
    table = pa.table({name: pa.array(list(values) if values.ndim > 1 else values) for name, values in columns.items()})
    assert np.abs(answers[1][:most] - gr.load(runs[0]).score(table)).max() < 2e-3


def test_the_manifest_says_what_cards_hold(packages: dict[int, Path]) -> None:
    folder = packages[3] / WEIGHTS / read_current(packages[3]).weights
    version = Version.open(packages[3])
    version.close()
    cards = version.manifest.cards
    assert cards is not None
    for card in cards.cards:
        assert card.bytes == sum(version.manifest.tables[name].bytes for name in card.tables)
        assert card.cost == pytest.approx(sum(cards.costs[name] for name in card.tables))
        assert (folder / card.file).stat().st_size >= card.bytes
    assert 1 <= cards.bytes_over_bound < 3 and 1 <= cards.cost_over_bound < 3
    inside = sum(version.manifest.tables[name].bytes for name in version.manifest.tables)
    dense = sum(tensor.nbytes for name, tensor in map_tensors(folder / "tensors.safetensors").items())
    assert sum(card.bytes for card in cards.cards) == inside and dense < inside / 2, "the pass has no tables"


def test_new_weights_and_what_the_commands_say(
    runs: tuple[Path, Path], package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Version.open(package)
    try:
        before = scores(first, 64)
        assert main(["publish", str(runs[1]), "--to", str(package)]) == 0
        said = capsys.readouterr().out
        assert [line.split(":")[0] for line in said.splitlines() if line.startswith("card ")] == [
            "card 0",
            "card 1",
            "card 2",
        ]
        assert "balance: the fullest card has 1." in said
        assert main(["plan", str(package)]) == 0
        assert capsys.readouterr().out in said, "the plan of a package is what its export said of tables"
        second = Version.open(package)
        try:
            assert np.abs(scores(second, 64) - before).max() > 1e-2
            assert np.array_equal(scores(first, 64), before), "two versions are served side by side"
            assert second.manifest.cards and first.manifest.cards
            assert second.manifest.cards.costs == first.manifest.cards.costs
        finally:
            second.close()
        assert exporting.publish(runs[0], package).stored.weights == first.name
    finally:
        first.close()


def test_a_dead_card_is_one_line(package: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Engine.open(package) as engine:
        assert len(engine.score(request(5))["score"]) == 5
        victim = next(child for child in multiprocessing.active_children() if child.name == "card-1")
        assert engine.ready
        os.kill(victim.pid or 0, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(ServingError, match=r"^card 1 has ended \(exit code -9\).*open the package again$"):
                engine.score(request(5))
        assert not engine.ready
    assert caplog.records and not any(record.exc_info for record in caplog.records)


def test_packages_that_are_not_opened(package: Path) -> None:
    """A card's file that changed, one that is not there, and vectors that are not those of the golden rows."""
    stored = read_current(package)
    folder = package / WEIGHTS / stored.weights
    path = folder / "tables-2.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ServingError, match=r"tables-2\.safetensors: is not what gr wrote"):
        Version.open(package)
    path.unlink()
    with pytest.raises(ServingError, match=r"tables-2\.safetensors: is missing"):
        Version.open(package)
    path.write_bytes(content)
    version = Version.open(package)
    version.close()
    golden = map_tensors(folder / GOLDEN)
    (folder / "other").mkdir()
    write_tensors(folder / "other" / GOLDEN, golden | {"cards/outputs/0": golden["cards/outputs/0"] + 0.01})
    assert version.manifest.cards is not None
    cards = TablesOnCards(folder, version.manifest.cards)
    try:
        with pytest.raises(ServingError, match=r"the cards' vectors are .* from the golden rows"):
            cards.compare_golden(folder / "other")
    finally:
        cards.close()


def test_exports_that_are_refused(runs: tuple[Path, Path], tmp_path: Path, ranking_run: gr.config.RunConfig) -> None:
    for run, values, fault in (
        (runs[0], ["cards=8"], "cards=8: the model has 7 tables, and a card without one does nothing; set cards=7"),
        (runs[0], ["cards=2", "card_bytes=3000"], r"table c3 needs 3\.60 kB, 600 B more than the 3\.00 kB"),
        (ranking_run.run_dir, ["cards=2"], "cards=2: a ranking model has no tables on cards"),
    ):
        with pytest.raises(ServingError, match=fault):
            exporting.export(run, tmp_path / "package", load_export_config([*SAME[::2], *values]))
    with pytest.raises(ConfigError, match="card_bytes is the room of a card, and cards=0 means none"):
        load_export_config([*SAME, "card_bytes=100"])


@pytest.mark.parametrize("row_weights", [False, True])
def test_cards_give_what_the_gate_measures(tmp_path: Path, row_weights: bool) -> None:
    """Bit for bit, also where rows have their own weights. Nothing is compiled."""
    data = write_tiny_tabular(tmp_path / "data", columns=COLUMNS)
    config = tiny_click_config(data, tmp_path / "run", model={"row_weights": row_weights})
    schema = config.load_schema()
    model = build_model(config, schema).to_empty(device="cpu")
    initialise_dense(model, 0)
    for weight in table_weights(model).values():
        torch.nn.init.normal_(weight)
    saved = SavedClick(model.eval(), schema, config, data)
    export_config = load_export_config(["tables.dtype=fp16", "gate.rows=0", "cards=2"])
    kinds = dict.fromkeys(table_weights(model), "fp16")
    built = build(saved, kinds, export_config)
    assert built.cards is not None and isinstance(built.served.click_pass, PassOfCards)
    placement = place(built.cards, kinds, export_config)
    record = write_cards(tmp_path, built.cards, kinds, placement)
    cards = TablesOnCards(tmp_path, CardsRecord.model_validate_json(record.model_dump_json()))
    ids_BH, vectors_BFD = built.cards.golden
    try:
        assert torch.equal(cards(ids_BH), vectors_BFD)
        assert cards(ids_BH[:0]).shape == (0, *vectors_BFD.shape[1:])
    finally:
        cards.close()


def test_stored_tables_are_the_packed_ones(tmp_path: Path) -> None:
    from tests.support.cards import open_tables

    packed = open_tables({"a": 8, "b": 4})
    write_tensors(tmp_path / "tables", packed.state_dict())
    stored = StoredTables(packed.layout, map_tensors(tmp_path / "tables"))
    ids, offsets = torch.arange(6, dtype=torch.int32), torch.tensor([0, 2, 3, 4, 6], dtype=torch.int32)
    assert torch.equal(stored(ids, offsets), packed(ids, offsets))
