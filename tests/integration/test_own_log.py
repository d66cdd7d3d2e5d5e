"""MovieLens-100K as anyone's raw log: prepared, trained on, recommended from; the hit rate is evaluation's."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import gr
from gr.checkpoint import resolve
from gr.config import RunConfig
from gr.dist import World
from gr.experiment import evaluate, recommend, train
from gr.recipes.base import Request
from tests.support.ranks import run_ranks

pd = pytest.importorskip("pandas", reason="needs pandas: the extra dev")


def trained(world: World, config: RunConfig) -> Any:
    return train(config, world)


def measured(world: World, config: RunConfig, out: Path) -> float:
    checkpoint = resolve(config.run_dir)
    recommend(config, checkpoint, world, out, Request(k=10, holdout=1))
    return evaluate(config, checkpoint, world, "test")["model"]["hr@10"]


@pytest.mark.slow
@pytest.mark.data
def test_the_hit_rate_of_recommendations_is_evaluation_s(test_data: Path, tmp_path: Path) -> None:
    log = test_data / "ml-100k" / "ml-100k.inter"
    columns = {"user": "user_id:token", "item": "item_id:token", "time": "timestamp:float", "time_unit": "s"}
    gr.prepare_events(log, tmp_path / "data", **columns)
    overrides = [f"data.path={tmp_path / 'data'}", f"run_dir={tmp_path / 'run'}", "trainer.epochs=2"]
    config = gr.load_config("retrieval/hstu", [*overrides, "evaluation.every=null", "evaluation.baselines=[]"])
    run_ranks(trained, 1, config)
    events = pd.read_csv(log, sep="\t").sort_values("timestamp:float", kind="stable")
    newest = events.groupby("user_id:token").tail(1).set_index("user_id:token")["item_id:token"]
    for ranks in (1, 2, 4):
        out = tmp_path / f"{ranks}.parquet"
        rates = run_ranks(measured, ranks, config, out)
        top = pq.read_table(out).to_pandas()
        hits = (top.item_id == top.user_id.map(newest)).groupby(top.user_id).any()
        assert len(hits) == 943 and set(rates) == {hits.mean()}, ranks
