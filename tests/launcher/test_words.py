"""Overrides arrive as they were typed, through what each launcher renders; what would not is refused."""

import json
import shlex
import subprocess
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gr.config import load_config
from gr.errors import ConfigError
from launch.node import command as node_command
from launch.outcome import FAILED

specs = pytest.importorskip("torchx.specs", reason="needs torchx: the extra launch")
runner = pytest.importorskip("torchx.runner", reason="needs torchx: the extra launch")
from launch import components, render  # noqa: E402 - they need torchx

# Letters that a shell, YAML, TorchX, Kubernetes or a home folder gives another meaning, and all others of argv.
PIECES = ["$", "$$", "${app_id}", "${img_root}", "$(x)", "$HOME", "`x`", "'", '"', "\\", "\n", " #", " ", "~", "{", "}"]
PIECES += [*":,[&*!%@|>;=ay", "--", ": ", "\t", "ü", "漢", "\u2028"]
LETTERS = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
WORDS = st.lists(st.sampled_from(PIECES) | st.text(LETTERS, max_size=4), max_size=6).map("".join)
many = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def kubernetes_reads(word: str) -> str:
    """What a container gets of a word of its command, by third_party/forked/golang/expansion of Kubernetes.

    `$$` is `$`; `$(NAME)` of an unknown name stays.
    """
    read, at = "", 0
    while at < len(word):
        pair = word[at : at + 2]
        read += "$" if pair == "$$" else word[at]
        at += 2 if pair == "$$" else 1
    return read


def torchx_words(app, scheduler: str) -> list[str]:
    """The words of the first node's process."""
    with runner.get_runner() as torchx:
        request = torchx.dryrun(
            app, scheduler=scheduler, cfg={"queue": "q"} if scheduler == "kubernetes" else {}
        ).request
    if scheduler == "local_cwd":
        (node, *_) = next(iter(request.role_params.values()))
        return list(node.args)
    if scheduler == "kubernetes":
        pod = request.resource["spec"]["tasks"][0]["template"].spec.containers[0]
        return [kubernetes_reads(word) for word in pod.command]
    script = request.materialize()
    stub = 'srun() { python=; for each; do [ "$each" = : ] && break; [ "$each" = python ] && python=1; '
    stub += "[ $python ] && printf '%s\\0' \"$each\"; done; }; scontrol() { :; }; "
    shown = subprocess.run(["bash", "-c", stub + script], capture_output=True, env={"SLURM_JOB_ID": "7"}, check=True)
    return shown.stdout.decode().split("\0")[:-1]


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["local_cwd", "slurm", "kubernetes"])
@pytest.mark.filterwarnings("ignore::UserWarning")
@many
@given(value=WORDS)
@example(value="/x/a$b")
@example(value="${img_root}$HOME'\n")
def test_words_arrive_through_torchx(scheduler: str, value: str) -> None:
    word = f"run_dir={value}"
    try:
        app = components.train(word, config="c.yaml")
    except SystemExit:
        assert any(each in word for each in ("$$", "$(", "${app_id}"))
        return
    assert torchx_words(app, scheduler)[-3:] == ["train", "c.yaml", word]


@pytest.mark.parametrize("component", ["train", "evaluate", "plan", "prepare", "smoke"])
@pytest.mark.parametrize("word", ["a=$$", "a=$(x)", "a=x${app_id}"])
def test_what_would_be_rewritten_is_refused(component: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    required = {"train": {"config": "c"}, "evaluate": {"checkpoint": "c"}, "plan": {"config": "c", "topology": "cpux2"}}
    with pytest.raises(SystemExit) as end:
        getattr(components, component)(word, **required.get(component, {}))
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: '{word}': ")


@pytest.mark.parametrize("option", ["image", "mounts"])
def test_options_have_no_line_breaks(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        components.train(config="c.yaml", **{option: "a\nerror: fake\x1b"})
    error = capsys.readouterr().err
    assert error.startswith(rf"error: --{option}=a\nerror: fake\x1b: ") and error.count("\n") == 1


def rendered(kind: str, *arguments: str) -> dict:
    done = CliRunner().invoke(render.main, [kind, *arguments])
    assert done.exit_code == 0, done.output
    return yaml.safe_load(done.stdout)


@pytest.mark.parametrize("kind", ["jobset", "trainjob"])
@many
@given(value=WORDS)
@example(value="a$$b$(HOME)${app_id}")
def test_words_arrive_in_pods(kind: str, value: str) -> None:
    word = f"run_dir={value}"
    manifest = rendered(kind, "--config", "c.yaml", "--claim", "runs:/mnt", "--", word)
    if kind == "jobset":
        pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        command = pod["containers"][0]["command"]
    else:
        command = manifest["spec"]["trainer"]["command"]
    assert [kubernetes_reads(each) for each in command][-3:] == ["train", "c.yaml", word]


@many
@given(value=WORDS)
@example(value="runs/x #2")
@example(value="a\nb")
@example(value=" a")
@example(value="~/x")
@example(value="")
@example(value="--- a")
@example(value="a\u2028b")
def test_gr_takes_a_value_as_it_was_typed_or_refuses_it(tmp_path_factory: pytest.TempPathFactory, value: str) -> None:
    path = tmp_path_factory.getbasetemp() / "c.yaml"
    path.write_text("run_dir: r\ndata: {path: d}\ntrainer: {steps: 1}\n")
    try:
        taken = load_config(path, [f"run_dir={value}"]).run_dir
    except ConfigError:
        taken = None
    if value.strip()[:1] not in ("'", '"', "|", ">"):  # quotes of YAML's own
        assert taken in (value, None)
    if not value.startswith("~") and value:
        assert load_config(path, [f"run_dir={json.dumps(value)}"]).run_dir == value


def test_the_slurm_script_keeps_words() -> None:
    """launch/slurm/train.sbatch hands "$@" to srun, and its line for a node hands them on."""
    script = (Path(__file__).parents[2] / "launch/slurm/train.sbatch").read_text()
    assert 'train "$@" &' in script and 'exec python -m launch.node "$@"\'' in script
    words = ["a b", "$x", "'q'", "\n", "*"]
    shown = subprocess.run(["bash", "-c", 'printf "%s\\0" "$@"', "launch.node", *words], capture_output=True, text=True)
    assert shown.stdout.split("\0")[:-1] == words and shlex.split(shlex.join(words)) == words


@pytest.mark.parametrize("job_id", ["j 1/x", "../x", "a\nb", "", ".", "x" * 201, "ü"])
def test_an_id_that_is_no_name_of_a_file_is_refused(job_id: str) -> None:
    done = CliRunner().invoke(node_command, [f"--id={job_id}", "train", "c.yaml"])
    assert done.exit_code == FAILED and "--id=" in done.output and len(done.output.splitlines()) == 1
    assert not isinstance(done.exception, click.ClickException)


@pytest.mark.parametrize(
    ("option", "text"),
    [("--queue", "a\nb"), ("--queue", "a b"), ("--queue", "q" * 64), ("--image", "a\nb"), ("--image", "a b")],
)
def test_text_that_is_no_name_is_refused(option: str, text: str) -> None:
    done = CliRunner().invoke(render.main, ["jobset", "--config", "c.yaml", option, text])
    assert done.exit_code == FAILED and f"error: {option}=" in done.output


def test_what_kubectl_would_read_as_a_number_or_a_truth_is_quoted() -> None:
    for name in ("y", "n", "no", "on"):
        shown = CliRunner().invoke(render.main, ["jobset", "--config", "1e3", "--name", name]).stdout
        assert f"  name: '{name}'\n" in shown and "- '1e3'\n" in shown
