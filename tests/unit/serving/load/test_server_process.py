"""A server in a process of its own: it answers, or says in one line why it does not start."""

import multiprocessing
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from gr.config.serving import ServeConfig
from gr.errors import ServingError
from gr.serving.load.server_process import MODEL, server
from gr.serving.load.targets import HttpTarget
from gr.serving.package.version import Version
from tests.support.toy_serving import ToyServable, ToyVersion

pytestmark = pytest.mark.slow


def test_it_answers_until_the_context_ends() -> None:
    with server(partial(ToyVersion, 1), ServeConfig(port=0, deadline_ms=60_000)) as address:
        target = HttpTarget(address, MODEL, [{"x": np.ones(3, np.float32)}], ToyServable.inputs)
        run = target.run(np.arange(1, 51) / 500)
        assert not run.failed and not run.refused and np.isfinite(run.latencies).all()
    assert not multiprocessing.active_children()


def test_what_cannot_be_opened_is_said(tmp_path: Path) -> None:
    with (
        pytest.raises(ServingError, match=r"^the server did not start: .*is no package"),
        server(partial(Version.open, tmp_path), ServeConfig(port=0)),
    ):
        pass
