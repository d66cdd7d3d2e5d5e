"""What docker/Dockerfile owes to gr and to the manifests. docker/build.sh builds the CPU image, weekly."""

import re

import pytest

from tests.support import ROOT

RUNTIME = (ROOT / "docker/Dockerfile").read_text().partition(" AS runtime\n")[2]


def test_the_cuda_image_has_what_triton_builds_with():
    (packages,) = re.findall(r"\(Debian: ([^)]+)\)", (ROOT / "gr/ops/triton.py").read_text())
    assert f'if [ "${{KIND}}" = cuda ]; then set -- {packages}; fi' in RUNTIME
    assert RUNTIME.index("ARG KIND") < RUNTIME.index("${KIND}"), "an argument is its stage's own"


def test_runs_in_the_image_know_their_commit():
    assert RUNTIME.index("ARG GR_COMMIT") < RUNTIME.index("GR_COMMIT=${GR_COMMIT}")


def test_manifests_know_the_image():
    pytest.importorskip("torchx", reason="needs torchx: the extra launch")
    from launch import render

    ((group, user),) = re.findall(r"groupadd --gid (\d+) gr && useradd .*--uid (\d+) --gid gr gr", RUNTIME)
    (folder,) = re.findall(r"^WORKDIR (\S+)$", RUNTIME, flags=re.M)
    assert (int(group), int(user), folder) == (render.GROUP, render.USER, render.WORKSPACE)
    assert re.findall(r"^USER (\S+)$", RUNTIME, flags=re.M) == [user], "a number, for runAsNonRoot"
