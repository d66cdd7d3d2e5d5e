"""Codes of values and the order of events: C++ against the reference, and either through a whole log."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from gr.errors import InstallError
from gr.ops import compiler
from gr.prepare import event_rows
from gr.prepare.coding import native
from gr.prepare.coding.reference import ReferenceCodes, order_reference
from tests.support.own_log import TIMED, decoded, prepared, random_log

TEXTS = ["", "a", "a\0", "a\0b", "é", "12345678", "123456789", "12345678\0", "x" * 1000, None]


@pytest.fixture
def library() -> Any:
    if (library := native._library()) is None:
        pytest.skip("no C++ compiler here")
    return library


@pytest.mark.parametrize("kind", [pa.string(), pa.int64()])
def test_codes(library: Any, kind: pa.DataType) -> None:
    """Blocks that are slices with nulls, and more values than the table has room for at first."""
    random = np.random.default_rng(0)
    if kind == pa.string():
        listed = [TEXTS[i] if i < len(TEXTS) else f"user {i}" for i in random.integers(0, 9000, 20_000)]
    else:
        ends = [0, -1, 1, 2**63 - 1, -(2**63), None]
        listed = [ends[i] if i < len(ends) else int(i) << 32 for i in random.integers(0, 9000, 20_000)]
    reference, compiled = ReferenceCodes(kind), native.NativeCodes(library, kind)
    for first, stop in ((0, 0), (0, 7), (7, 8), (8, 137), (137, 20_000)):
        block = pa.array([None, *listed, "x" if kind == pa.string() else 5], type=kind)[1 + first : 1 + stop]
        np.testing.assert_array_equal(compiled.encode(block), reference.encode(block))
    assert compiled.values().to_pylist() == reference.values().to_pylist()
    assert len(reference.values()) > 4096


@pytest.mark.parametrize("time", ["none", "few", "many"])
def test_order(library: Any, time: str) -> None:
    random = np.random.default_rng(1)
    user_B = np.where(random.random(5000) < 0.4, 3, random.integers(0, 300, 5000)).astype(np.int32)
    time_B = None if time == "none" else random.integers(-3, 3 if time == "few" else 10**12, 5000)
    np.testing.assert_array_equal(native.order_of(user_B, time_B, 300), order_reference(user_B, time_B))


def test_a_log_in_parts_and_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks and parts, and the reference, give the folder that one part gives."""
    log = random_log()
    options = {**TIMED, "user": "user", "item": "item", "time": "when", "features": ("shop",), "rating": "watched"}
    expected = decoded(prepared(tmp_path / "whole", log, **options))
    monkeypatch.setattr(event_rows, "BLOCK", 100)
    monkeypatch.setattr(event_rows, "_PART", 30)
    assert decoded(prepared(tmp_path / "parts", log, **options)) == expected

    def none() -> str:
        raise InstallError("no C++ compiler (this test)")

    monkeypatch.setattr(compiler, "find_compiler", none)
    native._library.cache_clear()
    try:
        assert decoded(prepared(tmp_path / "plain", log, **options)) == expected
    finally:
        native._library.cache_clear()
