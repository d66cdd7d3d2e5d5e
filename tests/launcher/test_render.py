"""Manifests are as reviewed (golden files), and as Kubernetes, JobSet and Kubeflow Trainer take them. No cluster."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support import ROOT

GOLDEN = Path(__file__).parent / "golden"
KUBERNETES = "1.34"
CLAIMED = ["--claim", "runs:/mnt", "run_dir=/mnt/hstu", "task.negatives={kind: full}"]
GPUS = ["--config", "configs/retrieval/ml-1m-hstu-large.yaml", "--nnodes", "16", "--resource", "h100x8"]
CASES = {
    "jobset": ["jobset", *GPUS, "--name", "hstu", "--queue", "gpus", "--image", "registry/gr:1", *CLAIMED],
    "trainjob": ["trainjob", *GPUS, "--name", "hstu", "--queue", "gpus", "--image", "registry/gr:1", *CLAIMED],
    "jobset-small": ["jobset", "--config", "configs/retrieval/smoke.yaml", "--resource", "cpux2", "--nproc", "2"],
}


def render(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch.render", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", CASES)
def test_manifest_is_as_reviewed(name):
    """After a change that is meant, write the golden file anew with launch.render, and review the difference."""
    pytest.importorskip("torchx", reason="needs torchx: the extra launch")
    done = render(*CASES[name])
    assert done.returncode == 0, done.stderr
    assert done.stdout == (GOLDEN / f"{name}.yaml").read_text()


def faults(manifest: dict) -> list[str]:
    """What the models of its kind, and the schema of the pods inside, find wrong."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="needs kubeflow-trainer-api: the extra dev")
    kinds = {"JobSet": models.JobsetV1alpha2JobSet, "TrainJob": models.TrainerV1alpha1TrainJob}
    try:
        read = kinds[manifest["kind"]].from_dict(manifest).to_dict()
    except ValueError as error:
        return str(error).splitlines()
    # The models drop what they do not know.
    return [*lost(manifest, json.loads(json.dumps(read, default=str)), ""), *pod_faults(manifest)]


def lost(before, after, path: str) -> list[str]:
    if isinstance(before, dict):
        known = after if isinstance(after, dict) else {}
        gone = [f"{path}.{key}: unknown" for key in before if key not in known]
        return gone + [
            fault for key in before if key in known for fault in lost(before[key], known[key], f"{path}.{key}")
        ]
    if isinstance(before, list):
        return [
            fault for i, (b, a) in enumerate(zip(before, after, strict=True)) for fault in lost(b, a, f"{path}[{i}]")
        ]
    return []


def pod_faults(manifest: dict) -> list[str]:
    validation = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate: the extra dev")
    if manifest["kind"] != "JobSet":
        return []
    found = []
    for each in manifest["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": each["template"]["spec"]}
        try:
            validation.validate(job, KUBERNETES, strict=True)
        except validation.ValidationError as error:
            found.append(f"{'.'.join(map(str, error.path))}: {error.message[:200]}")
    return found


@pytest.mark.parametrize("name", CASES)
def test_manifest_is_valid(name):
    assert faults(yaml.safe_load((GOLDEN / f"{name}.yaml").read_text())) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "network", "publishNotReadyAdresses"], True),
        (["spec", "failurePolicy", "maxRestarts"], "many"),
        (["spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "terminationGracePeriod"], 300),
        (["spec", "replicatedJobs", 0, "template", "spec", "completionMode"], 3),
    ],
)
def test_validation_bites(path, value):
    manifest = yaml.safe_load((GOLDEN / "jobset.yaml").read_text())
    place = manifest
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert faults(manifest) != []


@pytest.mark.parametrize("name", ["jobset", "trainjob"])
def test_pods_get_longer_to_leave_than_ranks_to_save(name):
    manifest = yaml.safe_load((GOLDEN / f"{name}.yaml").read_text())
    text = yaml.safe_dump(manifest)
    grace = int(text.split("--grace=")[1].split()[0])
    pod = int(text.split("terminationGracePeriodSeconds: ")[1].split()[0])
    assert pod >= grace + 30


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nnodes", "2:4"], "--nnodes=2:4: a JobSet has a fixed number of pods"),
        (["--resource", "h100x9"], "a host has 8 GPUs"),
        (["--resource", "h100x8", "--nproc", "9"], "--resource=h100x8 offers 8 GPUs a node"),
        (["--name", "Train_1"], "--name=Train_1: give at most 40 of a-z"),
        (["--claim", "runs"], "--claim=runs: give NAME:/PATH"),
    ],
)
def test_a_mistake_is_one_line(arguments, said):
    done = render("jobset", "--config", "c.yaml", *arguments)
    assert done.returncode and not done.stdout
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert line.startswith("error: ") and said in line


def test_checkpoints_that_end_with_their_pod_are_warned_of():
    assert "warning: run_dir is on no --claim" in render("jobset", "--config", "c.yaml").stderr
    assert "warning" not in render("jobset", "--config", "c.yaml", *CLAIMED).stderr
