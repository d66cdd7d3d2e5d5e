"""Initial weights: a function of (seed, table, row, column), with the moments of a normal cut at two deviations."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from gr.config.run import EmbeddingsConfig
from gr.embeddings import InitialRows, TableShard, init, local_shards
from gr.embeddings.init import CUT, key_of, truncated_normal, uniform
from tests.support.pooled import PooledTable

STD = 0.02


def filled(
    rows: int,
    columns: int,
    *,
    seed: int = 5,
    table: str = "t",
    at: tuple[int, int] = (0, 0),
    whole: int = 8,
    dim: int = 8,
):
    """The rectangle of a table of `whole` columns that starts `at` (row, column)."""
    weight = torch.full((rows, columns), math.nan)
    place = {"row_offset": at[0], "column_offset": at[1], "shape": (1000, whole)}
    shard = SimpleNamespace(table=table, weight=weight, is_pooled=False, **place)
    InitialRows(seed, EmbeddingsConfig(init_std=STD), dim).fill(cast(TableShard, shard))
    return weight


def test_a_shard_holds_the_values_of_its_place() -> None:
    whole = filled(40, 8)
    for row, column, rows, columns in [(0, 0, 7, 8), (13, 0, 27, 8), (0, 4, 40, 4), (5, 4, 1, 4), (40, 0, 0, 8)]:
        part = filled(rows, columns, at=(row, column))
        assert torch.equal(part, whole[row : row + rows, column : column + columns])


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = filled(40, 8)
    for elements in (1, 24, 25):
        monkeypatch.setattr(init, "CHUNK_ELEMENTS", elements)
        assert torch.equal(filled(40, 8), whole)


def test_seeds_and_tables_differ() -> None:
    keys = [(1, "item_id"), (2, "item_id"), (1, "user_id"), (11, "item_id")]
    tables = [filled(30, 8, seed=seed, table=table) for seed, table in keys]
    for first in range(len(tables)):
        for second in range(first):
            assert (tables[first] == tables[second]).double().mean() < 0.01
            # And one is not the other, moved along its rows.
            flat = [tables[i].flatten() for i in (first, second)]
            assert not torch.isin(flat[0], flat[1]).any()


def test_columns_past_the_dim_are_zero_and_the_others_are_not_moved_by_them() -> None:
    cut = filled(30, 8, dim=6)
    assert (cut[:, 6:] == 0).all() and (cut[:, :6] != 0).all()
    assert torch.equal(cut[:, :6], filled(30, 8)[:, :6])
    # Also where the dim lies inside, or before, a column shard.
    assert torch.equal(filled(30, 4, at=(0, 4), dim=6), cut[:, 4:])
    assert (filled(30, 4, at=(0, 4), dim=3) == 0).all()


@pytest.fixture(scope="module")
def sample() -> torch.Tensor:
    return truncated_normal(torch.arange(200_000), key_of(7, "t"), 1.0)


def test_moments_and_cut(sample: torch.Tensor) -> None:
    """Of the standard normal cut at +-2: mass erf(sqrt 2), variance 1 - 4 phi(2) / mass; six standard errors."""
    mass = math.erf(CUT / math.sqrt(2))
    variance = 1 - 2 * CUT * math.exp(-(CUT**2) / 2) / math.sqrt(2 * math.pi) / mass
    six = 6 / math.sqrt(len(sample))
    assert sample.abs().max() < CUT and sample.abs().max() > 0.999 * CUT
    assert abs(sample.mean()) < six * math.sqrt(variance)
    assert abs(sample.var() - variance) < six * math.sqrt(2) * variance
    # The whole distribution, by its largest distance from the exact one (Kolmogorov): 3 / sqrt(n) has p < 1e-7.
    exact = (0.5 * (1 + torch.erf(sample.sort().values / math.sqrt(2))) - 0.5) / mass + 0.5
    place = (torch.arange(len(sample)) + 0.5) / len(sample)
    assert (exact - place).abs().max() < 3 / math.sqrt(len(sample))


def test_neighbours_are_not_correlated(sample: torch.Tensor) -> None:
    for lag in (1, 8, 64):
        pair = torch.stack([sample[:-lag], sample[lag:]])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 6 / math.sqrt(len(sample))


def test_std_scales() -> None:
    counters = torch.arange(100)
    assert torch.allclose(truncated_normal(counters, 1, 0.5), 0.5 * truncated_normal(counters, 1, 1.0))


def test_values_are_kept_between_releases() -> None:
    """Another value here changes every run that starts from a seed: note it in CHANGELOG.md."""
    values = truncated_normal(torch.tensor([0, 1, 10**12]), key_of(1, "item_id"), 1.0)
    assert values.tolist() == pytest.approx([-0.4600888181315581, 1.540126021857853, -0.2019334501396518], abs=1e-12)


def test_uniform_fills_its_range_evenly() -> None:
    """Within 1/sqrt(rows), and as far from the exact distribution as a sample of this size may be (Kolmogorov)."""
    values = uniform(torch.arange(200_000), key_of(7, "t"), 0.25)
    assert values.abs().max() < 0.25 and values.abs().max() > 0.2499
    place = (torch.arange(len(values)) + 0.5) / len(values)
    assert (values.sort().values / 0.5 + 0.5 - place).abs().max() < 3 / math.sqrt(len(values))


def test_uniform_values_are_kept_between_releases() -> None:
    values = uniform(torch.tensor([0, 1, 10**12]), key_of(1, "user"), 1.0)
    assert values.tolist() == pytest.approx([-0.9043375653325388, -0.5848048922972063, 0.7465963866233838], abs=1e-12)


@pytest.mark.parametrize("how", ["truncated_normal", "uniform_rows"])
def test_pooled_tables_are_filled_to_their_last_column(make_bags: Callable, how: str) -> None:
    """Whatever the width of the sequence tables beside them, which make_bags says is 4; each by its own rows."""
    tables = [PooledTable("few", 16, 8, ("a",)), PooledTable("many", 400, 12, ("b",), "mean")]
    config = EmbeddingsConfig.model_validate({"init": how, "init_std": 0.5, "optimizer": {"kind": "sgd"}})
    model = make_bags(tables, {"few": "table_wise", "many": "row_wise"}, config)
    for shard in local_shards(model):
        assert (shard.weight != 0).all() and shard.is_pooled
        bound = 1.0 if how == "truncated_normal" else shard.shape[0] ** -0.5
        assert 0.9 * bound < shard.weight.abs().max() < bound
