"""The table of docs/data.md of what `gr prepare events` refuses: a log of each kind, and the phrase of its line."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.support.own_log import LOG, TIMED, refusal

PAGE = Path(__file__).parents[3] / "docs" / "data.md"
TABLE = re.search(r"\| in the log \| the line says \|\n\|---\|---\|\n(.*?)\n\n", PAGE.read_text(), re.DOTALL)
PHRASES = re.findall(r"`([^`]+)`", "\n".join(row.split("|")[2] for row in TABLE[1].splitlines())) if TABLE else []
FLOATS = LOG.assign(u=np.array([1 << 24, 3, (1 << 24) + 2, 5, 6], np.float32))
MILLISECONDS = LOG.assign(t=LOG.t * 1000)
# By phrase: logs, or the names and texts of files, and the options beside those of TIMED.
FAULTS: dict[str, list[tuple[Any, dict[str, Any]]]] = {
    "has no column": [(LOG, {"item": "sku"})],
    "has more than one column": [({"log.csv": "u,i,t,t\na,b,1,2\n"}, {})],
    "name each file once": [({"log.csv": "u,i,t\na,b,1\n"}, {"again": True})],
    "prepare one kind at a time": [({"log.csv": "u,i,t\na,b,1\n", "log.jsonl": "{}\n"}, {})],
    "prepare files of one layout at a time": [({"1.csv": "u,i,t\na,b,1\n", "2.csv": "u,t,i\na,1,b\n"}, {})],
    "leave them out with --on-bad-row skip": [(LOG.assign(i=["x", None, "y", "z", "z"]), {})],
    "is no whole number up to": [
        (FLOATS, {}),
        (LOG.assign(i=[0.5, 1, 2, 3, 4]), {}),
        (LOG.assign(i=[2.0**53 + 2, 1, 2, 3, 4]), {}),
    ],
    "write the column as text": [(LOG.assign(u=np.array([2**63, 1, 2, 3, 4], np.uint64)), {})],
    "confirm with --time-unit": [(LOG, {"time_unit": None})],
    "set --time-unit": [(MILLISECONDS, {})],
    "write all in one unit": [(LOG.assign(t=[*LOG.t[:4], *MILLISECONDS.t[4:]]), {"time_unit": "ms"})],
    "write all as one of them": [(LOG.assign(t=["2026-01-01", "1", "2", "3", "4"]), {})],
    "is neither a number nor a date": [(LOG.assign(t=[word, "1", "2", "3", "4"]), {}) for word in ("infinity", "x")],
    "has values that are not finite": [(LOG.assign(t=[np.inf, 1, 2, 3, 4]), {})],
    "beyond the year 9999": [(LOG.assign(t=[0, 1, 2, 3, 253_402_300_800]), {})],
    "are missing or no finite numbers": [
        (LOG.assign(x=[np.nan, 1, 2, 3, 4]), {"rating": "x"}),
        (LOG.assign(x=[np.inf, 1, 2, 3, 4]), {"values": ("x",)}),
    ],
    "is neither 0 nor 1": [(LOG.assign(l=[2, 0, 1, 0, 1]), {"label": "l"})],
    "at most 31 are actions": [
        (pd.concat([LOG] * 8).assign(f=[f"a{place}" for place in range(40)]), {"actions": ("f",)})
    ],
    "has more than one row": [(LOG, {"item_features": pd.DataFrame({"i": ["x1", "x1"], "g": ["p", "q"]})})],
}


def test_the_table_has_each_fault_once() -> None:
    assert sorted(PHRASES) == sorted(FAULTS)


@pytest.mark.parametrize("phrase", FAULTS)
def test_the_log_is_refused(tmp_path: Path, phrase: str) -> None:
    for source, options in FAULTS[phrase]:
        chosen = dict(options)
        if isinstance(source, dict):
            for name, text in source.items():
                (tmp_path / name).write_text(text)
            source = [tmp_path / name for name in source] * (1 + chosen.pop("again", False))
        assert phrase in refusal(tmp_path, source, **{**TIMED, **chosen})
