"""Inventories in YAML: values, overrides, and every kind of fault with its place, path and remedy."""

import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from gr.config.inventory import GivenDense, InventoryConfig, TableConfig, TowerDense
from gr.config.load import load_section, top_level
from gr.config.towers import HSTUConfig
from gr.errors import ConfigError

TWO = """\
rank_batch_size: 64
tables:
  - {name: users, rows: 1_000, dim: 64}
  - name: items
    rows: 5_000
    dim: 128
    kind: sequence
    ids_per_example: 12.5
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(text: str, name: str = "i.yaml") -> str:
    Path(name).write_text(text)
    return name


def load(text: str, *overrides: str) -> InventoryConfig:
    return load_section(InventoryConfig, write(text), overrides)


def fault(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    return str(caught.value)


class TestValues:
    def test_defaults(self):
        config = load(TWO)
        users, items = config.tables
        assert (users.rows, users.kind, users.ids_per_example, users.ids_per_step) == (1000, "pooled", 1.0, 0.0)
        assert (items.kind, items.ids_per_example, items.optimizer) == ("sequence", 12.5, "rowwise_adagrad")
        assert (config.dense, config.precision) == (GivenDense(), "bf16")

    def test_overrides(self):
        sizes = "{tower: {kind: hstu, layers: 2}, dim: 8, mean_length: 4, max_length: 9}"
        config = load(TWO, "rank_batch_size=512", "dense.kind=tower", f"dense={sizes}", "dense.tower.heads=3")
        assert config.rank_batch_size == 512
        assert isinstance(config.dense, TowerDense)
        assert config.dense.tower == HSTUConfig(layers=2, heads=3)
        assert config.dense.max_length == 9

    def test_unsaid_kind_of_the_dense_part_is_given(self):
        assert load(TWO, "dense.parameters=7").dense == GivenDense(parameters=7)

    def test_bases(self):
        write(TWO, "base.yaml")
        write("base: base.yaml\nrank_batch_size: 8", "child.yaml")
        assert load_section(InventoryConfig, "child.yaml").rank_batch_size == 8
        assert "tables" in top_level("child.yaml")
        assert "tables" not in top_level(write("run_dir: x", "experiment.yaml"))

    def test_batch_on_ranks(self):
        assert load(TWO).batch_on(8) == 64
        assert load(TWO, "rank_batch_size=", "global_batch_size=100").batch_on(8) == 13


class TestFaults:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (("rows: 5_000", "rows: 0"), "i.yaml:5: tables.1.rows: should be greater than 0, got 0"),
            (("dim: 128", "dim: -4"), "i.yaml:6: tables.1.dim: should be greater than 0, got -4"),
            (("dim: 128", "dim: 130"), "tables.1.dim: should be a multiple of 4, got 130"),
            (("    dim: 128\n", ""), "i.yaml:4: tables.1.dim: required, but not set"),
            (("kind: sequence", "knd: sequence"), "i.yaml:7: tables.1.knd: unknown key; did you mean 'kind'?"),
            (("kind: sequence", "kind: pooling"), "'pooling' is not allowed; did you mean 'pooled'?"),
            (("name: users", "name: items"), "tables are named twice: items"),
            (("rank_batch_size: 64", ""), "set one of rank_batch_size and global_batch_size"),
            (
                ("12.5", "12.5\n    sharding_types: [grid_shard]"),
                "grid_shard does not exist for sequence tables; use data_",
            ),
            (("12.5", "12.5\n    cacheability: 0.9"), "tables.1.cacheability: should be less than or equal to 0.8"),
            (("12.5", "12.5\n    min_shards: 4\n    max_shards: 2"), "max_shards=2 is below min_shards=4"),
            (
                ("dim: 64}", "dim: 64, pooling: mean, sharding_types: [grid_shard]}"),
                "grid_shard computes wrong results with pooling=mean",
            ),
        ],
    )
    def test_names_place_and_path(self, change, said):
        assert change[0] in TWO
        assert said in fault(TWO.replace(*change))

    @pytest.mark.parametrize(
        ("override", "said"),
        [
            (f"rank_batch_size={10**29}", "rank_batch_size: should be less than or equal to 9007199254740992"),
            ("dense={kind: given, parameters: 1_000_000_000_000_000_000}", "dense.parameters: should be less than"),
            ("dense={kind: given, forward_flops_per_example: 1.0e+40}", "dense.forward_flops_per_example: should be"),
            ("loss.scores_per_example=1.0e+300", "loss.scores_per_example: should be less than"),
        ],
    )
    def test_limits(self, override, said):
        assert said in fault(TWO, override)

    @pytest.mark.parametrize(
        "beyond",
        [
            {"rows": 10**400},
            {"rows": 2**53 + 1},
            {"dim": 2**20 + 4},
            {"features": 10**24},
            {"ids_per_example": 1e308},
            {"ids_per_step": 1e17},
            {"skew": 65.0},
            {"skew": math.nan},
            {"ids_per_example": math.inf},
            {"ranks": (10**30,)},
            {"max_shards": 10**30},
        ],
        ids=str,
    )
    def test_limits_of_tables(self, beyond):
        with pytest.raises(ValidationError, match=next(iter(beyond))):
            TableConfig(**{"name": "a", "rows": 1, "dim": 4, **beyond})

    def test_both_batches(self):
        assert "set one of" in fault(TWO, "global_batch_size=8")

    def test_no_tables(self):
        assert "tables is empty, and so is dense" in fault("rank_batch_size: 1\ntables: []")

    def test_unknown_key_of_the_dense_part_names_the_nearest(self):
        said = fault(TWO, "dense={kind: tower, dim: 8, tower: {kind: sasrec, ffn_dims: 8}}")
        assert "dense.tower.ffn_dims: unknown key; did you mean 'ffn_dim'?" in said

    @pytest.mark.parametrize(
        ("dense", "now"),
        [
            ("{kind: hstu, layers: 2}", "kind hstu is now written {kind: tower, tower: {kind: KIND"),
            ("{kind: dlrm, dcn_layers: 2}", "dense.dcn_layers: is now called interaction.layers"),
        ],
    )
    def test_what_was_renamed_says_its_new_name(self, dense, now):
        assert now in fault(TWO, f"dense={dense}")

    def test_optimizers_are_those_of_the_registries(self):
        assert "'adam' is no dense optimizer; use adamw, adagrad, sgd" in fault(TWO, "dense_optimizer=adam")
        assert "'lamb' is no table optimizer; use adam" in fault(TWO.replace("dim: 64}", "dim: 64, optimizer: lamb}"))

    @pytest.mark.parametrize(
        ("dense", "said"),
        [
            (
                "{kind: tower, tower: {kind: hstu}, dim: 8, mean_length: 9, max_length: 8}",
                "mean_length=9 is above max_length=8",
            ),
            (
                "{kind: tower, tower: {kind: sasrec, heads: 3}, dim: 8, mean_length: 9, max_length: 9}",
                "dim=8 is not divisible by tower.heads=3",
            ),
            ("{kind: dlrm, dim: 8, bottom: [16], top: [1]}", "bottom=[16] must end with dim=8"),
            (
                "{kind: dlrm, dim: 8, bottom: [8], top: [1]}",
                "dense.dim=8 is the width of every pooled table, not of users",
            ),
        ],
    )
    def test_dense_parts_that_cannot_be(self, dense, said):
        assert said in fault(TWO, f"dense={dense}")
