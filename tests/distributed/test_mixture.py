"""A mixture of logits trained, evaluated and asked over sharded tables, and refused where products are needed."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from gr.checkpoint import resolve
from gr.config import RetrievalConfig
from gr.config.export import ExportConfig
from gr.dist import World
from gr.errors import ConfigError
from gr.experiment import embed, evaluate, recommend, train
from gr.models.saved import load
from gr.recipes.base import Request
from gr.serving.export import export
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_config, write_tiny

MIXTURE = {"kind": "mol", "query_vectors": 3, "item_vectors": 2, "dim": 4, "hidden": 5, "dropout": 0.0}


def trained(world: World, config: RetrievalConfig) -> dict[str, Any] | None:
    return train(config, world)


def asked(world: World, config: RetrievalConfig, out: Path) -> tuple[dict[str, float], str]:
    """Metrics of the test split, recommendations written as `out`, and what `gr embed` is refused with."""
    checkpoint = resolve(config.run_dir)
    recommend(config, checkpoint, world, out, Request(5))
    with pytest.raises(ConfigError) as error:
        embed(config, checkpoint, world, out.parent / "vectors")
    return evaluate(config, checkpoint, world, "test")["model"], str(error.value)


@pytest.mark.slow
def test_on_one_rank_and_on_two(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", users=97)
    answers = []
    for ranks in (1, 2):
        task = {"similarity": MIXTURE, "negatives": {"kind": "per_position", "count": 6}}
        config = tiny_config(data, tmp_path / f"run-{ranks}", task=task, trainer={"steps": 6})
        report, *_ = run_ranks(trained, ranks, config)
        (metrics, refusal), *_ = run_ranks(asked, ranks, config, tmp_path / f"{ranks}.parquet")
        assert metrics == report["model"] and "`gr embed` needs scores that are products" in refusal
        answers.append((metrics, pq.read_table(tmp_path / f"{ranks}.parquet")))
    (alone, first), (both, second) = answers
    assert alone["mrr"] == pytest.approx(both["mrr"], abs=1e-3)
    places = first.column("place").to_numpy() == 1
    scores = [table.column("score").to_numpy() for table in (first, second)]
    assert np.allclose(*scores, atol=1e-2), "ranks train the same model, up to the order of sums"
    saved = load(config.run_dir)
    history = [3, 9, 4]
    (best,) = saved.recommend([history], k=3, filter_seen="none")
    scored = saved.score([history], [each.item for each in best])[0]
    assert np.allclose(scored.tolist(), [each.score for each in best], atol=1e-4) and places.any()
    with pytest.raises(ConfigError, match="embed_items needs scores that are products"):
        saved.embed_items()
    with pytest.raises(ConfigError, match=r"an index of items needs scores .* task.similarity.kind=mol"):
        export(config.run_dir, tmp_path / "package", ExportConfig())
