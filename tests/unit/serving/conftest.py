"""A trained run of each kind of model, on data of its own for the evaluation of clicks."""

from pathlib import Path

import pytest

from gr.config import RunConfig
from tests.support.tiny import tiny_config, write_tiny
from tests.support.tiny_histories import tiny_ranking_config, write_histories
from tests.support.tiny_tabular import tiny_click_config, write_tiny_tabular


def _trained(config: RunConfig) -> RunConfig:
    from gr.dist import world
    from gr.experiment import train

    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        patch.setenv("LOCAL_WORLD_SIZE", "1")
        with world("cpu") as alone:
            train(config, alone)
    return config


@pytest.fixture(scope="session")
def click_run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("click")
    data = write_tiny_tabular(folder / "data", rows=1_500)
    other = write_tiny_tabular(folder / "other", rows=1_000, seed=1)
    return _trained(tiny_click_config(data, folder / "run", trainer={"steps": 60}, evaluation={"path": str(other)}))


@pytest.fixture(scope="session")
def ranking_run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("ranking")
    write_histories(folder / "data", users=160)
    return _trained(tiny_ranking_config(folder / "data", folder / "run", trainer={"steps": 30}))


@pytest.fixture(scope="session")
def absolute_ranking_run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Of a form whose keys and values may be kept from one request to the next."""
    folder, base = tmp_path_factory.mktemp("absolute"), tiny_ranking_config()
    write_histories(folder / "data", users=64, longest=15)
    model = {**base.model.model_dump(), "input": {"kind": "additive"}, "place": "absolute"}
    task = {**base.task.model_dump(), "supervision": "candidates"}
    sections = {"model": model, "task": task, "trainer": {"steps": 2}, "checkpoint": {"every": 1}}
    return _trained(tiny_ranking_config(folder / "data", folder / "run", **sections))


@pytest.fixture(scope="session")
def retrieval_run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("retrieval")
    write_tiny(folder / "data", users=160)
    return _trained(tiny_config(folder / "data", folder / "run", trainer={"steps": 30}))


@pytest.fixture(scope="session")
def folder_of_another_kind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("others")
    write_histories(folder / "data", users=16)
    return folder / "data"
