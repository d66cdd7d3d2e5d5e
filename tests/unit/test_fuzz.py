"""A dozen damaged inputs for each target of benchmarks.fuzz; the report of many more is in docs/benchmarks."""

from pathlib import Path

import pytest

from benchmarks import fuzz

fuzz.load_targets()


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_damaged_input_is_an_error_or_changes_nothing(name: str, tmp_path: Path) -> None:
    outcomes = fuzz.outcomes(name, 0, range(12), tmp_path / name)
    bad = [f"{number}: {outcome}" for number, outcome in enumerate(outcomes) if outcome.kind not in fuzz.GOOD]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    ("code", "shown", "kind"),
    [
        (0, "", fuzz.EQUAL),
        (2, "a warning\nerror: x: is wrong; correct it\n", fuzz.ERROR),
        (2, "error: x: two faults\n  one\n  another\n", fuzz.ERROR),
        (2, "error: x: is\nwrong\n", fuzz.UNCLEAR),
        (2, "error: \x1b]0;x\x07\n", fuzz.UNCLEAR),
        (2, "", fuzz.UNCLEAR),
        (1, "error: x: may pass\n", fuzz.UNCLEAR),
    ],
)
def test_outcomes(code: int, shown: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> int:
        print(shown, end="")
        return code

    monkeypatch.setitem(fuzz.TARGETS, "x", lambda random, folder: fuzz.Trial("", run, lambda: None))
    assert fuzz.attempt("x", 0, 0, tmp_path).kind == kind


def test_faults_of_a_process_are_outcomes(tmp_path: Path) -> None:
    found = fuzz.outcomes("faulty", 0, range(4), tmp_path / "x", ["tests.support.faulty_target"])
    assert [each.kind for each in found] == [fuzz.TRACEBACK, fuzz.TRACEBACK, fuzz.HANG, fuzz.OTHER_DATA]
