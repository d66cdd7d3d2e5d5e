"""A planted effect of time, which only the time bias can see, is learnt with it and not without it."""

import pytest

from gr.config import load_config
from gr.experiment import train
from gr.prepare.synthetic import StreamOptions
from gr.prepare.synthetic_time import write_time_stream
from tests.support import ROOT
from tests.support.ranks import run_ranks

OPTIONS = StreamOptions(items=200, categories=20, records=4000, length=32, seed=1)


def run(world, config) -> dict:
    return train(config, world)


@pytest.mark.slow
@pytest.mark.full
def test_the_time_bias_learns_what_the_gap_says(tmp_path):
    oracle = write_time_stream(OPTIONS, tmp_path / "data")
    reached = {}
    for time_bias in (True, False):
        config = load_config(
            str(ROOT / "configs/retrieval/synthetic-time.yaml"),
            [
                f"data.path={tmp_path}/data/train",
                f"evaluation.path={tmp_path}/data/test",
                f"run_dir={tmp_path}/{time_bias}",
                "data.max_length=32",
                "trainer.steps=300",
                "evaluation.every=null",
                "evaluation.baselines=[]",
                "embeddings.optimizer.lr=4e-3",
                "optimizer.lr=4e-3",
                f"model.tower.time_bias={str(time_bias).lower()}",
            ],
        )
        reached[time_bias] = run_ranks(run, 1, config)[0]["model"]["hr@10"]
    with_gap, without_gap = (oracle[name]["filter_seen=none"]["hr@10"] for name in ("with_gap", "without_gap"))
    # 400 test records: a standard error is 0.025.
    assert reached[False] < without_gap + 0.08
    assert reached[True] > without_gap + 0.5 * (with_gap - without_gap), (reached, with_gap, without_gap)
