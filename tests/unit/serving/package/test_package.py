"""Packages that changed, that are not for this machine, or that somebody else may write: each is refused by name."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gr.errors import ServingError
from gr.files import sha256_of
from gr.serving.package.layout import CURRENT, MANIFEST, SOURCES, TENSORS, WEIGHTS, Current, dumped, read_current
from gr.serving.package.version import Version
from gr.serving.package.weights import ALIGNMENT, map_tensors, write_tensors

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def package(click_package: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(click_package, tmp_path / "package"))


def refusal(package: Path) -> str:
    with pytest.raises(ServingError) as error:
        Version.open(package)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


def rewrite(package: Path, change: Change) -> None:
    """Changes the manifest, and current.json so that it names the changed one: what a hostile writer would do."""
    current = read_current(package)
    path = package / WEIGHTS / current.weights / MANIFEST
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))
    record = Current(**{**current.model_dump(), "manifest": sha256_of(path)})
    (package / CURRENT).write_text(dumped(record))


def files_to_open(package: Path) -> list[Path]:
    """All that have content, but the one that publishing alone reads."""
    files = (path for path in package.rglob("*") if path.is_file() and path.stat().st_size)
    return sorted(path for path in files if path.name != SOURCES)


@pytest.mark.slow
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_is_refused_by_name(click_package: Path, tmp_path: Path, data: st.DataObject) -> None:
    package = tmp_path / "flipped"
    if not package.exists():
        shutil.copytree(click_package, package)
    files = files_to_open(package)
    path = data.draw(st.sampled_from(files))
    content = path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    flipped = bytearray(content)
    flipped[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(flipped)
    try:
        assert path.name in (message := refusal(package)) or path.name == CURRENT, message
    finally:
        path.write_bytes(content)


@pytest.mark.slow
def test_a_file_that_is_gone_or_cut_off(package: Path) -> None:
    for path in files_to_open(package):
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        assert path.name in refusal(package)
        path.unlink()
        assert path.name in refusal(package)
        path.write_bytes(content)
    assert Version.open(package).kind == "click"


def other_torch(fields: dict[str, Any]) -> None:
    fields["versions"]["torch"] = "1.0"


def other_fbgemm(fields: dict[str, Any]) -> None:
    fields["versions"]["fbgemm_gpu"] = "0.1"


def other_features(fields: dict[str, Any]) -> None:
    fields["cpu"]["features"] += ["avx9", "amx_hyper"]


def other_machine(fields: dict[str, Any]) -> None:
    fields["cpu"]["machine"] = "riscv"


def other_kind(fields: dict[str, Any]) -> None:
    fields["kind"] = "oracle"


def other_format(fields: dict[str, Any]) -> None:
    fields["format"] = 2


def leads_out(fields: dict[str, Any]) -> None:
    fields["files"] = {"../../../secret": "0" * 64}


def absolute(fields: dict[str, Any]) -> None:
    fields["code_files"] = {"/etc/passwd": "0" * 64}


def not_listed(fields: dict[str, Any]) -> None:
    fields["code_files"] = {}


def of_another_type(fields: dict[str, Any]) -> None:
    fields["passes"] = [1]


def unknown_tensor(fields: dict[str, Any]) -> None:
    fields["passes"]["score"]["tensors"]["tables.rows"] = "nothing"


def one_tensor_less(fields: dict[str, Any]) -> None:
    del fields["passes"]["score"]["tensors"]["dense.top.2.bias"]


def one_tensor_more(fields: dict[str, Any]) -> None:
    fields["passes"]["score"]["tensors"]["inlined"] = "score.dense.top.2.bias"


def many_outputs(fields: dict[str, Any]) -> None:
    fields["passes"]["score"]["outputs"] = 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (other_torch, "was made for torch 1.0, here is"),
        (other_fbgemm, "was made for fbgemm_gpu 0.1, here is"),
        (other_features, "was made for a CPU with avx9, amx_hyper, which this has not"),
        (other_machine, "was made for a CPU of riscv, this one is"),
        (other_kind, "is a model of kind oracle; this release serves"),
        (other_format, r"manifest.json: is not what gr wrote \(format"),
        (leads_out, r"manifest.json: is not what gr wrote \(files"),
        (absolute, r"manifest.json: is not what gr wrote \(code_files"),
        (not_listed, "no SHA-256 of score.pt2 is known"),
        (of_another_type, r"manifest.json: is not what gr wrote \(passes"),
        (unknown_tensor, "has no tensor nothing"),
        (one_tensor_less, "reads dense.top.2.bias, which the package does not have"),
        (one_tensor_more, "inlined is compiled into the code"),
        (many_outputs, "has no score/outputs/1"),
    ],
)
def test_manifests_that_are_refused(package: Path, change: Change, fault: str) -> None:
    rewrite(package, change)
    with pytest.raises(ServingError, match=fault):
        Version.open(package)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[" * 100_000,
        '{"format": 1}',
        " " * (1 << 17),
        '{"format": 1, "code": "../../../../../x", "weights": "w", "manifest": "", "previous": []}',
        '{"format": 1, "code": "0123456789abcdef", "weights": "../w", "manifest": "' + "0" * 64 + '", "previous": []}',
        '{"format": 1e400}',
        "\x00",
    ],
)
def test_current_that_is_refused(package: Path, text: str) -> None:
    (package / CURRENT).write_text(text)
    assert CURRENT in refusal(package)


def test_no_package(tmp_path: Path) -> None:
    assert refusal(tmp_path).endswith("writes one")


@pytest.mark.slow
def test_weights_of_another_model_do_not_match_the_golden_rows(package: Path) -> None:
    """Also where their digests are right: the last line of defence against a swap that keeps old values."""
    current = read_current(package)
    path = package / WEIGHTS / current.weights / TENSORS
    tensors = {name: tensor.clone() for name, tensor in map_tensors(path).items()}
    tensors["score.dense.top.2.bias"] += 0.01
    path.unlink()
    write_tensors(path, tensors)
    digest = sha256_of(path)
    rewrite(package, lambda fields: fields["files"].update({TENSORS: digest}))
    assert "pass score is 0.01 from its golden rows" in refusal(package) or "from its golden rows" in refusal(package)


@pytest.mark.slow
def test_what_others_can_write_is_not_run(package: Path) -> None:
    current = read_current(package)
    folder = package / WEIGHTS / current.weights
    for path in (package, folder, folder / TENSORS):
        mode = path.stat().st_mode
        path.chmod(mode | 0o020)
        assert f"{path}: others can write it" in refusal(package)
        path.chmod(mode)
    moved = folder.with_name("elsewhere")
    folder.rename(moved)
    folder.symlink_to(moved)
    assert "is a link" in refusal(package)


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_what_belongs_to_others_is_not_run(package: Path) -> None:
    os.chown(package, 12345, 12345)
    assert "belongs to another user (uid 12345)" in refusal(package)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_tensors_are_mapped_at_multiples_of_64_bytes(tmp_path: Path, count: int) -> None:
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int32, torch.int64)
    tensors = {f"{kind}.{size}": torch.arange(size).to(kind) for kind in kinds for size in range(count + 1)} | {
        "two dims": torch.randn(3, 7),
        "a view": torch.randn(4, 6).T,
    }
    write_tensors(tmp_path / "t", tensors)
    mapped = map_tensors(tmp_path / "t")
    assert mapped.keys() == tensors.keys()
    assert all(torch.equal(mapped[name], tensor) for name, tensor in tensors.items())
    assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in mapped.values() if tensor.numel())
    (tmp_path / "t").write_bytes(b"no tensors at all")
    with pytest.raises(ServingError, match="is no safetensors file"):
        map_tensors(tmp_path / "t")
