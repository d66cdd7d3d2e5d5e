"""FBGEMM's HSTU attention (CUTLASS kernels, NVIDIA's): whether it is on this machine, and its function.

Optional, built by whoever wants it: no release on PyPI has it. Written from its source; not run on a GPU yet.
"""

import functools
import importlib
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from gr.errors import InstallError

# Of a build of fbgemm_gpu for the target hstu; of a build of its folder experimental/hstu alone.
_MODULES = ("fbgemm_gpu.experimental.hstu", "hstu")


@functools.cache
def load() -> Callable[..., Tensor]:
    """hstu_attn_varlen_func, taking what both published forms of it take: that of 1.3 to 1.8, and the later one.

    Raises InstallError, one line with what to do, where it is not installed or this machine cannot run it.
    """
    generation = _generation()
    function = _function(generation)
    if not hasattr(torch.ops.fbgemm, f"hstu_varlen_fwd_{generation}0"):
        problem = f"here were built without sm_{generation}0, or torch for a CUDA before 12.4"
        raise InstallError(f"the HSTU kernels of fbgemm {problem}: {_build(generation)}")
    if "scaling_seqlen" in inspect.signature(function).parameters:
        return functools.partial(function, seqused_q=None, seqused_k=None, scaling_seqlen=-1)
    return function


def _generation() -> int:
    found = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if found is None or found[0] not in (8, 9):
        here = "there is no CUDA device" if found is None else f"this one is sm_{found[0]}{found[1]}"
        raise InstallError(f"backend 'fbgemm' needs a GPU of sm_8x or sm_90, and {here}: use operators: auto")
    return found[0]


def _function(generation: int) -> Callable[..., Tensor]:
    reasons = []
    for name in _MODULES:
        try:
            return importlib.import_module(name).hstu_attn_varlen_func
        except (ImportError, AttributeError, OSError) as error:  # OSError: its library does not load
            reasons.append(f"{error}".partition("\n")[0])
    raise InstallError(f"the HSTU kernels of fbgemm are not installed ({'; '.join(reasons)}): {_build(generation)}")


def _build(generation: int) -> str:
    command = f"python setup.py install --build-target=hstu -DTORCH_CUDA_ARCH_LIST={generation}.0"
    return f"in fbgemm_gpu/ of FBGEMM's sources of your version, {command}; or use operators: triton"
