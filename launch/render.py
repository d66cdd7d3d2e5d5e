"""Kubernetes manifests of a training job, on stdout: python -m launch.render jobset --config C | kubectl apply -f -

jobset     a JobSet (jobset.x-k8s.io), one pod a node; --queue adds the label by which Kueue admits all pods or none
trainjob   a TrainJob of Kubeflow Trainer 2.2 or later, which makes a JobSet from a runtime of the cluster

Every pod runs launch.node, as under every launcher.
"""

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import click
import yaml

from launch.outcome import FAILED, STOPPED
from launch.rendezvous import PORTS

try:
    from launch.components import LaunchError, device, host, nodes, one_line, ranks
except ModuleNotFoundError as error:  # one table of hosts serves both, and stands where TorchX reads it
    click.echo(
        f"error: launch.render needs {error.name}: pip install 'torchx>=0.7', which is the extra launch", err=True
    )
    raise SystemExit(FAILED) from None

WORKSPACE, USER, GROUP = "/workspace", 10001, 10001  # as in docker/Dockerfile
OCCUPIED = (f"{WORKSPACE}/launch", "/opt/gr", "/dev/shm")  # no volume may hide them
# Ranks save within the first; the rest of the pod's grace period is for the agents to leave.
SAVE_SECONDS, LEAVE_SECONDS = 240, 60
JOIN_SECONDS = 1800  # pods of a job start as nodes and images arrive
PORT = PORTS[0]  # a pod has its ports to itself
LONGEST_NAME = 40  # a pod's name is longer, and has to stay a DNS label
# What the Pod Security Standard "restricted" asks of a container, beside what the pod states.
CONFINED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
# The names of queues are values of labels; those of runtimes and images are written likewise, with more letters.
LABEL_VALUE = re.compile(r"[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?", re.ASCII)
IMAGE = re.compile(r"[A-Za-z0-9][\w./:@-]*", re.ASCII)
MOUNT_PATH = re.compile(r"(/[\w-][\w.-]*)+/?")
OVERRIDE = re.compile(r"[A-Za-z_][^=]*=.*", re.DOTALL)


@dataclass(frozen=True)
class Job:
    """The settings that both kinds share. claims: PersistentVolumeClaim -> its mount path in pods."""

    name: str
    arguments: tuple[str, ...]
    nodes: int
    nproc: int
    resource: str
    image: str
    queue: str
    claims: dict[str, str]

    def command(self, rendezvous: str) -> list[str]:
        """The command of a pod."""
        options = {"nnodes": self.nodes, "nproc": self.nproc, "rendezvous": rendezvous, "id": self.name}
        options |= {"join-timeout": JOIN_SECONDS, "grace": SAVE_SECONDS}
        words = [f"--{name}={value}" for name, value in options.items()]
        # Kubernetes fills in $(NAME) in the words of a command, and makes $ of $$.
        typed = [word.replace("$", "$$") for word in self.arguments]
        return ["python", "-m", "launch.node", *words, "train", *typed]

    @property
    def metadata(self) -> dict[str, Any]:
        labels = {"labels": {"kueue.x-k8s.io/queue-name": self.queue}} if self.queue else {}
        return {"name": self.name, **labels}

    @property
    def limits(self) -> dict[str, Any]:
        offered = host(self.resource)
        gpus = {"nvidia.com/gpu": offered.gpu} if offered.gpu else {}
        return {"cpu": offered.cpu, "memory": f"{offered.memMB}M", **gpus, **offered.devices}

    @property
    def mounts(self) -> list[dict]:
        # NCCL and gloo want more shared memory than the 64 MB of a pod.
        return [
            {"name": "shm", "mountPath": "/dev/shm"},
            *({"name": n, "mountPath": p} for n, p in self.claims.items()),
        ]

    @property
    def pod(self) -> dict[str, Any]:
        volumes = [{"name": name, "persistentVolumeClaim": {"claimName": name}} for name in self.claims]
        # Half of the pod's memory, as Linux does with a machine's: what is in it counts as memory of the pod.
        shm = {"medium": "Memory", "sizeLimit": f"{host(self.resource).memMB // 2}M"}
        return {
            "terminationGracePeriodSeconds": SAVE_SECONDS + LEAVE_SECONDS,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": GROUP,
                # Root owns new volumes, and the user of the image is another.
                "fsGroup": GROUP,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "volumes": [{"name": "shm", "emptyDir": shm}, *volumes],
        }


def failure_policies(restarts: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The policies of the Job and of the JobSet: a permanent failure ends all, an eviction restarts all uncounted.

    A Job that its podFailurePolicy ends tells only that, and a message. An unknown message ends the JobSet, rather than
    restarting it for ever.
    """
    ends = {"containerName": "trainer", "operator": "In", "values": [FAILED, STOPPED]}
    disrupted = {"type": "DisruptionTarget", "status": "True"}
    job_rules = [{"action": "FailJob", "onExitCodes": ends}, {"action": "FailJob", "onPodConditions": [disrupted]}]
    evicted = [f"failed with exit code {STOPPED} ", "has condition DisruptionTarget "]
    set_rules: list[dict[str, Any]] = [
        {"name": "evicted", "action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureMessagePatterns": evicted},
        {"name": "failed_for_good", "action": "FailJobSet"},
    ]
    rules = [{**rule, "onJobFailureReasons": ["PodFailurePolicy"]} for rule in set_rules]
    return {"rules": job_rules}, {"maxRestarts": restarts, "rules": rules}


def jobset(job: Job, restarts: int) -> dict[str, Any]:
    """A JobSet of one indexed Job, a pod a node.

    A pod that fails restarts all, at most `restarts` times, unless the failure is permanent.
    """
    container = {
        "name": "trainer",
        "image": job.image,
        "workingDir": WORKSPACE,
        "command": job.command(f"{job.name}-node-0-0.{job.name}:{PORT}"),
        "ports": [{"name": "rendezvous", "containerPort": PORT}],
        "resources": {"limits": job.limits},
        "securityContext": CONFINED,
        "volumeMounts": job.mounts,
    }
    # Nothing in a pod talks to the cluster. A TrainJob cannot say so: its runtime does.
    pod = {"restartPolicy": "Never", "automountServiceAccountToken": False, **job.pod, "containers": [container]}
    job_policy, set_policy = failure_policies(restarts)
    indexed = {
        "parallelism": job.nodes,
        "completions": job.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": job_policy,
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": job.metadata,
        "spec": {
            "suspend": bool(job.queue),  # Kueue starts it once every pod has a place
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": set_policy,
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": indexed}}],
        },
    }


def trainjob(job: Job, runtime: str) -> dict[str, Any]:
    """A TrainJob. Its runtime decides on restarts, and the torch plugin names the first node in PET_MASTER_ADDR."""
    container = {"name": "node", "securityContext": CONFINED, "volumeMounts": job.mounts}
    pod = {"spec": {**job.pod, "containers": [container]}}
    node = {"name": "node", "template": {"spec": {"template": pod}}}
    patch = {"template": {"spec": {"replicatedJobs": [node]}}}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": job.metadata,
        "spec": {
            "runtimeRef": {"name": runtime},
            "suspend": bool(job.queue),
            "trainer": {
                "image": job.image,
                "command": job.command("env:PET_MASTER_ADDR"),
                "numNodes": job.nodes,
                "numProcPerNode": job.nproc,
                "resourcesPerNode": {"limits": job.limits},
            },
            "runtimePatches": [{"manager": "gr.launch/render", "trainingRuntimeSpec": patch}],
        },
    }


def _claims(given: tuple[str, ...]) -> dict[str, str]:
    claims: dict[str, str] = {}
    for claim in given:
        name, _, path = claim.partition(":")
        if not DNS_LABEL.fullmatch(name) or not MOUNT_PATH.fullmatch(path):
            raise LaunchError(f"--claim={claim}: give NAME:/PATH, a PersistentVolumeClaim and where pods mount it")
        path = path.rstrip("/")
        hidden = [each for each in OCCUPIED if PurePosixPath(each).is_relative_to(path)]
        if hidden:
            raise LaunchError(f"--claim={claim} would hide {hidden[0]} of the pod: mount it elsewhere, {name}:/mnt say")
        if name in (*claims, "shm") or path in claims.values():
            raise LaunchError(f"--claim={claim}: its name or its path is taken; give each once, and shm is the pod's")
        claims[name] = path
    return claims


def _run_dir(config: str, overrides: tuple[str, ...]) -> str | None:
    """The run_dir of the last override with one, or of the file. None if the file has none or is only in the image."""
    values = [
        value.strip() for key, _, value in (each.partition("=") for each in overrides) if key.strip() == "run_dir"
    ]
    if values or not Path(config).is_file():
        return values[-1] if values else None
    try:
        settings = yaml.safe_load(Path(config).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise LaunchError(f"{config} cannot be read: {' '.join(str(error).split())}") from None
    return str(settings["run_dir"]) if isinstance(settings, dict) and "run_dir" in settings else None


def _check(name: str, claims: dict[str, str], config: str, overrides: tuple[str, ...]) -> None:
    if not DNS_LABEL.fullmatch(name) or len(name) > LONGEST_NAME:
        raise LaunchError(f"--name={name}: give at most {LONGEST_NAME} of a-z, 0-9 and -, beginning with a letter")
    for each in overrides:
        if not OVERRIDE.fullmatch(each):
            raise LaunchError(f"{each!r} is no override: give KEY.PATH=VALUE")
    run_dir = _run_dir(config, overrides)
    durable = run_dir and any((PurePosixPath(WORKSPACE) / run_dir).is_relative_to(path) for path in claims.values())
    if not durable:
        problem = (
            f"run_dir={run_dir} is on no --claim, so"
            if run_dir
            else f"{config} says no run_dir here; unless it is on a --claim,"
        )
        click.echo(
            f"warning: {problem} checkpoints and status end with their pod and nothing can be resumed: add "
            f"--claim=NAME:/mnt run_dir=/mnt/{name}",
            err=True,
        )


_SHARED = [
    click.option("--config", required=True, help="The experiment, a path inside the image."),
    click.option("--nnodes", default="1", show_default=True, help="Nodes, a pod each."),
    click.option("--nproc", default=0, help="Ranks of a node; 0: one a GPU, or one on a CPU host."),
    click.option(
        "--resource",
        default="cpu",
        show_default=True,
        help="What a node offers, for example h100x8 or "
        "h100x8,cpu=96,memory=900,rdma/ib=8 (CPUs, GB and devices of its own).",
    ),
    click.option("--image", default="gr:latest", show_default=True, help="Image with gr and launch/ (docker/)."),
    click.option("--name", default="gr-train", show_default=True, help="Of the job."),
    click.option("--queue", default="", help="Kueue's LocalQueue, which then decides when the job starts."),
    click.option("--claim", "claims", multiple=True, help="NAME:/PATH of a PersistentVolumeClaim, for data and runs."),
    click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]..."),
]


def _job(config: str, overrides: tuple[str, ...], nnodes: str, nproc: int, claims: tuple[str, ...], **rest: str) -> Job:
    min_nodes, max_nodes = nodes(nnodes)
    if min_nodes != max_nodes:
        raise LaunchError(f"--nnodes={nnodes}: a JobSet has a fixed number of pods; give one number")
    mounted = _claims(claims)
    _check(rest["name"], mounted, config, overrides)
    if rest["queue"] and not LABEL_VALUE.fullmatch(rest["queue"]):
        raise LaunchError(f"--queue={rest['queue']}: a LocalQueue has at most 63 of a-z, A-Z, 0-9, -, _ and .")
    if not IMAGE.fullmatch(rest["image"]):
        raise LaunchError(f"--image={rest['image']}: give REGISTRY/NAME:TAG or REGISTRY/NAME@sha256:...")
    arguments = (one_line("config", config), *device(rest["resource"]), *overrides)
    nproc = ranks(nproc, rest["resource"])
    return Job(arguments=arguments, nodes=max_nodes, nproc=nproc, claims=mounted, **rest)


def _shared(command: Any) -> Any:
    for option in reversed(_SHARED):
        command = option(command)
    return command


class _Dumper(yaml.SafeDumper):
    """Quotes texts that kubectl's YAML would read as a truth value or a number, and PyYAML would not."""

    def ignore_aliases(self, data: Any) -> bool:
        return True  # kubectl reads them; people do not


_Dumper.add_implicit_resolver("bool", re.compile("^[yYnN]$"), list("yYnN"))
_Dumper.add_implicit_resolver("number", re.compile(r"^[-+.0-9][0-9a-fA-FoxX_.:eE+-]*$"), list("-+.0123456789"))


def _print(manifest: dict[str, Any]) -> None:
    click.echo(yaml.dump(manifest, Dumper=_Dumper, sort_keys=False), nl=False)


@click.group(help=__doc__)
def main() -> None: ...


@main.command("jobset", help="A JobSet, with Kueue's label where --queue is given.")
@_shared
@click.option(
    "--restarts", default=20, show_default=True, type=click.IntRange(0), help="Restarts of the whole job after crashes."
)
def _jobset(restarts: int, **options: Any) -> None:
    _print(jobset(_job(**options), restarts))


@main.command("trainjob", help="A TrainJob of Kubeflow Trainer.")
@_shared
@click.option("--runtime", default="torch-distributed", show_default=True, help="A ClusterTrainingRuntime for torch.")
def _trainjob(runtime: str, **options: Any) -> None:
    if not LABEL_VALUE.fullmatch(runtime):
        raise LaunchError(f"--runtime={runtime}: name a ClusterTrainingRuntime of the cluster")
    _print(trainjob(_job(**options), runtime))


if __name__ == "__main__":
    main()
