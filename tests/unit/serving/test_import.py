"""What it takes to serve: torch and fbgemm_gpu, and little beside them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = """
import json, resource, sys
def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
import torch, fbgemm_gpu
before = cpu()
import gr.serving
from gr.serving.version import Version
version = Version.open(sys.argv[1])
print(json.dumps([before, cpu(), sorted(sys.modules)]))
"""


@pytest.mark.slow
def test_serving_needs_torch_and_fbgemm_only(click_package: Path) -> None:
    """CPU seconds are bounded loosely, since a loaded machine doubles them; docs/serving.md has what was measured."""
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(click_package)], capture_output=True, text=True, check=True
    )
    base, whole, modules = json.loads(done.stdout)
    heavy = {"torchrec", "torch._inductor.compile_fx", "gr.batch", "gr.config.load", "gr.embeddings", "gr.models.saved"}
    assert not heavy & set(modules)
    assert whole < 1.5 * base
