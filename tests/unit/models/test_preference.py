"""The planner's description of the preference model, and the configurations that are refused."""

import pytest
from pydantic import ValidationError

from gr.config.preference import PreferenceTaskConfig
from gr.models import build_model
from gr.models.dense import dense_parameters
from tests.support.schemas import item_schema
from tests.support.tiny import ITEMS
from tests.support.tiny_preference import tiny_preference


@pytest.mark.parametrize(
    "loss", [{"kind": "sdpo"}, {"kind": "rejection", "reward": "r"}, {"kind": "ppo", "reward": "r"}]
)
def test_the_planner_counts_its_parameters(tmp_path, loss):
    config, schema = tiny_preference(tmp_path, tmp_path, tmp_path, task={"loss": loss}), item_schema(ITEMS)
    dense = config.dense_part(schema)
    described = dense.tower.cost(dense.dim, dense.max_length, 4).parameters + dense.other_parameters
    parameters = dense_parameters(build_model(config, schema))
    assert sum(p.numel() for p in parameters.values()) == described
    frozen = ("reference.", "reward.", "drawing.")
    assert all(p.requires_grad != name.startswith(frozen) for name, p in parameters.items())


def test_dropout_is_off_in_training(tmp_path):
    model = build_model(tiny_preference(tmp_path, tmp_path, tmp_path), item_schema(ITEMS)).train()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    "settings, fault",
    [
        ({"liked": 5}, "liked=5, but the highest of task.levels is 4: set liked up to that"),
        ({"chosen": 5}, "chosen=5, but the highest of task.levels is 4: set chosen up to that"),
        ({"rejected": 9, "window": 9}, "rejected=9, but a window of 9 events has 8 after the chosen one"),
        ({"loss": {"kind": "ppo", "reward": "r", "candidates": 5}}, "candidates=5, of which loss.ppo draws 10"),
        ({"levels": {"kind": "ratings", "thresholds": (3.0, 2.0, 4.0)}}, "do not ascend"),
    ],
)
def test_what_cannot_be_is_refused(settings, fault):
    with pytest.raises(ValidationError, match=fault):
        PreferenceTaskConfig.model_validate(settings)
