"""The table of docs/planning.md says what `gr plan` prints."""

import re

import pytest

from gr.cli import main
from tests.support import ROOT

ROW = re.compile(r"\| `gr plan (\S+) --topology (\S+)` \| (\S+) of (\S+) GB \| (\S+ ms) \| (\S+ %) \| (\d+) (\S+) \|")
ROWS = ROW.findall((ROOT / "docs/planning.md").read_text())


def test_every_model_at_scale_is_there():
    assert {row[0] for row in ROWS} == {f"configs/scale/{p.name}" for p in (ROOT / "configs/scale").iterdir()}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row(row, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    config, topology, used, capacity, step, gap, smallest, hardware = row
    assert main(["plan", str(ROOT / config), "--topology", topology]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"takes {re.escape(used)} GB of {re.escape(capacity)} GB", shown), shown
    assert re.search(rf"^Step +{re.escape(step)}", shown, re.MULTILINE), shown
    assert re.search(rf"^Gap to the bound +{re.escape(gap)}", shown, re.MULTILINE), shown
    assert main(["plan", str(ROOT / config), "--topology", hardware, "--smallest"]) == 0
    assert f"smallest: {smallest} ranks of {hardware}" in capsys.readouterr().out
