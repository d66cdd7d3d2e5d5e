"""The HTML page: one file that holds all its data, at any size."""

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gr.planner.estimate import MEMORY, Estimate, estimate
from gr.planner.estimate_tables import TABLE_PHASES
from gr.planner.plan import search
from gr.planner.report import page, summary
from gr.planner.report.page import TEMPLATE
from tests.support.estimates import estimate_of

HOSTILE = "</script><script>document.title='owned'</script><!-- \u2028 & \" 表"


def data_of(text: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert match is not None
    return json.loads(match[1])


def test_it_holds_every_rank_and_table() -> None:
    estimated = estimate_of(64, 40)
    data = data_of(page(estimated))
    assert [series["key"] for series in data["memory"]] == list(MEMORY[::-1])
    assert [series["key"] for series in data["work"]] == list(TABLE_PHASES)
    memory_MR = np.array([series["values"] for series in data["memory"]])[::-1]
    np.testing.assert_array_equal(memory_MR, estimated.memory_MR)
    seconds_R = np.array([series["values"] for series in data["work"]]).sum(axis=0)
    np.testing.assert_allclose(seconds_R, estimated.table_seconds_R, rtol=1e-4)
    for row, share, table in zip(data["tables"], estimated.tables, estimated.plan.inventory.tables, strict=True):
        assert row[:3] == [share.name, share.sharding_type, share.kernel]
        assert row[5:7] == [table.rows, table.dim]
        assert row[7:11] == [share.copies, share.shards, share.bytes, share.largest_shard_bytes]
        assert row[12] == "all" or ranks_in(row[12]) == set(share.ranks)
    assert sum(phase["slowest"] - phase["hidden"] for phase in data["phases"]) == pytest.approx(data["step"], rel=1e-4)


def ranks_in(text: str) -> set[int]:
    spans = [[int(end) for end in span.split("-")] for span in text.split(", ")]
    return {rank for span in spans for rank in range(span[0], span[-1] + 1)}


def test_a_thousand_tables_on_a_thousand_ranks_stay_small() -> None:
    assert len(page(estimate_of(1024, 1000)).encode()) < 1_000_000


def test_it_asks_the_network_for_nothing() -> None:
    text = page(estimate_of(8, 26))
    addresses = set(re.findall(r"https?://[^\"'\s)]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text and not re.search(r"(?:src|href)\s*=|url\(|@import|fetch\(", text)
    assert "{{" not in text


def test_names_are_data() -> None:
    estimated = estimate_of(8, 3, names=(HOSTILE,))
    inventory = estimated.plan.inventory.model_copy(update={"name": HOSTILE + "{{data}}"})
    text = page(replace(estimated, plan=replace(estimated.plan, inventory=inventory)))
    assert data_of(text)["tables"][0][0] == HOSTILE
    assert data_of(text)["title"] == HOSTILE + "{{data}} on h100x8"
    assert text.count("<script") == TEMPLATE.read_text(encoding="utf-8").count("<script")
    assert "<title>&lt;/script&gt;" in text


def test_every_series_has_a_colour_in_light_and_in_dark() -> None:
    estimated = replace(estimate_of(16, 5), host_R=np.full(16, 1e9))
    text = page(estimated)
    for kind in ("memory", "host", "work", "links"):
        for series in data_of(text)[kind]:
            assert len(re.findall(rf"--{series['key']}:", text)) == 2, series["key"]


@pytest.mark.parametrize("change", ["nothing costs", "one rank"])
def test_edges(change: str) -> None:
    estimated: Estimate = estimate_of(1, 1)
    if change == "nothing costs":
        estimated = replace(estimated, intra_bytes_R=np.zeros(1), inter_bytes_R=np.zeros(1), tokens=0.0, flops=0.0)
    assert data_of(page(estimated))["ranks"] == 1


def test_both_reports_take_what_the_planner_makes() -> None:
    made_up = estimate_of(8, 12)
    estimated = estimate(search(made_up.plan.inventory, made_up.plan.topology))
    assert len(data_of(page(estimated))["tables"]) == 12
    assert len(summary(estimated)) == len(summary(made_up))
