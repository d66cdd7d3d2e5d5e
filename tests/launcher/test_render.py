"""Manifests are as reviewed (golden files), and as Kubernetes, JobSet and Kubeflow Trainer take them. No cluster."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.outcome import FAILED, STOPPED
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


def golden(name: str) -> dict:
    return yaml.safe_load((GOLDEN / f"{name}.yaml").read_text())


# The messages are those of Kubernetes' Job controller.
ENDED = "Container trainer for pod ns/hstu-node-0-3-x7k2p failed with exit code {} matching FailJob rule at index 0"
DISRUPTED = "Pod ns/hstu-node-0-3-x7k2p has condition DisruptionTarget matching FailJob rule at index 1"


@pytest.mark.parametrize(
    ("reason", "message", "action"),
    [
        ("PodFailurePolicy", ENDED.format(2), "FailJobSet"),
        ("PodFailurePolicy", ENDED.format(75), "RestartJobSetAndIgnoreMaxRestarts"),
        ("PodFailurePolicy", DISRUPTED, "RestartJobSetAndIgnoreMaxRestarts"),
        ("PodFailurePolicy", "in words of another release", "FailJobSet"),
        ("BackoffLimitExceeded", "Job has reached the specified backoff limit", None),  # a restart that counts
    ],
)
def test_what_a_jobset_does_when_its_job_fails(reason, message, action):
    rules = golden("jobset")["spec"]["failurePolicy"]["rules"]
    applies = [
        rule["action"]
        for rule in rules
        if reason in rule["onJobFailureReasons"]
        and any(re.search(each, message) for each in rule.get("onJobFailureMessagePatterns", [""]))
    ]
    assert (applies[0] if applies else None) == action
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="needs kubeflow-trainer-api: the extra dev")
    known = models.JobsetV1alpha2FailurePolicyRule.model_fields["action"].description
    assert all(re.search(rf"\b{rule['action']}\b", known) for rule in rules)


def test_which_ends_of_a_pod_end_its_job():
    (job,) = golden("jobset")["spec"]["replicatedJobs"]
    codes, conditions = job["template"]["spec"]["podFailurePolicy"]["rules"]
    assert (codes["action"], codes["onExitCodes"]["values"]) == ("FailJob", [FAILED, STOPPED])
    assert (conditions["action"], conditions["onPodConditions"][0]["type"]) == ("FailJob", "DisruptionTarget")


@pytest.mark.parametrize("name", ["jobset", "trainjob"])
def test_volumes_are_made_writable(name):
    assert "securityContext:\n" in (text := (GOLDEN / f"{name}.yaml").read_text())
    assert "fsGroup: 10001\n" in text


def restricted_faults(pod: dict) -> list[str]:
    """What the Pod Security Standard "restricted" (Kubernetes 1.34) refuses in a pod's spec."""
    of_pod = pod.get("securityContext", {})
    faults = [f"{key} of the host" for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key)]
    faults += [f"sysctl {each['name']}" for each in of_pod.get("sysctls", [])]
    kinds = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
    faults += [f"volume {each['name']}" for each in pod.get("volumes", []) if not set(each) - {"name"} <= kinds]
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        own = of_pod | container.get("securityContext", {})
        capabilities = own.get("capabilities", {})
        rules = {
            "privileged": not own.get("privileged"),
            "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
            "runAsNonRoot": own.get("runAsNonRoot") is True,
            "runAsUser": own.get("runAsUser") != 0,
            "seccompProfile": own.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
            "capabilities drop": "ALL" in capabilities.get("drop", []),
            "capabilities add": set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"},
            "hostPort": not any(port.get("hostPort") for port in container.get("ports", [])),
            "procMount": own.get("procMount", "Default") == "Default",
        }
        faults += [f"{container['name']}: {rule}" for rule, kept in rules.items() if not kept]
    return faults


def pod_of(manifest: dict) -> dict:
    spec = manifest["spec"]
    if manifest["kind"] == "TrainJob":
        spec = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]
        return spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    return spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("name", CASES)
def test_a_restricted_namespace_takes_the_pods(name):
    pod = pod_of(golden(name))
    assert restricted_faults(pod) == []
    assert pod["securityContext"]["runAsUser"] == 10001, "a number: Kubernetes cannot look up names of the image"
    (shm,) = (each["emptyDir"] for each in pod["volumes"] if each["name"] == "shm")
    assert re.fullmatch("[1-9][0-9]*M", shm["sizeLimit"])
    assert name == "trainjob" or pod["automountServiceAccountToken"] is False


@pytest.mark.parametrize(
    ("place", "key", "value", "fault"),
    [
        ("securityContext", "runAsNonRoot", None, "trainer: runAsNonRoot"),
        ("securityContext", "runAsUser", 0, "trainer: runAsUser"),
        ("securityContext", "seccompProfile", None, "trainer: seccompProfile"),
        ("container", "allowPrivilegeEscalation", True, "trainer: allowPrivilegeEscalation"),
        ("container", "capabilities", {"drop": ["NET_RAW"]}, "trainer: capabilities drop"),
        ("container", "capabilities", {"drop": ["ALL"], "add": ["SYS_PTRACE"]}, "trainer: capabilities add"),
        (None, "hostNetwork", True, "hostNetwork of the host"),
        (None, "volumes", [{"name": "x", "hostPath": {"path": "/"}}], "volume x"),
    ],
)
def test_the_restriction_bites(place, key, value, fault):
    pod = pod_of(golden("jobset"))
    section = pod["containers"][0]["securityContext"] if place == "container" else pod[place] if place else pod
    section[key] = value if value is not None else {}
    assert restricted_faults(pod) == [fault]


def test_a_host_of_other_shape_and_devices():
    pytest.importorskip("torchx", reason="needs torchx: the extra launch")
    own = "a100x8,cpu=64,memory=500,rdma/ib=4"
    manifest = yaml.safe_load(render("trainjob", "--config", "c.yaml", "--resource", own).stdout)
    limits = {"cpu": 64, "memory": "500000M", "nvidia.com/gpu": 8, "rdma/ib": 4}
    assert manifest["spec"]["trainer"]["resourcesPerNode"]["limits"] == limits
    assert faults(manifest) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nnodes", "2:4"], "--nnodes=2:4: a JobSet has a fixed number of pods"),
        (["--resource", "h100x9"], "a host has 8 GPUs"),
        (["--resource", "h100x8", "--nproc", "9"], "--resource=h100x8 offers 8 GPUs a node"),
        (["--name", "Train_1"], "--name=Train_1: give at most 40 of a-z"),
        (["--claim", "runs"], "--claim=runs: give NAME:/PATH"),
        (["--claim", "runs:mnt"], "--claim=runs:mnt: give NAME:/PATH"),
        (["--claim", "runs:/mnt/../etc"], "--claim=runs:/mnt/../etc: give NAME:/PATH"),
        (["--claim", "runs:/"], "--claim=runs:/: give NAME:/PATH"),
        (["--claim", "runs:/workspace"], "--claim=runs:/workspace would hide /workspace/launch of the pod"),
        (["--claim", "runs:/opt/"], "--claim=runs:/opt/ would hide /opt/gr of the pod"),
        (["--claim", "runs:/mnt", "--claim", "runs:/data"], "--claim=runs:/data: its name or its path is taken"),
        (["--claim", "runs:/mnt", "--claim", "data:/mnt/"], "--claim=data:/mnt/: its name or its path is taken"),
        (["--claim", "shm:/x"], "--claim=shm:/x: its name or its path is taken"),
        (["not_an_override"], "'not_an_override' is no override: give KEY.PATH=VALUE"),
    ],
)
def test_a_mistake_is_one_line(arguments, said):
    done = render("jobset", "--config", "c.yaml", *arguments)
    assert done.returncode == 2 and not done.stdout
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert line.startswith("error: ") and said in line


def test_restarts_are_no_fewer_than_none():
    pytest.importorskip("torchx", reason="needs torchx: the extra launch")
    done = render("jobset", "--config", "c.yaml", "--restarts", "-3")
    assert done.returncode == 2 and "'--restarts': -3 is not in the range x>=0" in done.stderr


def test_without_torchx_one_line_says_so():
    hidden = "import runpy, sys; sys.modules['torchx'] = None; runpy.run_module('launch.render', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", hidden], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: launch.render needs torchx: pip install") and done.stderr.count("\n") == 1


def test_checkpoints_that_end_with_their_pod_are_warned_of(tmp_path):
    pytest.importorskip("torchx", reason="needs torchx: the extra launch")

    def warned(*arguments: str, config: str = "c.yaml") -> str:
        done = render("jobset", "--config", config, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stderr

    claim = ("--claim", "runs:/mnt")
    assert "warning: run_dir=runs/a is on no --claim" in warned("run_dir=runs/a", *claim)
    assert "warning: run_dir=/mnt/a is on no --claim" in warned("run_dir=/mnt/a")
    assert "warning: c.yaml says no run_dir here; unless it is on a --claim" in warned(*claim)
    assert warned(*CLAIMED) == ""
    assert warned("--claim", "runs:/workspace/runs", "run_dir=runs/a") == "", "from the folder that pods work in"
    own = tmp_path / "own.yaml"
    own.write_text("run_dir: /mnt/a\n")
    assert warned(*claim, config=str(own)) == ""
    assert "warning: run_dir=/data/b is on no --claim" in warned(*claim, "run_dir=/data/b", config=str(own))
