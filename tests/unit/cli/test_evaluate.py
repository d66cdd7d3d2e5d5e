"""`gr evaluate`: the numbers of training's own report, and wrong calls."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gr.cli import main

Refused = Callable[..., str]


def test_before_training(refused: Refused, config: str, run_dir: Path) -> None:
    expected = f"{run_dir}: no checkpoint there; expected a run folder or a step-XXXXXXXX folder in it"
    assert refused("evaluate", "--checkpoint", str(run_dir)) == expected
    (run_dir / "checkpoints").mkdir(parents=True)
    assert refused("evaluate", "--checkpoint", str(run_dir)) == expected


def test_wrong_calls(refused: Refused) -> None:
    for command in (["evaluate"], ["recommend", "--out", "x"], ["export-weights", "--out", "x.safetensors"]):
        assert refused(*command) == "which checkpoint? Name a run folder or a step-XXXXXXXX folder of one"
        assert refused(*command, "/none/x").startswith("/none/x: no checkpoint there")
    assert refused("export-weights", "--out", "x.safetensors", "a", "b=1").startswith("b=1: one checkpoint, and no")
    assert "'train' is not one of 'validation', 'test'" in refused("evaluate", "--checkpoint", "x", "--split", "train")


def test_after_training(config: str, run_dir: Path, refused: Refused, capfd: pytest.CaptureFixture[str]) -> None:
    """One test, since training takes longest: the report, an override, and checkpoints that are not whole."""
    assert main(["train", config]) == 0
    trained = capfd.readouterr().out
    report = json.loads((run_dir / "report.json").read_text())
    for *option, path in (
        ("--checkpoint", run_dir),
        ("--checkpoint", run_dir / "checkpoints"),
        ("--checkpoint", run_dir / "checkpoints" / "step-00000004"),
        (run_dir,),
    ):
        assert main(["evaluate", *option, str(path)]) == 0
        # The same table; training also says where its run folder is.
        assert trained.startswith(capfd.readouterr().out)
    assert f"{report['model']['hr@10']:.4f}" in trained

    assert main(["evaluate", "--checkpoint", str(run_dir), "--split", "validation", "evaluation.filter_seen=none"]) == 0
    other = capfd.readouterr().out
    assert "validation split, " in other and "seen items filtered: none" in other

    said = refused("evaluate", "--checkpoint", str(run_dir), "data.path=/none")
    assert said.startswith("/none: no such folder")
    checkpoint = run_dir / "checkpoints" / "step-00000004"
    (checkpoint / ".metadata").rename(run_dir / "metadata")
    said = refused("evaluate", "--checkpoint", str(run_dir))
    assert said.startswith(f"{checkpoint}/.metadata: cannot be read: No such file") and "restore that file" in said
    (run_dir / "metadata").rename(checkpoint / ".metadata")
    (checkpoint / "config.yaml").unlink()
    assert refused("evaluate", "--checkpoint", str(run_dir)) == f"{checkpoint}/config.yaml: no such file"


def test_a_checkpoint_of_another_shape(config: str, run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", config]) == 0
    capfd.readouterr()
    assert main(["evaluate", "--checkpoint", str(run_dir), "model.dim=12"]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ") and "of another model: model.dim is 8 there, 12 now" in err
    assert "Traceback" not in err
