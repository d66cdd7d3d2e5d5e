"""configs/ranking/streaming-hstu.yaml is of the sizes of DLRM-v3, and its header says how many parameters it has."""

import re

from gr.config import load_config, packaged
from gr.planner.estimate_dense import dense_work

PUBLISHED = 16_693_585  # dense parameters of DlrmHSTU as dlrm_v3/configs.py builds it for streaming-100b


def test_the_header_states_the_dense_parameters() -> None:
    header = (packaged.CONFIGS / "ranking/streaming-hstu.yaml").read_text()
    own, published = re.findall(r"([\d,]+) dense parameters, where the published model has ([\d,]+)\.", header)[0]
    config = load_config("ranking/streaming-hstu", [f"data.path={packaged.CONFIGS}/ranking/published/streaming-hstu"])
    assert dense_work(config.inventory(config.planning_schema()), 1).parameters == int(own.replace(",", ""))
    assert int(published.replace(",", "")) == PUBLISHED
