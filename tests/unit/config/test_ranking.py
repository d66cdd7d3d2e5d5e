from pathlib import Path

import pytest

from gr.config import RankingConfig, load_config
from gr.errors import ConfigError

BASE = """\
run_dir: runs/x
task: {kind: ranking, tasks: [{kind: bce, action: like}]}
data: {path: data}
trainer: {steps: 1}
"""


def loaded(tmp_path: Path, *overrides: str) -> RankingConfig:
    file = tmp_path / "run.yaml"
    file.write_text(BASE)
    config = load_config(file, overrides)
    assert isinstance(config, RankingConfig)
    return config


def test_the_shipped_configurations_load() -> None:
    for file in Path("configs/ranking").glob("*-hstu.yaml"):
        assert isinstance(load_config(file), RankingConfig)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.input.kind=additive"], r"task.supervision=all needs model.input.kind=interleaved"),
        (
            ["task.supervision=candidates", "model.tower.kind=hstu"],
            "candidates needs a tower with a mask for candidates, such as stu, not hstu",
        ),
        (["data.train_holdout=9"], r"data.train_holdout=9 trains on what is evaluated: set it to 10"),
        (["data.train_holdout=19", "evaluation.every=3"], "set it to 20"),
        (["evaluation.newest=300"], r"must be at most data.max_length=200"),
        (["model.tower.kind=hstu", "model.tower.divisor=actual_len"], "divisor=actual_len tells a predicted event how"),
        (["model.tower.max_attn_len=4", "model.tower.min_full_attn_seq_len=2"], "min_full_attn_seq_len tells a predic"),
        (["task.supervision=candidates", "data.candidates=200"], "data.candidates=200 leaves no room for history in"),
        (["data.lanes=7"], "is not divisible by data.lanes=7"),
        (
            ["model.dim=10", "model.tower.kind=sasrec", "model.tower.heads=3"],
            "dim=10 is not divisible by tower.heads=3",
        ),
        (["data.stream.windows=3"], "set cut to newest, train_holdout to 0 and stoch"),
        (["data.stochastic_length.alpha=2.5"], "less than or equal to 2, got 2.5"),
        (["data.stochastic_length.selector=newest"], "allowed: greedy, random, weighted"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("[]", "expected 1 items, got 0"),
        ("[{kind: bce, action: a}, {kind: mse, value: a}]", "name one twice"),
        ("[{kind: mse, value: a}]", "must begin with a bce task"),
        ("[{kind: hinge, action: a}]", "unknown kind 'hinge'; allowed: bce, mse"),
    ],
)
def test_tasks(tmp_path: Path, tasks: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, f"task.tasks={tasks}")
