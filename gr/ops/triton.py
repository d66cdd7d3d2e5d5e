"""The check that Triton can run on this machine. The kernels themselves stand beside their operators."""

import importlib.util
import os
import subprocess

import torch

from gr.errors import InstallError


def load() -> None:
    """Starts Triton on this machine's GPU. TRITON_INTERPRET=1 in the environment runs kernels slowly on CPU tensors.

    Raises InstallError, one line with a remedy, if there is no GPU, or if Triton is not installed or does not start.
    """
    if importlib.util.find_spec("triton") is None:
        raise InstallError("triton is not installed: it comes with CUDA builds of torch, or pip install triton==3.7.1")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    if not torch.cuda.is_available():
        raise InstallError("backend 'triton' needs a CUDA device, or TRITON_INTERPRET=1 set before Python starts")
    from triton.runtime import driver

    try:
        driver.active  # noqa: B018 (builds a C module or takes it from Triton's cache, as the first kernel would)
    except (RuntimeError, AssertionError, ImportError, OSError, subprocess.SubprocessError) as error:
        raise InstallError(
            f"triton does not start on this machine ({' '.join(str(error).split())}): it builds a C module when it "
            "does, so install a C compiler and the headers of C and Python (Debian: gcc libc6-dev libpython3-dev), or "
            "take slower operators with trainer.kernels=torch"
        ) from error
