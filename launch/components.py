"""TorchX components: `torchx run -s SCHEDULER launch/components.py:train --config ... [-- key=value ...]`.

TorchX executes this file by itself and reads each function's annotations and docstring to make its `--help`; so it
imports nothing of the project, and has no `from __future__ import annotations`, which TorchX cannot read.
"""

import os
import re
import sys

from torchx import specs

GPUS_OF_A_HOST = 8
# The CPUs and memory (MB) a GPU, or a CPU: a little under the hosts' own, since the system keeps some. Clouds differ;
# cpu= and memory= state their sizes.
_SHARES = {
    "cpu": (1, 4_000),
    "a100": (11, 125_000),
    "h100": (22, 230_000),
    "h200": (22, 230_000),
    "b200": (22, 230_000),
}


READ_AGAIN = ("$$", "$(", specs.macros.app_id)


class LaunchError(SystemExit):
    """A mistake in the command, shown as one line; nothing was submitted. The exit code is 2."""

    def __init__(self, message: str) -> None:
        # SystemExit with a message would exit with 1. Control characters, which others may have sent, become escapes.
        shown = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in message)
        sys.stderr.write(f"error: {shown}\n")
        super().__init__(2)


def host(name: str) -> specs.Resource:
    """NAME or NAMExCOUNT: h100x8 has 8 GPUs with their CPUs and memory, cpux4 4 CPUs. NAME alone is NAMEx8.

    After it, with commas: cpu=COUNT and memory=GB of the node in place of those, VENDOR/DEVICE=COUNT for more devices.
    """
    kind_and_count, *more = name.split(",")
    match = re.fullmatch(r"([a-z0-9]+?)(?:x([1-9]\d*))?", kind_and_count)
    if match is None or match[1] not in _SHARES:
        raise LaunchError(
            f"--resource={name} is not known: give NAME or NAMExCOUNT with NAME one of {', '.join(_SHARES)}"
        )
    sizes: dict[str, int] = {}
    for item in more:
        key, _, value = item.rpartition("=")
        if not (key in ("cpu", "memory") or "/" in key) or key in sizes or not re.fullmatch(r"[1-9]\d*", value):
            raise LaunchError(
                f"--resource={name}: {item}: after the name go cpu=COUNT, memory=GB and VENDOR/DEVICE=COUNT, each once"
            )
        sizes[key] = int(value)
    kind, count = match[1], int(match[2] or GPUS_OF_A_HOST)
    gpu = 0 if kind == "cpu" else count
    if gpu > GPUS_OF_A_HOST:
        raise LaunchError(
            f"--resource={name}: a host has {GPUS_OF_A_HOST} GPUs; use {kind}x{GPUS_OF_A_HOST} and more nodes"
        )
    cpus, memory = _SHARES[kind]
    cpus, memory = sizes.pop("cpu", cpus * count), sizes.pop("memory", 0) * 1_000 or memory * count
    return specs.Resource(cpu=cpus, gpu=gpu, memMB=memory, devices=sizes)


def ranks(nproc: int, resource: str) -> int:
    """The ranks of a node: `nproc`, or for 0 one a GPU, and one on a CPU host."""
    offered = host(resource)
    limit, unit = (offered.gpu, "GPUs") if offered.gpu else (offered.cpu, "CPUs")
    if not 0 <= nproc <= limit:
        raise LaunchError(
            f"--nproc={nproc} ranks, but --resource={resource} offers {limit} {unit} a node: use --nproc={limit} and "
            "more nodes, or a larger resource"
        )
    return nproc or offered.gpu or 1


def nodes(nnodes: str) -> tuple[int, int]:
    """N or MIN:MAX as the minimum and the maximum."""
    match = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*))?", nnodes)
    min_nodes, max_nodes = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if min_nodes > max_nodes:
        raise LaunchError(f"--nnodes={nnodes}: give N, or MIN:MAX with 1 <= MIN <= MAX")
    return min_nodes, max_nodes


def device(resource: str) -> list[str]:
    """The first override on GPU hosts, so that a rank without a GPU fails instead of training on CPU at a GPU's price.

    A device= of the user comes later, and wins.
    """
    return ["device=cuda"] if host(resource).gpu else []


def _role(name: str, module: list[str], typed: list[str], resource: str, image: str) -> specs.Role:
    """module: what `python -m` runs, with its own options. typed: the words after it, which are the user's."""
    return specs.Role(
        name=name,
        image=one_line("image", image) or os.getcwd(),
        entrypoint="python",
        args=["-m", *module, *map(_as_typed, typed)],
        resource=host(resource),
    )


def _as_typed(word: str) -> str:
    """`word` so that it arrives as it is: TorchX fills in `${img_root}` and its like in words, and makes `$` of `$$`.

    Raises LaunchError for what the scheduler behind it, which is not known here, may read once more: Kubernetes does so
    with $$ and $(NAME), TorchX's Slurm scripts with ${app_id}.
    """
    if read_again := next((each for each in READ_AGAIN if each in word), None):
        raise LaunchError(f"{word!r}: {read_again} would not arrive as it is under every scheduler; write another name")
    return word.replace("$", "$$")


def one_line(option: str, text: str) -> str:
    """`text`, which goes into a manifest or a script. Raises LaunchError for control characters and line breaks."""
    if not text.isprintable():
        raise LaunchError(f"--{option}={text}: line breaks and control characters have no place in it")
    return text


def _agents(nnodes: str, nproc: int, retries: int) -> list[str]:
    return [
        "launch.node",
        f"--nnodes={nnodes}",
        f"--nproc={nproc}",
        f"--rendezvous=env:{specs.macros.rank0_env}",
        f"--id={specs.macros.app_id}",
        f"--restarts={retries}",
    ]


def train(
    *overrides: str,
    config: str,
    nnodes: str = "1",
    nproc: int = 0,
    resource: str = "cpu",
    retries: int = 3,
    image: str = "",
    mounts: str = "",
) -> specs.AppDef:
    """Train an experiment, on one node or many; resumes by itself where its run_dir has a checkpoint.

    Args:
        overrides: values of the configuration, after --, for example `-- trainer.steps=100 run_dir=runs/a`
        config: the experiment, a path that every node can read, relative to the workspace
        nnodes: nodes, N or MIN:MAX (elastic, where the scheduler can)
        nproc: ranks of a node; 0 means one a GPU, or one on a CPU host
        resource: what a node offers: cpu, a100, h100, h200, b200, each with a count, for example h100x8 or cpux4;
            its CPUs and GB of memory where the usual ones do not fit: h100x8,cpu=96,memory=900
        retries: restarts of the ranks by torchrun, and of the job by the scheduler, after a crash
        image: container image, where the scheduler runs containers; it has to hold gr and launch/
        mounts: for containers, as TorchX writes them: type=bind,src=/data,dst=/data
    """
    min_nodes, max_nodes = nodes(nnodes)
    if retries < 0:
        raise LaunchError(f"--retries={retries}: give 0 or more")
    arguments = ["train", config, *device(resource), *overrides]
    role = _role("train", _agents(nnodes, ranks(nproc, resource), retries), arguments, resource, image)
    role.num_replicas, role.min_replicas = max_nodes, min_nodes
    role.max_retries, role.retry_policy = retries, specs.RetryPolicy.APPLICATION
    try:
        role.mounts = specs.parse_mounts(one_line("mounts", mounts).split(",")) if mounts else []
    except (KeyError, ValueError) as error:
        raise LaunchError(f"--mounts={mounts}: give type=bind,src=/data,dst=/data ({error.args[0]})") from None
    return specs.AppDef(name="gr-train", roles=[role])


def evaluate(
    *overrides: str,
    checkpoint: str,
    split: str = "test",
    nnodes: str = "1",
    nproc: int = 0,
    resource: str = "cpu",
    image: str = "",
) -> specs.AppDef:
    """Evaluate a checkpoint, on as many ranks as it needs to fit.

    Args:
        overrides: values of the saved configuration to change, after --
        checkpoint: run folder (its best, or else its latest checkpoint) or one checkpoint's folder
        split: validation or test
        nnodes: nodes
        nproc: ranks of a node; 0 means one a GPU, or one on a CPU host
        resource: what a node offers, for example h100x8 or cpux4
        image: container image, where the scheduler runs containers
    """
    arguments = ["evaluate", "--checkpoint", checkpoint, "--split", split, *device(resource), *overrides]
    role = _role("evaluate", _agents(nnodes, ranks(nproc, resource), 0), arguments, resource, image)
    role.num_replicas = nodes(nnodes)[1]
    return specs.AppDef(name="gr-evaluate", roles=[role])


def plan(*overrides: str, config: str, topology: str, resource: str = "cpu", image: str = "") -> specs.AppDef:
    """Plan where tables go on a machine this one need not be; no GPU, one process.

    Args:
        overrides: values of the configuration, after --
        config: an experiment, an inventory (configs/scale) or a list of tables
        topology: the machine and its ranks, for example h100x64, or a file of `gr calibrate`
        resource: what the planning itself runs on
        image: container image, where the scheduler runs containers
    """
    role = _role("plan", ["gr", "plan"], [config, f"--topology={topology}", *overrides], resource, image)
    return specs.AppDef(name="gr-plan", roles=[role])


def prepare(*arguments: str, resource: str = "cpu", image: str = "") -> specs.AppDef:
    """Turn raw data into a data folder, as `gr prepare` does.

    Args:
        arguments: those of `gr prepare`, after --, for example `-- synthetic --out data/stream`
        resource: what it runs on
        image: container image, where the scheduler runs containers
    """
    return specs.AppDef(name="gr-prepare", roles=[_role("prepare", ["gr", "prepare"], [*arguments], resource, image)])


def smoke(*arguments: str, resource: str = "cpux2", image: str = "") -> specs.AppDef:
    """Prepare, plan, train on 2 ranks, resume on 1, compare: a minute on two cores.

    Args:
        arguments: those of `gr smoke`, after --
        resource: what it runs on
        image: container image, where the scheduler runs containers
    """
    return specs.AppDef(name="gr-smoke", roles=[_role("smoke", ["gr", "smoke"], [*arguments], resource, image)])
