"""The choice of an implementation, and the build of the C++ operators."""

import importlib.util
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gr.errors import InstallError
from gr.ops import backend as backend_module
from gr.ops import compiler, cpp_extension
from gr.ops.backend import Backend, backend_for, force_backend

CPU = torch.device("cpu")


def test_forcing_is_scoped(backend: Backend) -> None:
    before = backend_for(CPU)
    with force_backend(backend):
        assert backend_for(CPU) == backend
        with force_backend("torch"):
            assert backend_for(CPU) == "torch"
        assert backend_for(CPU) == backend
    assert backend_for(CPU) == before


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="'native', 'torch' or 'triton', not 'cuda'"), force_backend("cuda"):  # type: ignore[arg-type]
        pass


def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InstallError, match="triton"), force_backend("triton"):
        pass


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A CUDA device as far as torch reports, with an empty cache of default backends."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend_module._default_backend.cache_clear()
    yield torch.device("cuda", 1)
    backend_module._default_backend.cache_clear()


def test_cuda_takes_triton_or_nothing(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InstallError, match="triton is not installed"):
        backend_for(gpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "triton.runtime", SimpleNamespace(driver=SimpleNamespace(active="started")))
    assert backend_for(gpu) == "triton"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("compiler", [None, "/nowhere/cc", "false"])
def test_a_gpu_without_a_compiler_is_one_line_and_no_slower_run(
    gpu: torch.device, compiler: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton looks for a compiler after its own cache and the driver's library; "false" acts as one without headers."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if compiler is None:
        monkeypatch.setenv("PATH", "/nowhere")
    else:
        monkeypatch.setenv("CC", compiler)
    for use in (lambda: backend_for(gpu), force_backend("triton").__enter__):
        with pytest.raises(InstallError, match=r"gcc libc6-dev libpython3-dev\).*trainer.kernels=torch") as refused:
            use()
        assert "\n" not in str(refused.value)
    with force_backend("torch"):
        assert backend_for(gpu) == "torch"


def test_fallback_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def no_compiler() -> None:
        raise InstallError("no C++ compiler (this test)")

    monkeypatch.setattr(cpp_extension, "load", no_compiler)
    # Where an earlier test has configured logging, pytest listens at this logger too, and would hear it twice.
    monkeypatch.setattr(logging.getLogger("gr"), "handlers", [])
    monkeypatch.setattr(logging.getLogger("gr"), "propagate", True)
    backend_module._default_backend.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="gr"):
            assert [backend_for(CPU), backend_for(CPU)] == ["torch", "torch"]
        assert sum("no C++ compiler (this test)" in record.message for record in caplog.records) == 1
        with pytest.raises(InstallError), force_backend("native"):
            pass
    finally:
        backend_module._default_backend.cache_clear()


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InstallError, match=r"g\+\+"):
        compiler.find_compiler()


def test_failed_build_shows_the_compiler_message(tmp_path: Path) -> None:
    source = tmp_path / "broken.cpp"
    source.write_text("#error this is broken\n")
    with pytest.raises(InstallError, match="this is broken"):
        compiler.build(tmp_path / "ops.so", [source], [])
    assert list(tmp_path.iterdir()) == [source]


def test_operators_keep_to_the_instruction_set_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ATEN_CPU_CAPABILITY lowers what torch uses, another library is built, without AVX-512 or without AVX."""
    names = set()
    for capability, flag in (("AVX512", None), ("AVX2", "-mno-avx512f"), ("NO AVX", "-mno-avx")):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert [each for each in cpp_extension._compile_flags() if each.startswith("-mno")] == [flag] * (
            flag is not None
        )
        names.add(cpp_extension.fingerprint())
    assert len(names) == 3


def test_a_cache_of_another_user_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by root either; one's own folder that others can write into is closed, and what they left in it refused."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = compiler.cache_directory()
    folder.chmod(0o777)
    assert compiler.cache_directory().stat().st_mode & 0o777 == 0o700
    library = folder / f"ops-{cpp_extension.fingerprint()}.so"
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("it was loaded"))
    library.touch()
    library.chmod(0o775)
    cpp_extension.load.cache_clear()
    with pytest.raises(InstallError, match="can be written by other users"):
        cpp_extension.load()
    if os.getuid() != 0:
        pytest.skip("only root can give files to another user")
    for path in (library, folder):
        path.chmod(0o755)
        os.chown(path, 65534, 65534)
        cpp_extension.load.cache_clear()
        with pytest.raises(InstallError, match="belongs to another user, so code in it is not loaded"):
            cpp_extension.load()


def _load_with_a_slow_build(cache: Path) -> None:
    def build(library: Path, sources: Sequence[Path], flags: Sequence[str]) -> None:
        with (cache / "builds").open("a") as file:
            file.write("1")
        time.sleep(0.3)
        library.write_bytes(b"")

    compiler.build = build
    cpp_extension._check_runs = lambda: None
    setattr(torch.ops, "load_library", lambda path: None)  # noqa: B010 (mypy: it is a method)
    cpp_extension.load.cache_clear()
    cpp_extension.load()


def test_four_processes_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four processes start together on an empty cache. They are forked, so that their patches stay in them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_load_with_a_slow_build, args=(tmp_path,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert (tmp_path / "builds").read_text() == "1"


def test_loading_leaves_denormals_alone() -> None:
    """-ffast-math in the link would flush denormals to zero in the whole process."""
    with force_backend(backend_for(CPU)):
        assert float(torch.tensor(1e-40) * 1.0) > 0
