"""`gr checkpoint show`, as a person and as a script read it."""

import json
from pathlib import Path

import pytest
import torch

from gr.checkpoint import CheckpointStore, ModelState
from gr.cli import main
from gr.dist import World
from tests.unit.checkpoint.test_streaming import OneTable


@pytest.fixture
def run(tmp_path: Path, alone: World) -> Path:
    dense = {"w": torch.nn.Parameter(torch.ones(1000))}
    optimizer = torch.optim.AdamW(dense.values())
    state = ModelState(dense, optimizer, OneTable(torch.float16), {"exp_avg": "element", "step": "scalar"})
    store = CheckpointStore(tmp_path / "checkpoints", state, "config: 1\n", alone, asynchronous=False)
    store.save({"step": 7, "data": {"epoch": 1, "position": 640}}, keep_last=1)
    return tmp_path


def test_what_a_person_reads(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["checkpoint", "show", str(run)]) == 0
    first, data, files, *rest = capsys.readouterr().out.splitlines()
    assert first == f"{run}/checkpoints/step-00000007: step 7, saved by 1 rank(s)"
    assert data == "data        epoch 1, position 640"
    assert files.startswith("files       5, ")
    assert rest == [
        "tables      1, 800 B",
        "  items: weight 50x8 float16 800 B",
        "dense       1 parameters, 4.00 kB, optimizer 4.00 kB",
    ]


def test_what_a_script_reads(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["checkpoint", "show", str(run), "--json"]) == 0
    contents = json.loads(capsys.readouterr().out)
    assert contents["step"] == 7 and contents["ranks"] == 1
    assert contents["tables"]["items"]["weight"] == {"shape": [50, 8], "dtype": "float16", "bytes": 800, "chunks": 2}
    assert contents["dense_optimizer"].keys() == {"w.exp_avg", "w.step"}
    assert contents["files"].keys() == {".metadata", "SHA256SUMS", "__0_0.distcp", "config.yaml", "progress.json"}


def test_no_checkpoint_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["checkpoint", "show", str(tmp_path)]) == 2
    assert "no checkpoint there" in capsys.readouterr().err
