"""The page of `gr plan --html` in headless Chromium, opened from file://: what is drawn, and how it answers."""

import re
import shutil
import struct
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from gr.planner.estimate import MEMORY, Estimate
from gr.planner.report import page
from gr.units import size
from tests.support.estimates import estimate_of

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs chromium, chromium-browser or google-chrome on PATH"),
]
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\">"


class Page(HTMLParser):
    """Elements of a page as it stands after its script ran."""

    def __init__(self, dom: str) -> None:
        super().__init__()
        self.root: dict[str, str | None] = {}
        self.ranks: dict[str, list[int]] = {}  # by section, from left to right
        self.rows: list[list[str]] = []
        self.sorted: dict[str, str] = {}
        self.tips: list[str] = []
        self.images = 0
        self._section, self._open, self._in_tip = "", "", False
        self.feed(dom)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        has = {key: value or "" for key, value in attrs}
        self._open = tag
        self._in_tip = self._in_tip or has.get("class") == "tip"
        match tag:
            case "html":
                self.root = dict(attrs)
            case "section":
                self._section = has["id"]
            case "rect" if has.get("class", "").startswith("hit"):
                self.ranks.setdefault(self._section, []).append(int(has["data-rank"]))
            case "tr":
                self.rows.append([])
            case "td":
                self.rows[-1].append("")
            case "th":
                self.sorted[has["data-key"]] = has["aria-sort"]
            case "img":
                self.images += 1

    def handle_endtag(self, tag: str) -> None:
        self._open = ""
        self._in_tip = self._in_tip and tag != "div"

    def handle_data(self, data: str) -> None:
        if self._open == "td":
            self.rows[-1][-1] += data
        elif self._in_tip:
            self.tips.append(data)

    @property
    def tables(self) -> list[str]:
        return [row[0] for row in self.rows if row]


def chromium(folder: Path, *arguments: str) -> str:
    assert BROWSER is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=2000"]
    command = [BROWSER, *options, f"--user-data-dir={folder}/profile", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout


def opened(folder: Path, estimated: Estimate, address: str = "", script: str = "") -> Page:
    """`script` runs after the page's own."""
    file = folder / "plan.html"
    file.write_text(page(estimated).replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    shown = Page(chromium(folder, "--dump-dom", f"{file.as_uri()}{address}"))
    assert shown.root.get("data-error") is None and shown.root.get("data-ready") == "yes", shown.root
    return shown


@pytest.mark.parametrize(("ranks", "tables"), [(1, 1), (8, 26), (1024, 1000)])
def test_every_rank_has_its_bars_and_every_table_its_row(tmp_path: Path, ranks: int, tables: int) -> None:
    estimated = estimate_of(ranks, tables)
    shown = opened(tmp_path, estimated)
    assert shown.ranks == {section: list(range(ranks)) for section in ("memory", "work", "links")}
    # The page holds five digits of them.
    by_seconds = sorted(estimated.tables, key=lambda share: -float(f"{share.seconds:.5g}"))
    assert shown.tables == [share.name for share in by_seconds]
    assert shown.sorted["seconds"] == "descending" and set(shown.sorted.values()) == {"descending", "none"}


def test_the_address_searches_and_sorts(tmp_path: Path) -> None:
    estimated = estimate_of(8, 200)
    shown = opened(tmp_path, estimated, "#q=ITEM&sort=bytes&dir=asc&order=size")
    items = sorted((share for share in estimated.tables if "item" in share.name), key=lambda share: share.bytes)
    assert len(items) == 20 and shown.tables == [share.name for share in items]
    assert shown.sorted["bytes"] == "ascending"
    assert shown.ranks["memory"] == np.argsort(-estimated.total_memory_R).tolist()


def test_a_wrong_address_shows_the_page_all_the_same(tmp_path: Path) -> None:
    shown = opened(tmp_path, estimate_of(8, 26), "#sort=nothing&order=best&%")
    assert len(shown.tables) == 26 and shown.sorted["seconds"] == "descending"


def test_headers_are_buttons(tmp_path: Path) -> None:
    estimated = estimate_of(8, 26)
    click = "document.querySelector('th[data-key={}] button').click();"
    shown = opened(tmp_path, estimated, script=click.format("name"))
    assert shown.tables == sorted(share.name for share in estimated.tables) and shown.sorted["name"] == "ascending"
    shown = opened(tmp_path, estimated, script=click.format("rows") * 2)
    rows = [int(row[5].replace(",", "")) for row in shown.rows if row]
    assert rows == sorted(rows) and shown.sorted["rows"] == "ascending"


def test_arrow_keys_tell_a_rank(tmp_path: Path) -> None:
    right = "svg.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}));"
    estimated = estimate_of(16, 26)
    shown = opened(tmp_path, estimated, script=f"{{ const svg = find('#memory svg'); {right * 10} }}")
    assert shown.tips[:4] == ["rank 9, host 1", "all", size(estimated.total_memory_R[9]), "tables"]
    assert len(shown.tips) == 1 + 2 * (1 + len(MEMORY))


def test_names_are_text(tmp_path: Path) -> None:
    shown = opened(tmp_path, estimate_of(8, 3, names=(HOSTILE,)))
    assert HOSTILE in shown.tables and shown.images == 0


def test_offloaded_tables_have_a_picture_of_host_memory(tmp_path: Path) -> None:
    estimated = replace(estimate_of(8, 3), host_R=np.full(8, 1e9))
    assert opened(tmp_path, estimated).ranks["host"] == list(range(8))


def test_a_screenshot_is_not_empty(tmp_path: Path) -> None:
    file, picture = tmp_path / "plan.html", tmp_path / "plan.png"
    file.write_text(page(estimate_of(1024, 1000)), encoding="utf-8")
    chromium(tmp_path, f"--screenshot={picture}", "--window-size=1400,2400", file.as_uri())
    content = picture.read_bytes()
    assert struct.unpack(">II", content[16:24]) == (1400, 2400)
    # A page of one colour is some 10 kB.
    assert len(content) > 100_000 and re.match(rb"\x89PNG", content)
