"""The exact set of torch, torchrec, fbgemm and torchmetrics is written in four places, which agree."""

import re
import tomllib
from fnmatch import fnmatch

import pytest

from gr.cli.doctor import WANTED

from .source import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
STAND_IN = tomllib.loads((ROOT / "packaging/fbgemm-gpu-cpu/pyproject.toml").read_text())["project"]


def _pins(lines):
    matches = (re.fullmatch(r"([\w-]+)={2,3}(\S+)", line.strip()) for line in lines)
    return {match[1]: match[2] for match in matches if match}


def _constraints(kind):
    return _pins((ROOT / f"constraints/{kind}.txt").read_text().splitlines())


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_constraints_name_the_wanted_set(kind):
    pins = _constraints(kind)
    for name, wanted in WANTED.items():
        assert fnmatch(pins["fbgemm-gpu" if name == "fbgemm" else name].removesuffix("+cpu"), wanted)


def test_dependencies_name_the_wanted_set():
    pins = _pins(PROJECT["dependencies"])
    assert {name: pins[name] for name in WANTED if name != "fbgemm"} | {"fbgemm": WANTED["fbgemm"]} == WANTED


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_extras_name_the_constrained_fbgemm(kind):
    assert _pins(PROJECT["optional-dependencies"][kind])["fbgemm-gpu"] == _constraints(kind)["fbgemm-gpu"]


def test_stand_in_answers_for_fbgemm_gpu_with_the_cpu_build():
    assert (STAND_IN["name"], STAND_IN["version"]) == ("fbgemm-gpu", _constraints("cpu")["fbgemm-gpu"])
    assert _pins(STAND_IN["dependencies"]) == {"fbgemm-gpu-cpu": _constraints("cpu")["fbgemm-gpu-cpu"]}


@pytest.mark.xdist_group("pins")
def test_pytest_xdist_keeps_a_group_on_one_worker(request):
    """It knows groups by suffixes of names; under a pytest that drops those, each worker makes the fixtures again."""
    if getattr(request.config.option, "loadgroup", False):
        assert request.node.nodeid.endswith("@pins")
