"""Builds and loads the C++ operators of gr.ops: one shared library, which gr.ops.compiler compiles with the user's g++.

It is built anew when a source, the flags, the torch version, the compiler or the CPU is another: for this CPU, within
the instruction set that torch keeps to. ATEN_CPU_CAPABILITY=avx2 lowers both.
"""

import functools
from pathlib import Path

import torch

from gr.errors import InstallError
from gr.ops import compiler, fakes

_SOURCE_ROOT = Path(__file__).parent
_TORCH_ROOT = Path(torch.__file__).parent

# These are the parts of -ffast-math that vectorise sums. Linking with all of it makes GCC < 13 flush denormals in the
# whole process, and its finite-math part would hide NaN.
_COMPILE_FLAGS = (
    *("-std=c++20", "-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp", "-fPIC", "-fno-strict-aliasing"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math"),
    *(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", "-isystem", str(_TORCH_ROOT / "include")),
)
# By what torch.backends.cpu.get_cpu_capability() says; there is nothing to forbid where torch uses all it knows.
_FORBIDDING_FLAGS = {"AVX2": ("-mno-avx512f",), "NO AVX": ("-mno-avx",)}
_LINK_FLAGS = ("-shared", "-fopenmp", f"-L{_TORCH_ROOT / 'lib'}", "-lc10", "-ltorch_cpu")

# The fingerprint of the library that a package brought into this process, which has one for all its life.
_brought: str | None = None


@functools.cache
def load() -> None:
    """Makes torch.ops.gr.* available, after building the library if this machine has none.

    Raises InstallError if there is no C++20 compiler, the build fails or the library does not work on this CPU, or a
    package of another release brought its own.
    """
    if _brought is not None:
        if _brought != fingerprint():
            raise InstallError("this process runs the C++ operators of a package of another release; start another")
        return
    _load(library())


def load_library(path: Path, name: str) -> None:
    """Makes torch.ops.gr.* available from a library that another process built. name: its fingerprint.

    The caller has checked what the file is and who can write it. Raises InstallError where this process has other
    operators, or the library does not work on this CPU.
    """
    global _brought
    current = fingerprint() if load.cache_info().currsize else _brought
    if current == name:
        return
    if current is not None:
        raise InstallError("this process runs other C++ operators already: open it in a process of its own")
    _load(path)
    _brought = name


def _load(path: Path) -> None:
    try:
        torch.ops.load_library(str(path))
        fakes.register()
    except OSError as error:
        raise InstallError(f"the C++ operators cannot be loaded: {error}") from error
    _check_runs()


def library() -> Path:
    """The library of this release in the user's cache directory, built if there is none.

    Raises InstallError where it cannot be built, or others can write it.
    """
    return compiler.library(f"ops-{fingerprint()}", _sources(), (*_compile_flags(), *_LINK_FLAGS))


def fingerprint() -> str:
    """The fingerprint of the operators as they are built on this machine; raises InstallError without a compiler."""
    files = [*_sources(), *sorted(_SOURCE_ROOT.rglob("*.h"))]
    return compiler.fingerprint(files, _compile_flags(), _LINK_FLAGS, torch.__version__)


def _sources() -> list[Path]:
    return sorted(_SOURCE_ROOT.rglob("*.cpp"))


def _compile_flags() -> tuple[str, ...]:
    return (*_COMPILE_FLAGS, *_FORBIDDING_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ()))


def _check_runs() -> None:
    """Makes one tiny call. torch's brgemm is absent from some builds, refuses some CPUs, and fails only when called."""
    x = torch.zeros(1, 1, 16)
    try:
        torch.ops.gr.hstu_attention(x, x, x, torch.tensor([0, 1]), torch.ones(1), None, None, None, None)
    except RuntimeError as error:
        raise InstallError(f"the C++ operators do not run on this machine: {error}") from error
