"""What it takes to serve: torch and fbgemm_gpu, and little beside them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = """
import json, sys
import gr.serving
from gr.serving.package.version import Version
version = Version.open(sys.argv[1])
print(json.dumps(sorted(sys.modules)))
"""


@pytest.mark.slow
def test_serving_needs_torch_and_fbgemm_only(click_package: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(click_package)], capture_output=True, text=True, check=True
    )
    heavy = {"torchrec", "torch._inductor.compile_fx", "gr.batch", "gr.config.load", "gr.embeddings", "gr.models.saved"}
    assert not heavy & set(json.loads(done.stdout))
