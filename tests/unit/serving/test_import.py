"""What it takes to serve: torch and fbgemm_gpu, little beside them, and no thread that may outlive Python."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = """
import json, os, sys
import gr.serving
from gr.serving.package.version import Version
version = Version.open(sys.argv[1])
tasks = [task for task in os.listdir("/proc/self/task") if int(task) != os.getpid()]
threads = [open(f"/proc/self/task/{task}/comm").read().strip() for task in tasks]
print(json.dumps([sorted(sys.modules), threads]))
"""


@pytest.mark.slow
def test_serving_needs_torch_and_fbgemm_only(click_package: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(click_package)], capture_output=True, text=True, check=True
    )
    modules, threads = json.loads(done.stdout)
    heavy = {"torchrec", "torch._inductor.compile_fx", "gr.batch", "gr.config.load", "gr.embeddings", "gr.models.saved"}
    assert not heavy & set(modules)
    # A worker of Arrow's that lets go of bytes of a Python that ends aborts the process.
    assert set(threads) <= {"jemalloc_bg_thd"}
