"""Builds and loads the C++ operators of gr.ops: one shared library, compiled once per machine with the user's g++.

The library lies in the user's cache directory. Its name is a hash of the sources, the flags, the torch version, the
compiler and the CPU, so a change of any of them builds a new library, and several versions live side by side. It is
built for this CPU, within the instruction set that torch keeps to: ATEN_CPU_CAPABILITY=avx2 lowers both.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from gr.errors import InstallError
from gr.logging import get_logger
from gr.ops import fakes

_logger = get_logger(__name__)
_SOURCE_ROOT = Path(__file__).parent
_TORCH_ROOT = Path(torch.__file__).parent
_COMPILERS = ("g++", "clang++")
_WRITABLE_BY_OTHERS = 0o022
# It takes half a minute of a CPU; on a machine that many share that was more than five minutes of the clock.
_BUILD_TIMEOUT_S = 1800

# These are the parts of -ffast-math that vectorise sums. Linking with all of it makes GCC < 13 flush denormals in the
# whole process, and its finite-math part would hide NaN.
_COMPILE_FLAGS = (
    *("-std=c++20", "-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp", "-fPIC", "-fno-strict-aliasing"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math"),
    f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
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
    compiler = _find_compiler()
    try:
        path = _cache_directory() / f"ops-{_fingerprint(compiler)}.so"
        with _locked(path.with_suffix(".lock")):
            if not path.exists():
                _build(compiler, path)
        _require_own(path)
        if path.stat().st_mode & _WRITABLE_BY_OTHERS:
            raise InstallError(f"{path} can be written by other users, so it is not loaded. Remove it.")
    except OSError as error:
        raise InstallError(f"the C++ operators cannot be stored: {error}") from error
    return path


def fingerprint() -> str:
    """The fingerprint of the operators as they are built on this machine; raises InstallError without a compiler."""
    return _fingerprint(_find_compiler())


def _find_compiler() -> str:
    for name in _COMPILERS:
        path = shutil.which(name)
        if path is not None:
            return path
    raise InstallError(f"no C++ compiler: none of {', '.join(_COMPILERS)} is on the PATH. Install g++.")


def _cache_directory() -> Path:
    """The user's cache directory by the XDG convention, or a private temporary one if the home cannot be written."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = root / "gr"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        directory = Path(tempfile.gettempdir()) / f"gr-cache-{os.getuid()}"
        directory.mkdir(mode=0o700, exist_ok=True)
    _require_own(directory)
    if directory.stat().st_mode & _WRITABLE_BY_OTHERS:
        directory.chmod(0o700)  # a library that others have put there meanwhile is theirs, and so refused
    return directory


def _require_own(path: Path) -> None:
    """Raises InstallError unless `path` is this user's, root's too: code of other users is not loaded."""
    if path.stat().st_uid != os.getuid():
        raise InstallError(f"{path} belongs to another user, so code in it is not loaded. Set XDG_CACHE_HOME.")


def _sources() -> list[Path]:
    return sorted(_SOURCE_ROOT.rglob("*.cpp"))


def _compile_flags() -> tuple[str, ...]:
    return (*_COMPILE_FLAGS, *_FORBIDDING_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ()))


def _fingerprint(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256(repr((compiler, version, _compile_flags(), _LINK_FLAGS, torch.__version__)).encode())
    digest.update(_cpu_description().encode())
    for source in [*_sources(), *sorted(_SOURCE_ROOT.rglob("*.h"))]:
        digest.update(str(source.relative_to(_SOURCE_ROOT)).encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _cpu_description() -> str:
    """The CPU features that -march=native depends on, since machines that differ may share a home directory."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    relevant = ("model name", "model\t", "flags", "Features", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(relevant)}))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a file lock: one of several processes builds, the others wait. The lock ends with the process."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(compiler: str, library: Path) -> None:
    _logger.info("building the C++ operators of gr with %s, half a minute of a CPU, once for this machine", compiler)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=library.parent) as directory:
        # One translation unit of all sources: reading torch's headers takes 5 of the 7 seconds of a source by itself.
        unit, draft = Path(directory, "ops.cpp"), Path(directory, "ops.so")
        unit.write_text("".join(f'#include "{source}"\n' for source in _sources()))
        include = ["-isystem", str(_TORCH_ROOT / "include")]
        _run([compiler, *_compile_flags(), *include, str(unit), *_LINK_FLAGS, "-o", str(draft)])
        draft.chmod(0o755)  # whatever the umask
        draft.replace(library)
    _logger.info("built %s in %.0f seconds", library, time.perf_counter() - started)


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_BUILD_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise InstallError(f"building the C++ operators took more than {_BUILD_TIMEOUT_S} seconds") from error
    if done.returncode:
        raise InstallError(f"building the C++ operators failed: {' '.join(command)}\n{done.stdout[-2000:]}")


def _check_runs() -> None:
    """Makes one tiny call. torch's brgemm is absent from some builds, refuses some CPUs, and fails only when called."""
    x = torch.zeros(1, 1, 16)
    try:
        torch.ops.gr.hstu_attention(x, x, x, torch.tensor([0, 1]), torch.ones(1), None, None, None, None)
    except RuntimeError as error:
        raise InstallError(f"the C++ operators do not run on this machine: {error}") from error
