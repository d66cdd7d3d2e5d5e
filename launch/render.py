"""Kubernetes manifests of a training job, on stdout: python -m launch.render jobset --config C | kubectl apply -f -

jobset     a JobSet (jobset.x-k8s.io), one pod a node; --queue adds the label by which Kueue admits all pods or none
trainjob   a TrainJob of Kubeflow Trainer 2.2 or later, which makes a JobSet from a runtime of the cluster

Every pod runs launch.node, as under every launcher.
"""

import re
from dataclasses import dataclass
from typing import Any

import click
import yaml

from launch.components import LaunchError, host, nodes, ranks
from launch.outcome import FAILED
from launch.rendezvous import PORTS

WORKSPACE = "/workspace"  # of docker/*.Dockerfile
# Ranks save within the first; the rest of the pod's grace period is for the agents to leave.
SAVE_SECONDS, LEAVE_SECONDS = 240, 60
PORT = PORTS[0]  # a pod has its ports to itself
LONGEST_NAME = 40  # a pod's name is longer, and has to stay a DNS label
DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


@dataclass(frozen=True)
class Job:
    """What both kinds say. claims: PersistentVolumeClaim -> where pods mount it."""

    name: str
    arguments: tuple[str, ...]
    nodes: int
    nproc: int
    resource: str
    image: str
    queue: str
    claims: dict[str, str]

    def command(self, rendezvous: str) -> list[str]:
        """What a pod runs."""
        options = {"nnodes": self.nodes, "nproc": self.nproc, "rendezvous": rendezvous, "id": self.name}
        options["grace"] = SAVE_SECONDS
        words = [f"--{name}={value}" for name, value in options.items()]
        return ["python", "-m", "launch.node", *words, "train", *self.arguments]

    @property
    def metadata(self) -> dict[str, Any]:
        labels = {"labels": {"kueue.x-k8s.io/queue-name": self.queue}} if self.queue else {}
        return {"name": self.name, **labels}

    @property
    def limits(self) -> dict[str, Any]:
        offered = host(self.resource)
        gpus = {"nvidia.com/gpu": offered.gpu} if offered.gpu else {}
        return {"cpu": offered.cpu, "memory": f"{offered.memMB}M", **gpus}

    @property
    def mounts(self) -> list[dict]:
        # NCCL and gloo want more shared memory than the 64 MB of a pod.
        return [
            {"name": "shm", "mountPath": "/dev/shm"},
            *({"name": n, "mountPath": p} for n, p in self.claims.items()),
        ]

    @property
    def pod(self) -> dict[str, Any]:
        claimed = [{"name": name, "persistentVolumeClaim": {"claimName": name}} for name in self.claims]
        return {
            "terminationGracePeriodSeconds": SAVE_SECONDS + LEAVE_SECONDS,
            "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}, *claimed],
        }


def jobset(job: Job, restarts: int) -> dict[str, Any]:
    """One indexed Job, a pod a node. A pod that fails restarts all, at most `restarts` times, unless it is for good."""
    container = {
        "name": "trainer",
        "image": job.image,
        "workingDir": WORKSPACE,
        "command": job.command(f"{job.name}-node-0-0.{job.name}:{PORT}"),
        "ports": [{"name": "rendezvous", "containerPort": PORT}],
        "resources": {"limits": job.limits},
        "volumeMounts": job.mounts,
    }
    for_good = {"containerName": "trainer", "operator": "In", "values": [FAILED]}
    indexed = {
        "parallelism": job.nodes,
        "completions": job.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": for_good}]},
        "template": {"spec": {"restartPolicy": "Never", **job.pod, "containers": [container]}},
    }
    # The reason of a Job that its podFailurePolicy ended, and so of no other.
    end = {"name": "failed_for_good", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": job.metadata,
        "spec": {
            "suspend": bool(job.queue),  # Kueue starts it once every pod has a place
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": restarts, "rules": [end]},
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": indexed}}],
        },
    }


def trainjob(job: Job, runtime: str) -> dict[str, Any]:
    """How often it is restarted is the runtime's business. Its torch plugin names the first node in PET_MASTER_ADDR."""
    pod = {"spec": {**job.pod, "containers": [{"name": "node", "volumeMounts": job.mounts}]}}
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
    for claim in given:
        name, _, path = claim.partition(":")
        if not DNS_LABEL.fullmatch(name) or not path.startswith("/"):
            raise LaunchError(f"--claim={claim}: give NAME:/PATH, a PersistentVolumeClaim and where pods mount it")
    return dict(claim.split(":", 1) for claim in given)


def _check(name: str, claims: dict[str, str], overrides: tuple[str, ...]) -> None:
    if not DNS_LABEL.fullmatch(name) or len(name) > LONGEST_NAME:
        raise LaunchError(f"--name={name}: give at most {LONGEST_NAME} of a-z, 0-9 and -, beginning with a letter")
    run_dirs = [each.removeprefix("run_dir=") for each in overrides if each.startswith("run_dir=")]
    if not any(run_dir.startswith(f"{path.rstrip('/')}/") for run_dir in run_dirs for path in claims.values()):
        click.echo(
            "warning: run_dir is on no --claim, so checkpoints and status end with their pod and nothing can be "
            f"resumed: add --claim=NAME:/mnt run_dir=/mnt/{name}",
            err=True,
        )


_SHARED = [
    click.option("--config", required=True, help="The experiment, a path inside the image."),
    click.option("--nnodes", default="1", show_default=True, help="Nodes, a pod each."),
    click.option("--nproc", default=0, help="Ranks of a node; 0: one a GPU, or one on a CPU host."),
    click.option(
        "--resource", default="cpu", show_default=True, help="What a node offers, for example h100x8 or cpux4."
    ),
    click.option("--image", default="gr:latest", show_default=True, help="Image with gr and launch/ (docker/)."),
    click.option("--name", default="gr-train", show_default=True, help="Of the job."),
    click.option("--queue", default="", help="Kueue's LocalQueue, which then decides when the job starts."),
    click.option("--claim", "claims", multiple=True, help="NAME:/PATH of a PersistentVolumeClaim, for data and runs."),
    click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]..."),
]


def _job(config: str, overrides: tuple[str, ...], nnodes: str, nproc: int, claims: tuple[str, ...], **rest: str) -> Job:
    least, most = nodes(nnodes)
    if least != most:
        raise LaunchError(f"--nnodes={nnodes}: a JobSet has a fixed number of pods; give one number")
    mounted = _claims(claims)
    _check(rest["name"], mounted, overrides)
    return Job(arguments=(config, *overrides), nodes=most, nproc=ranks(nproc, rest["resource"]), claims=mounted, **rest)


def _shared(command: Any) -> Any:
    for option in reversed(_SHARED):
        command = option(command)
    return command


@click.group(help=__doc__)
def main() -> None: ...


@main.command("jobset", help="A JobSet, with Kueue's label where --queue is given.")
@_shared
@click.option(
    "--restarts", default=20, show_default=True, help="Restarts of the whole job, after crashes and evictions."
)
def _jobset(restarts: int, **options: Any) -> None:
    click.echo(yaml.safe_dump(jobset(_job(**options), restarts), sort_keys=False), nl=False)


@main.command("trainjob", help="A TrainJob of Kubeflow Trainer.")
@_shared
@click.option("--runtime", default="torch-distributed", show_default=True, help="A ClusterTrainingRuntime for torch.")
def _trainjob(runtime: str, **options: Any) -> None:
    click.echo(yaml.safe_dump(trainjob(_job(**options), runtime), sort_keys=False), nl=False)


if __name__ == "__main__":
    main()
