"""The headers of configurations at published sizes say how many dense parameters they have, and the published model."""

import re

import pytest

from gr.config import load_config, packaged
from gr.planner.estimate_dense import dense_work

# Dense parameters counted from the modules of DlrmHSTU as dlrm_v3/configs.py builds it for streaming-100b, and as
# dlrm_v4 of MLPerf Training builds it for Yambda-5b; tests/unit/planner/test_inventory.py has them of configs/scale.
PUBLISHED = {"streaming-hstu": ("streaming-hstu", 16_693_585), "dlrm-v4-hstu": ("yambda-5b", 15_243_057)}


@pytest.mark.parametrize(("name", "sizes", "parameters"), [(name, *of) for name, of in PUBLISHED.items()])
def test_the_header_states_the_dense_parameters(name: str, sizes: str, parameters: int) -> None:
    header = (packaged.CONFIGS / f"ranking/{name}.yaml").read_text()
    own, published = re.findall(r"([\d,]+) dense parameters, where the published model has ([\d,]+)\.", header)[0]
    config = load_config(f"ranking/{name}", [f"data.path={packaged.CONFIGS}/ranking/published/{sizes}"])
    assert dense_work(config.inventory(config.planning_schema()), 1).parameters == int(own.replace(",", ""))
    assert int(published.replace(",", "")) == parameters
