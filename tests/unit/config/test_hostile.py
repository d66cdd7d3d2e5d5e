"""Files and overrides that nobody writes in good faith: an answer in seconds, in one line, without a traceback."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gr.config import load_config
from gr.errors import ConfigError, TransientError

BASE = "run_dir: r\ndata: {path: d}\ntrainer: {steps: 5}\n"
Fault = Callable[..., str]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)
    return tmp_path


@pytest.fixture
def fault() -> Fault:
    def run(path: str, *overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load_config(path, overrides)
        return str(caught.value)

    return run


def test_a_file_that_is_named_many_times_is_read_once() -> None:
    """Thirty files that each name the next one twice: 2^30 paths lead to the last."""
    for number in range(30):
        Path(f"{number}.yaml").write_text(f"base: [{number + 1}.yaml, {number + 1}.yaml]\nseed: {number}")
    Path("30.yaml").write_text(BASE)
    begun = time.monotonic()
    assert load_config("0.yaml").seed == 0
    assert time.monotonic() - begun < 10


def test_a_long_chain_of_bases(fault: Fault) -> None:
    for number in range(60):
        Path(f"{number}.yaml").write_text(f"base: {number + 1}.yaml")
    assert fault("0.yaml") == "50.yaml:1: base: more than 50 files above one another; name fewer, in one list"


def test_very_many_bases(fault: Fault) -> None:
    for number in range(510):
        Path(f"{number}.yaml").write_text(BASE)
    Path("all.yaml").write_text(f"base: [{', '.join(f'{number}.yaml' for number in range(510))}]")
    assert "all.yaml:1: base: more than 500 files; name fewer" in fault("all.yaml")


def test_many_faults_are_counted_and_the_first_shown(fault: Fault) -> None:
    Path("many.yaml").write_text(BASE + "".join(f"k{number}: 1\n" for number in range(300)))
    first, *lines = fault("many.yaml").splitlines()
    assert first == "300 faults in the configuration many.yaml"
    assert len(lines) == 21 and "k19: unknown key" in lines[19] and lines[20] == "  and 280 faults more"


def test_a_text_of_many_megabytes_is_not_parsed(fault: Fault) -> None:
    Path("big.yaml").write_text(BASE + f"x: [{'1, ' * 7_000_000}1]")
    message = "longer than 1,000,000 letters; a long list of tables is JSON or Parquet"
    assert fault("big.yaml") == f"big.yaml:1: {message}"
    assert fault("base.yaml", f"run_dir={'a' * 1_000_001}").endswith(f": {message}")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (r"a\0b", r"'a\x00b' is no name of a file"),
        ("a" * 5000, f"'{'a' * 56}... cannot be read: File name too long"),
        ("a" * 5000 + "/b", f"'{'a' * 56}... cannot be read: File name too long"),
        ("pipe", "no such file: pipe"),
        (".", "no such file: ."),
        ("", "no such file: ."),
    ],
)
def test_names_of_bases_that_are_none(fault: Fault, name: str, problem: str) -> None:
    os.mkfifo("pipe")  # whose reader would wait for ever
    Path("a.yaml").write_text(f'base: "{name}"')
    assert fault("a.yaml") == f"a.yaml:1: base: {problem}"


@pytest.mark.parametrize(
    ("name", "problem"),
    [("a\0b", r"a\x00b: is no name of a file"), ("a" * 300 + "/b", "cannot be read: File name too long")],
)
def test_names_of_configurations_that_are_none(fault: Fault, name: str, problem: str) -> None:
    assert fault(name).endswith(problem)


def test_a_disk_that_gives_an_error_may_pass() -> None:
    with pytest.raises(TransientError, match=r"^/proc/self/mem: cannot be read: Input/output error$"):
        load_config("/proc/self/mem")


def test_an_override_of_very_many_dots(fault: Fault) -> None:
    assert fault("base.yaml", ".".join("a" * 900) + "=1").endswith("...': expected a.b.c=value")


def test_the_file_of_the_nearest_name_is_named(fault: Fault) -> None:
    assert fault("bse.yaml") == "bse.yaml: no such file; did you mean base.yaml?"
    assert fault("nowhere/base.yaml") == "nowhere/base.yaml: no such file"


@pytest.mark.parametrize("key", ["run_dir", "data.path", "evaluation.path", "checkpoint.load_from", "planner.plan"])
def test_paths_are_taken_as_they_are_or_refused(fault: Fault, key: str) -> None:
    assert f"{key}: ~ is not filled in here" in fault("base.yaml", f"{key}=~/x")
    assert f"{key}: empty; . is the working folder" in fault("base.yaml", f"{key}=''")
    assert rf"{key}: 'a\x00' is no path" in fault("base.yaml", rf'{key}="a\0"')


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("runs/x #2", "'runs/x'"),
        ("#2", "nothing (null)"),
        ("a\nb", "'a b'"),
        ("a ", "'a'"),
        ("--- a", "'a'"),
        ("&a b", "'b'"),
        ("{a: b} # c", "a section"),
    ],
)
def test_a_value_that_yaml_would_cut_is_refused(fault: Fault, value: str, read: str) -> None:
    assert f"YAML reads {read} of it: put the text in quotes of its own" in fault("base.yaml", f"run_dir={value}")
    assert load_config("base.yaml", [f"run_dir={json.dumps(value)}"]).run_dir == value


def test_a_value_in_quotes_is_whole() -> None:
    for written in ("'runs/x #2'", '"runs/x #2"', " 'runs/x #2' "):
        assert load_config("base.yaml", [f"run_dir={written}"]).run_dir == "runs/x #2"
    assert load_config("base.yaml", ["seed= 3"]).seed == 3
    assert load_config("base.yaml", ['run_dir="\\ud83d\\ude00"']).run_dir == "\U0001f600"  # as JSON writes it


def test_an_inventory_is_for_the_planner(fault: Fault) -> None:
    Path("i.yaml").write_text("tables: [{name: a, rows: 9, dim: 16}]\nrank_batch_size: 4")
    assert fault("i.yaml") == "i.yaml: an inventory, which names no data and no training: use gr plan i.yaml"


def test_names_that_forge_lines(fault: Fault) -> None:
    assert fault("x\nerror: fake").startswith(r"x\nerror: fake: no such file")
    Path("a\nb.yaml").write_text(BASE + "sed: 1\n")
    assert fault("a\nb.yaml").startswith(r"a\nb.yaml:4: sed: unknown key; did you mean 'seed'?")


@pytest.mark.parametrize("override", ["data.stream.window=3", "trainer.profiler.step=3"])
def test_an_unknown_key_of_a_section_that_may_be_left_out(fault: Fault, override: str) -> None:
    assert f"{override.partition('=')[0]}: unknown key; did you mean" in fault("ranking/streaming-hstu", override)
