"""`gr config` and the frame around every command: output, exit codes, errors without tracebacks."""

import json
from pathlib import Path

import click
import pytest
import yaml

import gr.cli
from gr import __version__
from gr.cli import main
from gr.cli.lazy import LazyGroup
from gr.config import load_config
from gr.errors import DataError

BASE = "run_dir: r\ndata: {path: d}\ntrainer: {steps: 5}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(BASE)
    Path("b.yaml").write_text(
        "base: a.yaml\nseed: 2\nmodel: {tower: {kind: sasrec}}\nplanner: {tables: {item: row_wise}}"
    )
    Path("bad.yaml").write_text("base: a.yaml\nsed: 2\n")


class TestConfig:
    def test_show_is_the_resolved_configuration(self, capsys):
        assert main(["config", "show", "b.yaml", "seed=9"]) == 0
        shown = capsys.readouterr().out
        assert yaml.safe_load(shown)["seed"] == 9
        Path("shown.yaml").write_text(shown)
        assert load_config("shown.yaml") == load_config("b.yaml", ["seed=9"])

    def test_check_good(self, capsys):
        assert main(["config", "check", "b.yaml"]) == 0
        assert capsys.readouterr().out == "ok: b.yaml\n"

    @pytest.mark.parametrize("command", ["check", "show"])
    def test_bad(self, command, capsys):
        assert main(["config", command, "bad.yaml", "trainer.steps=0"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: 2 faults in the configuration bad.yaml\n")
        assert "bad.yaml:2: sed: unknown key; did you mean 'seed'?" in err
        assert "Traceback" not in err

    def test_diff(self, capsys):
        assert main(["config", "diff", "a.yaml", "b.yaml"]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert "seed: 1 -> 2" in lines
        assert 'model.tower.kind: "hstu" -> "sasrec"' in lines
        assert "model.tower.qk_dim: 50 -> (absent)" in lines
        assert 'planner.tables.item: (absent) -> "row_wise"' in lines
        assert not any(line.startswith("run_dir") for line in lines)

    def test_diff_of_equals(self, capsys):
        assert main(["config", "diff", "a.yaml", "a.yaml"]) == 0
        assert capsys.readouterr().out == ""

    def test_diff_with_a_missing_file(self, capsys):
        assert main(["config", "diff", "a.yaml", "z.yaml"]) == 2
        assert capsys.readouterr().err == "error: z.yaml: no such file\n"

    def test_schema(self, capsys):
        assert main(["config", "schema"]) == 0
        definitions = json.loads(capsys.readouterr().out)["$defs"]
        assert all(definitions[name]["properties"]["trainer"] for name in ("RetrievalConfig", "ClickConfig"))


class TestFrame:
    def test_help_lists_every_command(self, capsys):
        assert main(["--help"]) == 0
        out = capsys.readouterr().out
        for name in ("train", "evaluate", "plan", "prepare", "baselines", "smoke", "config", "doctor"):
            assert f"\n  {name} " in out

    def test_no_command_is_help_and_code_2(self, capsys):
        assert main([]) == 2
        assert "Usage: gr" in capsys.readouterr().err

    def test_version(self, capsys):
        assert main(["--version"]) == 0
        assert __version__ in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["trian"], "error: no such command 'trian'; did you mean 'train'?"),
            (["xyz"], "error: no such command 'xyz'; commands: train, "),
            (["config", "show"], "error: Missing argument 'CONFIG'"),
            (["config", "check", "a.yaml", "--fast"], "error: No such option"),
            (
                ["config", "check", "a.yaml", "--trainer.steps=10"],
                "error: No such option '--trainer.steps'; a value of the configuration has no dashes: "
                "trainer.steps=VALUE\n",
            ),
            (["config", "schema", "--a.b"], "error: No such option '--a.b'.\n"),
        ],
    )
    def test_wrong_usage(self, arguments, said, capsys):
        assert main(arguments) == 2
        assert capsys.readouterr().err.startswith(said)

    @pytest.mark.parametrize(
        ("raised", "code", "said"),
        [
            (DataError("part-0.parquet: empty"), 2, "error: part-0.parquet: empty\n"),
            (KeyboardInterrupt(), 130, "interrupted\n"),
            (click.Abort(), 130, "interrupted\n"),
            (OSError(5, "Input/output error", "x\ny"), 1, "error: x\\ny: Input/output error; another try may help\n"),
            (
                FileExistsError(17, "File exists", "a/checkpoints"),
                2,
                "error: a/checkpoints: File exists; correct the path, then start the same command again\n",
            ),
            (
                MemoryError("Unable to allocate 7.28 TiB"),
                2,
                "error: needs more memory than there is: Unable to allocate 7.28 TiB; lower the sizes, or use a larger "
                "machine\n",
            ),
            (
                OSError(28, "No space left on device"),
                2,
                "error: the system: No space left on device; make room, then start the same command again\n",
            ),
            (
                OSError(30, "Read-only file system", "out/.lock"),
                2,
                "error: out/.lock: Read-only file system; name another path, or mend its owner or its mount\n",
            ),
        ],
    )
    def test_exit_codes(self, monkeypatch, capsys, raised, code, said):
        @click.command()
        def failing():
            raise raised

        monkeypatch.setattr(gr.cli, "command", failing)
        assert main([]) == code
        assert capsys.readouterr().err.lstrip("\n") == said

    @pytest.mark.parametrize("ours", [KeyError("x"), FileNotFoundError(2, "x", "x"), OSError("x"), OSError(17, "x")])
    def test_a_mistake_of_ours_is_not_hidden(self, monkeypatch, ours):
        @click.command()
        def failing():
            raise ours

        monkeypatch.setattr(gr.cli, "command", failing)
        with pytest.raises(type(ours)):
            main([])


class TestLazyGroup:
    def group(self, tmp_path, monkeypatch, code):
        (tmp_path / "lazy_probe.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(__import__("sys").modules, "lazy_probe", raising=False)
        return LazyGroup("top", lazy={"sub": ("lazy_probe:command", "A line.")})

    def test_imports_only_when_run(self, tmp_path, monkeypatch, capsys):
        group = self.group(tmp_path, monkeypatch, "raise RuntimeError('imported')")
        group.main(["--help"], standalone_mode=False)
        assert "A line." in capsys.readouterr().out
        with pytest.raises(RuntimeError, match="imported"):
            group.main(["sub"], standalone_mode=False)

    @pytest.mark.parametrize(
        "code", ["import torch_that_is_missing", "raise OSError('libtorch_cuda.so: cannot open shared object file')"]
    )
    def test_a_broken_installation_points_to_doctor(self, tmp_path, monkeypatch, capsys, code):
        monkeypatch.setattr(gr.cli, "command", self.group(tmp_path, monkeypatch, code))
        assert main(["sub"]) == 2
        assert "\nRun `gr doctor`" in capsys.readouterr().err

    @pytest.mark.parametrize("code", ["import gr.no_such_module", "open('no_such_file')"])
    def test_a_mistake_of_ours_is_not_hidden(self, tmp_path, monkeypatch, code):
        monkeypatch.setattr(gr.cli, "command", self.group(tmp_path, monkeypatch, code))
        with pytest.raises((ModuleNotFoundError, FileNotFoundError)):
            main(["sub"])
