"""Published models are planned by the command in the header of their configuration, which needs no data."""

import json
import re

import pytest

from gr.cli import main
from tests.support import ROOT

pytestmark = pytest.mark.slow
# Parameters of the tables.
CLICK = {"criteo-kaggle": 541e6, "criteo-terabyte": 24.0e9, "mlperf-dlrm-v2": 26.15e9}
RANKING = {"streaming-hstu": 514.6e9, "dlrm-v4-hstu": 7.7e9}
PUBLISHED = {f"dlrm/{name}": size for name, size in CLICK.items()} | {f"ranking/{n}": s for n, s in RANKING.items()}


@pytest.mark.parametrize(("path", "parameters"), PUBLISHED.items(), ids=PUBLISHED)
def test_it_fits_the_cluster_that_its_header_names(path, parameters, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    (call,) = re.findall(r"^#   gr (plan .*)$", (ROOT / f"configs/{path}.yaml").read_text(), re.MULTILINE)
    assert main([*call.split(), "--json", str(tmp_path / "plan.json")]) == 0
    tables = json.loads((tmp_path / "plan.json").read_text())["inventory"]["tables"]
    assert sum(table["rows"] * table["dim"] for table in tables) == pytest.approx(parameters, rel=2e-3)
    assert len(tables) == 26 or path not in {f"dlrm/{name}" for name in CLICK}
